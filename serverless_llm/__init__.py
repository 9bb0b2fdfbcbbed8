"""Serve many language models from few GPUs."""
