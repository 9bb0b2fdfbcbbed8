"""Stream safetensors from disk to DRAM to device at the speed of the slowest link."""
