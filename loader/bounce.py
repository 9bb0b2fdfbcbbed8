"""Pool -> CUDA device through pinned memory, so that the copy engine and the CPU work at the same time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from serverless_llm.loader.copies import Copy
from serverless_llm.loader.plan import Landed

BUFFER_BYTES = 64 << 20  # two of them per device; a span is never longer


class Bounce:
    """Two pinned buffers and a stream of their own. Used by one thread; `drain` by any."""

    def __init__(self, device: torch.device) -> None:
        self._buffers = [torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._events = [torch.cuda.Event() for _ in self._buffers]  # type: ignore[no-untyped-call]
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._turn = 0

    def move(self, pool: torch.Tensor, span: Landed, copies: Sequence[Copy], arena: torch.Tensor) -> None:
        """Begins the copies of one span. Its bytes in the pool are free when this returns."""
        if not copies:
            return
        buffer, event = self._buffers[self._turn], self._events[self._turn]
        self._turn ^= 1
        event.synchronize()  # what this buffer held has left it
        base = span.pool_offset
        buffer[: span.length].copy_(pool[base : base + span.length])
        with torch.cuda.stream(self._stream):
            for source, target, length in copies:
                held = buffer[source - base : source - base + length]
                arena[target : target + length].copy_(held, non_blocking=True)
            event.record(self._stream)

    def drain(self) -> None:
        """Returns when every copy begun has arrived."""
        self._stream.synchronize()
