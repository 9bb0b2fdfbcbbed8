"""`serverless-llm bench load`: how fast this machine's weights move, against what its disk can do."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

import click

from serverless_llm.cli import measure, sources
from serverless_llm.cli.options import COUNT
from serverless_llm.cli.output import as_json, say, seconds, show

if TYPE_CHECKING:
    from serverless_llm.loader.manifest import Manifest

SPARE = 256 << 20  # bytes of memory that are left to everybody else
CHUNK = 16 << 20  # bytes of one read through the page cache


class Measured(NamedTuple):
    """One load: wall and CPU seconds, and bytes that came from the disk."""

    seconds: float
    cpu_s: float
    disk_bytes: int


@click.group()
def bench() -> None:
    """Measure parts of serverless-llm on this machine."""


@bench.command()
@click.argument("source", metavar="SOURCE")
@click.option("--repeats", type=COUNT, default=3, show_default=True, help="Loads of each kind; the median is shown.")
@as_json
def load(source: str, repeats: int, as_json: bool) -> None:
    """Load SOURCE's weights as a server does, and as the library does, beside raw reads of the same files.

    The pool is the server's: shared memory that is there before the load begins. The library takes fresh memory. Cold:
    the page cache is emptied of these files first. Warm: it holds them.
    """
    from serverless_llm.loader import load_checkpoint

    found = _weights(Path(sources.resolve(source)))
    paths = [file.path for file in found.files]
    _check_room(found.file_bytes)
    disk = measure.disk(paths)
    medians: dict[tuple[str, str], Measured] = {}
    with _pool(found) as through_pool:
        for state, prepare in STATES.items():
            medians["pool", state] = _median(prepare, through_pool, paths, repeats)
    for state, prepare in STATES.items():
        medians["library", state] = _median(prepare, lambda: load_checkpoint(found.directory), paths, repeats)
    loads = [{"way": way, "page_cache": state, **one._asdict()} for (way, state), one in medians.items()]
    say({"bytes": found.file_bytes, "disk": disk._asdict(), "loads": loads}, "", as_json)
    if not as_json:
        header = ("WAY", "GB/S", "OF THE DISK", "TOOK", "CPU", "FROM DISK")
        show(header, list(_rows(found.file_bytes, disk.rate, medians)))


def _weights(directory: Path) -> Manifest:
    """What a load needs: no config.json."""
    from serverless_llm.loader import manifest

    return manifest.Manifest(directory, tuple(manifest.weights(directory)), "weights", {}, "")


def _check_room(nbytes: int) -> None:
    from serverless_llm.errors import CapacityError
    from serverless_llm.loader.headroom import headroom
    from serverless_llm.quantities import size

    room = headroom() - SPARE
    if nbytes > room:
        raise CapacityError(f"the weights take {size(nbytes)} of memory, {size(max(0, room))} are free")


def _rows(
    nbytes: int, disk_rate: float, medians: dict[tuple[str, str], Measured]
) -> Iterator[tuple[str, str, str, str, str, str]]:
    from serverless_llm.quantities import size

    yield "raw reads", f"{disk_rate / 1e9:.2f}", "1.00", "", "", ""
    for (way, state), one in medians.items():
        rate = nbytes / one.seconds
        share = f"{rate / disk_rate:.2f}"
        yield (
            f"{way}, {state}",
            f"{rate / 1e9:.2f}",
            share,
            seconds(one.seconds),
            seconds(one.cpu_s),
            size(one.disk_bytes),
        )


def _median(
    prepare: Callable[[Sequence[Path]], None], run: Callable[[], object], paths: Sequence[Path], repeats: int
) -> Measured:
    """Each figure's own median."""
    from statistics import median

    measured = [_timed(prepare, run, paths) for _ in range(repeats)]
    took, cpu_s, disk_bytes = (median(column) for column in zip(*measured, strict=True))
    return Measured(took, cpu_s, int(disk_bytes))


def _timed(prepare: Callable[[Sequence[Path]], None], run: Callable[[], object], paths: Sequence[Path]) -> Measured:
    prepare(paths)
    storage, cpu, began = _storage_bytes(), time.process_time(), time.perf_counter()
    run()
    return Measured(time.perf_counter() - began, time.process_time() - cpu, _storage_bytes() - storage)


def _storage_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def _cool(paths: Sequence[Path]) -> None:
    for path in paths:
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _warm(paths: Sequence[Path]) -> None:
    buffer = bytearray(CHUNK)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


STATES = {"cold": _cool, "warm": _warm}


@contextmanager
def _pool(found: Manifest) -> Iterator[Callable[[], None]]:
    """A pool of the checkpoint's size whose memory is there, and a load into it as an agent makes it."""
    from serverless_llm.errors import CheckpointError
    from serverless_llm.loader.pipeline import Pipeline
    from serverless_llm.loader.pool import MAX_SLOT, Pool
    from serverless_llm.loader.reader import Reader
    from serverless_llm.loader.residency import Tier

    pool = Pool(found.file_bytes + len(found.files) * MAX_SLOT)
    for slot in range(pool.slots):
        pool.touch(slot)
    posted: SimpleQueue[Callable[[], object]] = SimpleQueue()
    reader = Reader(pool)
    pipeline = Pipeline(pool, Tier(pool.slots, pool.slot_bytes), reader, posted.put)

    def load() -> None:
        ended: list[CheckpointError | None] = []
        one = pipeline.load(found, 0, lambda _, last: ended.append(None) if last else None, ended.append)
        one.start()
        while not ended:
            posted.get()()
        pipeline.release(found.checkpoint, 0)
        pipeline.forget(found.checkpoint)
        if ended[0] is not None:
            raise ended[0]

    try:
        yield load
    finally:
        pipeline.close()
        if reader.close():
            pool.close()
