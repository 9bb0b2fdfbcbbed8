"""Checkpoints on disk, written by the reference implementation, for the tests beside this file."""

from __future__ import annotations

import json
import os
import queue
import resource
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from serverless_llm.errors import CheckpointError
from serverless_llm.loader import manifest
from serverless_llm.loader.manifest import Manifest
from serverless_llm.loader.pipeline import Pipeline
from serverless_llm.loader.plan import Landed
from serverless_llm.loader.pool import Pool
from serverless_llm.loader.reader import Reader
from serverless_llm.loader.residency import Tier
from serverless_llm.loader.waiting import Load


def write(directory: Path, *shards: dict[str, torch.Tensor]) -> Path:
    """A Hugging Face directory of one file, or of several with an index."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text("{}")
    if len(shards) == 1:
        save_file(shards[0], directory / manifest.SINGLE)
        return directory
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, directory / name)
        weight_map |= dict.fromkeys(shard, name)
    (directory / manifest.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return directory


def random(megabytes: float, seed: int = 0, count: int = 3) -> dict[str, torch.Tensor]:
    """`count` float32 tensors."""
    generator = torch.Generator().manual_seed(seed)
    rows = int(megabytes * (1 << 20)) // 4 // 64 // count
    return {f"{seed}.{number}": torch.randn(rows, 64, generator=generator) for number in range(count)}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal bit for bit, NaN included."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))


def raw(fields: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file from anything; `length` lies about the header's."""
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@contextmanager
def full(nbytes: int) -> Iterator[None]:
    """No file can be written beyond so many bytes: what a full disk answers, at the same calls."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def opened(folder: Path) -> list[Path]:
    """Files below a folder that this process has open, a path for each descriptor."""
    paths: list[Path] = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # it was closed meanwhile
            paths.append(link.readlink())
    return sorted(path for path in paths if path.is_relative_to(folder))


def spoil(path: Path, place: int, how: str) -> None:
    """A file has one bit `flipped` at this byte, or is `cut` there, or is `gone`."""
    if how == "gone":
        path.unlink()
    elif how == "cut":
        os.truncate(path, place)
    else:
        with path.open("r+b") as file:
            file.seek(place)
            (old,) = file.read(1)
            file.seek(place)
            file.write(bytes([old ^ 1]))


class Node:
    """The loader's parts of one agent; its loop is `turn`."""

    def __init__(
        self,
        slots: int = 8,
        rate: float = 0.0,
        threads: int = 0,
        ahead: int = 0,
        pause: float = 0.0,
        remote_rate: float = 0.0,
    ) -> None:
        self.pool = Pool(slots << 20)
        self.tier = Tier(self.pool.slots, self.pool.slot_bytes)
        self.reader = Reader(self.pool, threads, rate)
        self.posts: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.pipeline = Pipeline(
            self.pool, self.tier, self.reader, self.posts.put, ahead, pause, remote_rate=remote_rate
        )
        self.settle()

    def settle(self) -> list[int]:
        """Turns until no slot's memory is to be taken or given back; the pool's memory after each."""
        memory = [self.pool.memory]
        while self.pipeline._ahead._trimming:
            self.turn()
            memory.append(self.pool.memory)
        return memory

    def turn(self) -> None:
        """Waits for one piece of news and handles it."""
        self.posts.get(timeout=30)()
        self.tier.check_invariants()

    def load(self, source: Manifest, holder: int = 1, priority: int = 0, told: Told | None = None) -> Told:
        told = told or Told()
        ring = isinstance(told, Device)
        told.load = self.pipeline.load(source, holder, told.landed, told.failures.append, priority, ring)
        return told

    def finish(self, told: Told) -> Told:
        """Until the load has ended."""
        while not told.over:
            self.turn()
        return told

    def fetch(self, source: Manifest, holder: int = 1) -> Told:
        told = self.load(source, holder)
        told.load.start()
        return self.finish(told)

    def bytes_of(self, told: Told, file: int, size: int) -> bytes:
        """A file as the pool holds it."""
        content = bytearray(size)
        for span in told.spans:
            if span.file == file:
                content[span.offset : span.offset + span.length] = self.pool.range(span.pool_offset, span.length)
        return bytes(content)

    def close(self) -> None:
        self.pipeline.close()
        self.reader.close()
        self.tier.check_invariants()
        self.pool.close()


class Told:
    """What a load's listener heard."""

    load: Load

    def __init__(self) -> None:
        self.spans: list[Landed] = []
        self.calls: list[int] = []
        self.last = 0
        self.failures: list[CheckpointError] = []

    def landed(self, spans: Sequence[Landed], last: bool) -> None:
        assert not self.over
        self.spans += spans
        self.calls.append(len(spans))
        self.last += last

    @property
    def over(self) -> bool:
        return bool(self.last or self.failures)


class Device(Told):
    """A listener that copies what it is told of, as slowly as it likes.

    Attributes:
        content: of each file, as far as it was copied.
    """

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self._pool = pool
        self._copied = 0
        self.content: dict[int, bytearray] = {}

    @property
    def waiting(self) -> int:
        """Spans that it was told of and has not copied."""
        return len(self.spans) - self._copied

    def copy(self, spans: int = 1) -> None:
        """Copies the next ones in order, and says so."""
        for span in self.spans[self._copied : self._copied + spans]:
            content = self.content.setdefault(span.file, bytearray())
            content.extend(bytes(max(0, span.offset + span.length - len(content))))
            content[span.offset : span.offset + span.length] = self._pool.range(span.pool_offset, span.length)
        self._copied = min(len(self.spans), self._copied + spans)
        self.load.copied(sum(span.length for span in self.spans[: self._copied]))
