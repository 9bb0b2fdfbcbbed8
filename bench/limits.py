"""How fast can this machine do it at all? Device, memory and matmul limits that stand beside every result.

Disk: O_DIRECT reads of the very files into reused, pre-faulted huge pages, the best of {1, 2, 4} threads x {1, 4, 16}
MiB, and of fio where it is installed. Memory: memcpy between buffers far larger than caches. Link to a GPU: copies
from pinned memory. Prefill: all linear layers of the model in torch's bfloat16, each with weights of its own, so that
they come from memory as they do in a real forward.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import itertools
import json
import math
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bench import checkpoints
from bench.common import demand_quiet, row, write_results
from serverless_llm.loader import manifest

if TYPE_CHECKING:
    import torch

MIB = 1 << 20
PAGE = 4096  # O_DIRECT's alignment of addresses, offsets and lengths
SWEEP = 4 << 30  # bytes that are enough to compare settings with
SWEEPS = 3
RING = 64 * MIB  # bytes of one reading thread's buffer, used round and round
ROWS = 32  # tokens of the prefill that cold starts are measured with
COPY = 256 * MIB  # bytes of one copy between memories, beyond any cache
HEADS = ("lm_head.weight", "model.embed_tokens.weight")  # the second stands in for the first where they are tied


class Setting(NamedTuple):
    threads: int
    piece: int  # bytes of one read


class Linear(NamedTuple):
    rows: int
    outputs: int
    inputs: int


SETTINGS = tuple(Setting(threads, size * MIB) for threads, size in itertools.product((1, 2, 4), (1, 4, 16)))


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds one cold start. Rates in bytes per second, `inf` where nothing moves; times in seconds."""

    disk: float
    upload: float
    tokenizer_s: float
    prefill_s: float


def ttft_limit(case: str, nbytes: int, limits: Limits) -> float:
    """Seconds to the first token that no server can beat.

    `disk`: bytes flow over both links at once while the tokenizer loads. `dram`: they cross the second link only, and
    the tokenizer is there.
    """
    upload_s = nbytes / limits.upload
    if case == "dram":
        return upload_s + limits.prefill_s
    return max(nbytes / limits.disk, upload_s, limits.tokenizer_s) + limits.prefill_s


# --- disk ---


class Read(NamedTuple):
    file: int
    offset: int
    length: int


