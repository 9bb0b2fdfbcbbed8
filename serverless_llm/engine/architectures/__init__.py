"""Which decoders the engine computes itself, and how each one's config.json says what it is. Pure, no torch."""
