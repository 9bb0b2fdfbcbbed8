"""Tiny trained checkpoints whose answers can be checked."""
