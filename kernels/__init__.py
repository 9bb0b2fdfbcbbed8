"""Attention and sampling kernels, each beside its plain torch reference."""
