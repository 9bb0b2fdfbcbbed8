"""`ring`: a checkpoint that is many times larger than the pool, through a ring of slots into the device's own memory.

The limit: a reader past the page cache that writes the same bytes straight into fresh memory, as large as they are.
"""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from bench.common import row
from bench.limits import RawReader, Setting
from bench.load_pages import cold
from bench.load_subjects import Sample, Service
from bench.verdicts import at_least, at_most

POOL = 256 << 20
SPARE = 64 << 20  # bytes that a load may take beside the pool and its destination
SPEED = 0.97
POLL = 0.01


class Memory:
    """The most memory that processes held together, in bytes: what several share counts once (proc_pid_smaps(5))."""

    def __init__(self, processes: Sequence[psutil.Process]) -> None:
        self._processes = processes
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.peak = 0

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(POLL):
            self.peak = max(self.peak, sum(rollup(one)["Pss"] for one in self._processes))


def rollup(process: psutil.Process) -> dict[str, int]:
    """Bytes by field."""
    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
    return {name: 1024 * int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}


def fresh_rate(reader: RawReader, setting: Setting) -> float:
    """Bytes per second into memory that nobody had before."""
    memory = mmap.mmap(-1, reader.nbytes + (1 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    with memoryview(memory) as there:
        rate = reader.fill(there, setting)
    memory.close()
    return rate


def ring(
    directory: Path, reader: RawReader, setting: Setting, handicap: float, rounds: int, pool: int = POOL
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows and verdicts of a server in copy mode with a small pool."""
    samples: list[Sample] = []
    limits = []
    with Service(directory, "copy", pool) as service:
        for _ in range(rounds):
            limits.append(fresh_rate(reader, setting) * handicap)
            samples.append(cold(service))
        beyond = extra_memory(service)
    rates = [reader.nbytes / one.seconds for one in samples]
    shares = [rate / limit for rate, limit in zip(rates, limits, strict=True)]
    name = ("ring", "ours-service")
    found = [
        row(*name, "throughput", "GB/s", [rate / 1e9 for rate in rates], limit_ratios=shares),
        row(*name, "cpu_s", "s", [one.cpu_s for one in samples]),
        row(*name, "read_ratio", "x", [one.storage / reader.nbytes for one in samples]),
        row(*name, "memory_beyond_mib", "MiB", [beyond / 2**20]),
        row("ring", "limit", "throughput", "GB/s", [limit / 1e9 for limit in limits]),
    ]
    return found, [
        at_least("ring over a reader into fresh memory", shares, SPEED),
        at_most("ring: MiB of memory beyond the destination", [beyond / 2**20], (pool + SPARE) / 2**20),
    ]


def extra_memory(service: Service) -> int:
    """Bytes at the load's peak, without what the processes hold beside the pool before it and without the weights."""
    service.empty()
    time.sleep(1)  # what was unloaded is unmapped a little later
    processes = service.processes()
    idle = [rollup(process) for process in processes]
    base = sum(one["Pss"] - one["Pss_Shmem"] for one in idle)
    with Memory(processes) as memory:
        cold(service)
    return memory.peak - base - service.nbytes
