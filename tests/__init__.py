"""Tests of the product: real processes, sockets and files."""