def reads(sizes: Sequence[int], piece: int) -> list[Read]:
    """The whole of every file in calls of `piece` bytes, the last of each rounded up to a page, as O_DIRECT wants."""
    return [
        Read(number, offset, min(piece, -(-(size - offset) // PAGE) * PAGE))
        for number, size in enumerate(sizes)
        for offset in range(0, size, piece)
    ]


class RawReader:
    """Reads files past the page cache; its buffers are made and touched once.

    Raises OSError where the file system knows no O_DIRECT.
    """

    def __init__(self, paths: Sequence[Path], threads: int = 4) -> None:
        self._sizes = [path.stat().st_size for path in paths]
        self._files = [os.open(path, os.O_RDONLY | os.O_DIRECT) for path in paths]
        self._rings = [_ring() for _ in range(threads)]

    @property
    def nbytes(self) -> int:
        return sum(self._sizes)

    def rate(self, setting: Setting, at_most: int = sys.maxsize) -> float:
        """Bytes per second of one pass over all files, or over about their first `at_most` bytes."""
        calls = reads(self._sizes, setting.piece)[: -(-at_most // setting.piece)]
        left = calls[::-1]  # threads take from the end
        return self._timed(
            [functools.partial(self._drain, left, ring) for ring in self._rings[: setting.threads]], calls
        )

    def fill(self, memory: memoryview, setting: Setting) -> float:
        """Bytes per second of one pass over all files into `memory`, which begins with a page and has room for all."""
        calls = reads(self._sizes, setting.piece)
        ends = itertools.accumulate(call.length for call in calls)
        left = [(call, memory[end - call.length : end]) for call, end in zip(calls, ends, strict=True)][::-1]
        return self._timed([functools.partial(self._scatter, left)] * setting.threads, calls)

    def _timed(self, works: Sequence[Callable[[], int]], calls: Sequence[Read]) -> float:
        expected = sum(min(call.length, self._sizes[call.file] - call.offset) for call in calls)
        with ThreadPoolExecutor(len(works)) as threads:
            began = time.perf_counter()
            done = sum(future.result() for future in [threads.submit(work) for work in works])
            seconds = time.perf_counter() - began
        if done != expected:
            raise OSError(f"read {done} bytes of {expected}")
        return expected / seconds

    def _drain(self, calls: list[Read], ring: memoryview) -> int:
        done, place = 0, 0
        while True:
            try:
                file, offset, length = calls.pop()
            except IndexError:
                return done
            place = place if place + length <= len(ring) else 0
            done += os.preadv(self._files[file], [ring[place : place + length]], offset)
            place += length

    def _scatter(self, calls: list[tuple[Read, memoryview]]) -> int:
        done = 0
        while True:
            try:
                call, room = calls.pop()
            except IndexError:
                return done
            done += os.preadv(self._files[call.file], [room], call.offset)

    def close(self) -> None:
        for file in self._files:
            os.close(file)


def _ring() -> memoryview:
    """Private memory, since only that gets huge pages from MADV_HUGEPAGE, with every page present."""
    memory = mmap.mmap(-1, RING, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    memory[::PAGE] = b"\1" * (RING // PAGE)
    return memoryview(memory)


def fio_command(path: Path, size: int, setting: Setting) -> list[str]:
    share = size // setting.threads // setting.piece * setting.piece
    return [
        *("fio", "--name=limit", f"--filename={path}", "--rw=read", "--direct=1", "--ioengine=libaio", "--iodepth=4"),
        *("--readonly", f"--bs={setting.piece}", f"--numjobs={setting.threads}", "--thread", "--group_reporting"),
        *(f"--size={share}", f"--offset_increment={share}", "--iomem=mmap", "--output-format=json"),
    ]


def fio_rate(output: str) -> float:
    """Bytes per second in fio's JSON, which may follow warnings."""
    report = json.loads(output[output.index("{") :])
    return float(report["jobs"][0]["read"]["bw_bytes"])


def fio_rates(path: Path) -> dict[str, float]:
    """Every setting's rate that fio reaches on a file; nothing where fio is missing or the file is too small."""
    size = path.stat().st_size
    found: dict[str, float] = {}
    for setting in SETTINGS:
        if shutil.which("fio") and size // setting.threads >= setting.piece:
            done = subprocess.run(fio_command(path, size, setting), capture_output=True, text=True, check=True)
            found[f"fio {label(setting)}"] = fio_rate(done.stdout)
    return found


def label(setting: Setting) -> str:
    return f"{setting.threads}x{setting.piece // MIB}MiB"


@dataclass(frozen=True, slots=True)
class DiskLimit:
    """`rates`: every way that was tried, bytes per second. `setting`: the raw reader's best, used in every round."""

    rates: dict[str, float]
    setting: Setting

    @property
    def best(self) -> float:
        return max(self.rates.values())

    @property
    def handicap(self) -> float:
        """How much faster the best way was than the raw reader's best; 1.0 where that was the best."""
        return self.best / self.rates[label(self.setting)]


def disk_limit(reader: RawReader, largest: Path) -> DiskLimit:
    """The median of several sweeps: one call of fio on a shared machine may be twice as fast as the next."""
    sweeps = [
        {label(setting): reader.rate(setting, SWEEP) for setting in SETTINGS} | fio_rates(largest)
        for _ in range(SWEEPS)
    ]
    rates = {name: statistics.median(sweep[name] for sweep in sweeps) for name in sweeps[0]}
    return DiskLimit(rates, max(SETTINGS, key=lambda setting: rates[label(setting)]))


# --- memory and links ---


def memcpy_rate(threads: int = 1) -> float:
    """Bytes per second copied by `threads` threads together, the best of five; bytes count once."""
    pairs = [(_block(), _block()) for _ in range(threads)]

    def once() -> float:
        copies = [threading.Thread(target=ctypes.memmove, args=(*pair, COPY)) for pair in pairs]
        began = time.perf_counter()
        for copy in copies:
            copy.start()
        for copy in copies:
            copy.join()
        return time.perf_counter() - began

    return threads * COPY / min(once() for _ in range(5))


def _block() -> Any:
    """`COPY` bytes whose pages are all present."""
    block = ctypes.create_string_buffer(COPY)
    ctypes.memset(block, 1, COPY)
    return block


def upload_rate(device: str) -> float:
    """Bytes per second from pinned memory to a GPU, the best of ten copies."""
    import torch

    host = torch.ones(COPY, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(COPY, dtype=torch.uint8, device=device)
    return COPY / min(_seconds(functools.partial(there.copy_, host, non_blocking=True), device) for _ in range(10))


def _seconds(work: Callable[[], object], device: str) -> float:
    import torch

    began = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


# --- compute ---


def linears(shapes: dict[str, tuple[int, ...]], rows: int) -> list[Linear]:
    """A prefill's matrix products: every projection with `rows` rows, and the head with the last one."""
    layers = [Linear(rows, *shape) for name, shape in shapes.items() if name.endswith("_proj.weight")]
    head = next(shapes[name] for name in HEADS if name in shapes)
    return [*layers, Linear(1, *head)]


def use_all_cores() -> None:
    """For this process's products, whatever `OMP_NUM_THREADS` says: a limit is the machine's."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))


class Prefill:
    """The products of one prefill, weights as large as the model's in memory. `device` as torch spells it."""

    def __init__(self, directory: Path, rows: int, device: str) -> None:
        entries = manifest.build(directory).tensors()
        self._device = device
        self._work = [
            (self._full(rows, inputs), self._full(outputs, inputs))
            for rows, outputs, inputs in linears({name: entry.shape for name, (_, entry) in entries.items()}, rows)
        ]

    def _full(self, *shape: int) -> torch.Tensor:
        import torch

        return torch.full(shape, 0.01, dtype=torch.bfloat16, device=self._device)

    def seconds(self, times: int = 3) -> float:
        """The best of `times` runs."""
        return min(_seconds(self._run, self._device) for _ in range(times))

    def _run(self) -> None:
        import torch

        with torch.inference_mode():
            for rows, weights in self._work:
                torch.nn.functional.linear(rows, weights)


def tokenizer_seconds(directory: Path) -> float:
    """Loading `tokenizer.json` in a process that did nothing else, import excluded; the median of three."""
    program = (
        "import sys, time, tokenizers; began = time.perf_counter(); tokenizers.Tokenizer.from_file(sys.argv[1]);"
        "print(time.perf_counter() - began)"
    )
    command = [sys.executable, "-c", program, str(directory / "tokenizer.json")]
    return statistics.median(float(subprocess.check_output(command)) for _ in range(3))


def link_rate(device: str) -> float:
    """Of the link into the device's memory; on a CPU nothing moves."""
    return upload_rate(device) if device.startswith("cuda") else math.inf


# --- as a bench of its own ---


def rows(reader: RawReader, largest: Path, prefill: Prefill, directory: Path, device: str) -> list[dict[str, Any]]:
    found = disk_limit(reader, largest)
    disk = [row("disk", name, "throughput", "GB/s", [rate / 1e9]) for name, rate in found.rates.items()]
    return [
        *disk,
        *(row("dram", f"{n} threads", "memcpy", "GB/s", [memcpy_rate(n) / 1e9]) for n in (1, 2)),
        *([row("upload", "pinned", "throughput", "GB/s", [upload_rate(device) / 1e9])] if device != "cpu" else []),
        row("prefill", "torch", f"rows={ROWS}", "ms", [1000 * prefill.seconds(1) for _ in range(5)]),
        row("tokenizer", "tokenizers", "load_ms", "ms", [1000 * tokenizer_seconds(directory)]),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--checkpoints", type=Path, default=checkpoints.default_folder())
    parser.add_argument("--shape", default=checkpoints.SHAPE)
    parser.add_argument("--smoke", action="store_true", help="a tiny model")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    demand_quiet(arguments.smoke)
    use_all_cores()
    small = (checkpoints.SMOKE_SHAPE, checkpoints.SMOKE_LAYERS)
    directory = checkpoints.checkpoint(arguments.checkpoints, *(small if arguments.smoke else (arguments.shape,)))
    files = checkpoints.weight_files(directory)
    largest = max(files, key=lambda path: path.stat().st_size)
    found = rows(RawReader(files), largest, Prefill(directory, ROWS, arguments.device), directory, arguments.device)
    for entry in found:
        print(f"{entry['case']:10} {entry['subject']:14} {entry['metric']:12} {entry['median']:9.3f} {entry['unit']}")
    if arguments.json:
        write_results(arguments.json, "limits", vars(arguments), found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
