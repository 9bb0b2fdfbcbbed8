"""The ways of a part from the pool to the device's arena: by the CPU, and by the copy engines of a CUDA device.

Both begin copies; `Arrival` tells when they have ended. A CUDA device copies straight from memory that is registered
with it, and all else out of pinned buffers, into which the CPU copies it first.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch

from serverless_llm.loader.copies import Copy
from serverless_llm.loader.memory import Range
from serverless_llm.loader.plan import Landed
from serverless_llm.loader.pool import MAX_SLOT

BUFFERS = 8  # pinned, of `MAX_SLOT` bytes each: no part is longer
STREAMS = 2  # a copy engine begins the next part without waiting for the end of the last
TEAM = 4  # threads that fill a buffer: one has a quarter of the bandwidth of a fast PCIe link
READ_ONLY = 0x08  # cudaHostRegisterReadOnly: the window cannot be written to


class Arrival(Protocol):
    """Of what was begun, as a `torch.cuda.Event` tells of it."""

    def query(self) -> bool: ...
    def synchronize(self) -> None: ...


class Way(Protocol):
    """Used by the uploader's thread.

    `pins`: registered memory makes it faster.
    """

    pins: bool

    def begin(self, part: Landed, copies: Sequence[Copy], arena: torch.Tensor, direct: bool) -> Arrival:
        """Begins the copies of a part of the pool; `direct`: all of it is registered."""

    def register(self, offset: int, length: int) -> str:
        """Pins this part of the pool; why it is refused, or ""."""

    def unregister(self, offset: int) -> None:
        """Undoes `register` of the part that begins there. No copy from it is under way."""


class Here:
    """It has ended already."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


HERE = Here()


class ByCpu:
    """To an arena in memory. Nothing needs to be registered."""

    pins = False

    def __init__(self, window: Range) -> None:
        self._window = window

    def begin(self, part: Landed, copies: Sequence[Copy], arena: torch.Tensor, direct: bool) -> Arrival:
        for source, target, length in copies:  # on this thread alone: torch's others have steps to compute
            ctypes.memmove(arena.data_ptr() + target, self._window.address + source, length)
        return HERE

    def register(self, offset: int, length: int) -> str:
        raise NotImplementedError

    def unregister(self, offset: int) -> None:
        raise NotImplementedError


class ByCuda:  # pragma: no cover - cuda
    """To an arena on a CUDA device. Two streams of its own take turns."""

    pins = True

    def __init__(self, window: Range, device: torch.device) -> None:
        self._window = window
        self._pool = torch.frombuffer(window.buffer, dtype=torch.uint8)
        self._device = device
        self._streams = [torch.cuda.Stream(device) for _ in range(STREAMS)]  # type: ignore[no-untyped-call]
        self._buffers = [torch.empty(MAX_SLOT, dtype=torch.uint8, pin_memory=True) for _ in range(BUFFERS)]
        self._left: list[Arrival] = [HERE] * BUFFERS  # what a buffer held has left it
        self._team = ThreadPoolExecutor(TEAM, "bounce")
        self._turn = 0

    def begin(self, part: Landed, copies: Sequence[Copy], arena: torch.Tensor, direct: bool) -> Arrival:
        if not copies:
            return HERE
        self._turn = (self._turn + 1) % BUFFERS
        base = part.pool_offset
        held = self._pool[base : base + part.length] if direct else self._filled(part)
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._streams[self._turn % STREAMS]):
            for source, target, length in copies:
                arena[target : target + length].copy_(held[source - base : source - base + length], non_blocking=True)
            event.record()
        if not direct:
            self._left[self._turn] = event
        return event

    def _filled(self, part: Landed) -> torch.Tensor:
        """The next buffer, with the part's bytes."""
        buffer = self._buffers[self._turn]
        self._left[self._turn].synchronize()
        spread(self._team, buffer.data_ptr(), self._window.address + part.pool_offset, part.length)
        return buffer

    def register(self, offset: int, length: int) -> str:
        with torch.cuda.device(self._device):
            runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            code = runtime.cudaHostRegister(self._window.address + offset, length, READ_ONLY)
            if not int(code):
                return ""
            with contextlib.suppress(RuntimeError):  # this thread's next kernel hears of the refusal
                torch.empty(1, device=self._device).fill_(1)
        return str(torch.cuda.CudaError(int(code)))

    def unregister(self, offset: int) -> None:
        with torch.cuda.device(self._device):
            runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            torch.cuda.check_error(int(runtime.cudaHostUnregister(self._window.address + offset)))


def spread(team: ThreadPoolExecutor, target: int, source: int, length: int) -> None:
    """Copies `length` bytes between addresses, on `TEAM` threads, off the GIL."""
    share = -(-length // TEAM)
    starts = range(0, length, share)
    list(team.map(lambda at: ctypes.memmove(target + at, source + at, min(share, length - at)), starts))
