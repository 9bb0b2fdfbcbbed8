"""One worker's engine: paged KV, continuous batching, many models on one device."""
