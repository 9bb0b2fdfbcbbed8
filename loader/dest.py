"""Where a tensor's bytes go in copy mode: the engine plans it, the uploader writes it."""

from __future__ import annotations

from typing import NamedTuple


class Dest(NamedTuple):
    """One contiguous copy from a tensor to the device's arena, without conversion.

    Attributes:
        tensor: its name in the checkpoint.
        start: first byte, counted from the tensor's own first byte (a slice of rows is a byte range).
        stop: one past the last byte; 0 <= start < stop <= the tensor's bytes.
        offset: where `start` goes, in bytes from the arena's base.
    """

    tensor: str
    start: int
    stop: int
    offset: int
