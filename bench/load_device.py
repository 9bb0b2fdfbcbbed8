"""What `--device` measures: from disk and from DRAM to the device's arena, by the loader alone, in one process.

`bounce`: from DRAM, nothing of the pool registered with the device. `direct`: from DRAM, all of it registered. `disk`:
page cache and pool empty. Each from the order to the tensors that could be used, beside the limit measured in the same
round: pinned memory to the device, and the raw reader. A timeline of every part stands in the result.
`library` is `load_checkpoint` from disk, `library (gds)` the same with GPUDirect Storage, where kvikio is installed.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import queue
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch

from bench import checkpoints
from bench.common import drop_caches, row
from bench.limits import RawReader, disk_limit, memcpy_rate, upload_rate
from bench.verdicts import at_least
from serverless_llm.demo.shapes import shape_of, tensors_of
from serverless_llm.loader import library, manifest
from serverless_llm.loader.copies import Copy
from serverless_llm.loader.dest import Dest
from serverless_llm.loader.headroom import available_memory
from serverless_llm.loader.memory import Range
from serverless_llm.loader.pipeline import Pipeline
from serverless_llm.loader.plan import Landed
from serverless_llm.loader.pool import Pool
from serverless_llm.loader.reader import Reader
from serverless_llm.loader.residency import Tier
from serverless_llm.loader.tasks import Upload
from serverless_llm.loader.upload import Uploader
from serverless_llm.loader.views import TORCH_DTYPES
from serverless_llm.loader.ways import Arrival, ByCpu, ByCuda, Way

SHAPES = ("llama-3.2-1b", "llama-3.1-8b", "qwen3-32b")
LIBRARY = SHAPES[:2]  # those that the library loads, too: the last one takes too long
SHARD = 4 << 30  # bytes
ALIGNMENT = 256  # of a tensor in the arena
SHARE = 0.85  # of what is free that a checkpoint may take
ROUNDS = 5
DIRECT, BOUNCE, DISK = 0.95, 0.8, 0.95  # at least, of the limit


class Part(NamedTuple):
    """Bytes of a checkpoint, and when they had landed, when their copy was begun and when it was known to have ended:
    seconds since the load's begin. From DRAM all land at once."""

    bytes: int
    landed: float
    begun: float
    ended: float


class Timed(NamedTuple):
    """One load."""

    seconds: float
    parts: list[Part]


# --- pure ---


def nbytes_of(shape: str, layers: int | None) -> int:
    """In bfloat16."""
    return sum(2 * math.prod(one.shape) for one in tensors_of(shape_of(shape, layers)))


def fitting(shape: str, room: int) -> tuple[bool, int | None]:
    """Whether anything of that shape fits into so many bytes, and with how many layers; None: all."""
    if nbytes_of(shape, None) <= room:
        return True, None
    layer = nbytes_of(shape, 2) - nbytes_of(shape, 1)
    layers = (room - nbytes_of(shape, 1)) // layer + 1
    return layers >= 1, layers


def overlap(parts: Sequence[Part]) -> float:
    """Of the time from the first copy's begin to the last one's end, the share before the last bytes landed."""
    begun, ended = min(one.begun for one in parts), max(one.ended for one in parts)
    return max(0.0, max(one.landed for one in parts) - begun) / (ended - begun)


def rows(case: str, nbytes: int, loads: dict[str, list[Timed]], limits: dict[str, list[float]]) -> list[dict[str, Any]]:
    found = []
    for name, samples in loads.items():
        limit = limits["disk" if name == "disk" else "device"]
        rates = [nbytes / one.seconds for one in samples]
        shares = [rate / most for rate, most in zip(rates, limit, strict=True)]
        found += [
            row(case, name, "throughput", "GB/s", [rate / 1e9 for rate in rates], limit_ratios=shares),
            row(case, name, "usable_s", "s", [one.seconds for one in samples]),
        ]
    found.append(row(case, "disk", "overlap", "share", [overlap(one.parts) for one in loads["disk"]]))
    return found + [row(case, f"limit ({name})", "throughput", "GB/s", [one / 1e9 for one in rates])
                    for name, rates in limits.items()]  # fmt: skip


def verdicts(case: str, nbytes: int, loads: dict[str, list[Timed]], limits: dict[str, list[float]]) -> list[str]:
    found = []
    for name, least in (("direct", DIRECT), ("bounce", BOUNCE), ("disk", DISK)):
        limit = limits["disk" if name == "disk" else "device"]
        shares = [nbytes / one.seconds / most for one, most in zip(loads.get(name, ()), limit, strict=False)]
        found.append(at_least(f"{case} {name} over the limit", shares, least) if shares else f"{case} {name}: MISSING")
    return found


# --- measuring ---


class Begun(NamedTuple):
    """A part whose copy was begun `at` a time; `ended`: when that was known to have ended, then when it was asked."""

    part: Landed
    direct: bool
    at: float
    ended: list[float]


class Noted:
    """A way whose parts are noted, with `Part`'s times on the clock."""

    def __init__(self, window: Range, device: torch.device) -> None:
        self._way: Way = ByCuda(window, device) if device.type == "cuda" else ByCpu(window)
        self.pins = self._way.pins
        self.begun: list[Begun] = []
        self.register, self.unregister = self._way.register, self._way.unregister

    def begin(self, part: Landed, copies: Sequence[Copy], arena: torch.Tensor, direct: bool) -> Arrival:
        ended: list[float] = []
        self.begun.append(Begun(part, direct, time.perf_counter(), ended))
        return Watched(self._way.begin(part, copies, arena, direct), ended)


class Watched:
    """An arrival that notes when it was first known."""

    def __init__(self, arrival: Arrival, ended: list[float]) -> None:
        self._arrival = arrival
        self._ended = ended

    def query(self) -> bool:
        return self._arrival.query() and self._note()

    def synchronize(self) -> None:
        self._arrival.synchronize()
        self._note()

    def _note(self) -> bool:
        self._ended.append(time.perf_counter())
        return True


class Road:
    """A node's loader with a pool for one checkpoint, and that checkpoint's place on a device."""

    def __init__(self, directory: Path, device: torch.device) -> None:
        self._source = manifest.build(directory)
        self._device = device
        self.nbytes = self._source.file_bytes
        self._pool = Pool(self.nbytes + self.nbytes // 8 + (64 << 20), self._punched)
        self._tier = Tier(self._pool.slots, self._pool.slot_bytes)
        self._reader = Reader(self._pool)
        self._posts: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._pipeline = Pipeline(self._pool, self._tier, self._reader, self._posts.put, ahead=0)
        self._pinned: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        self._plain = self._uploader(math.inf)
        self._quick = self._uploader(0.0)
        self._dests, size = _dests(self._source)
        self._arena = torch.zeros(size, dtype=torch.uint8, device=device)
        self._holder = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for one in (self._plain, self._quick):
            one.close()
        self._pipeline.close()
        self._reader.close()

    def disk(self) -> Timed:
        self._pipeline.forget(self._source.checkpoint)
        drop_caches([file.path for file in self._source.files])
        return self._load(self._plain)

    def bounce(self) -> Timed:
        return self._load(self._plain)

    def direct(self) -> Timed:
        """All of it must be registered.

        Raises:
            RuntimeError: some was not.
        """
        timed = self._load(self._quick)
        way = self._quick.way
        assert isinstance(way, Noted)
        if not all(part.direct for part in way.begun):
            raise RuntimeError("some parts went through buffers")
        return timed

    def register(self) -> str:
        """Has the part of the pool registered that the checkpoint lies in; why that is refused, or ""."""
        if not self._quick.way.pins:
            return "this device needs nothing registered"
        self._load(self._quick)
        while self._quick.pinned.due():
            self._pinned.get()
        self._load(self._quick)  # waits for a registration that is under way
        return self._quick.pinned.refused

    def check(self) -> None:
        """That the arena holds what the files hold.

        Raises:
            RuntimeError: it does not.
        """
        places = {dest.tensor: dest for dest in self._dests}
        for file in self._source.files:
            with file.path.open("rb") as content:
                for entry in (one for one in file.header.tensors if one.nbytes):
                    content.seek(entry.start)
                    head = torch.frombuffer(bytearray(content.read(min(4096, entry.nbytes))), dtype=torch.uint8)
                    at = places[entry.name].offset
                    if not torch.equal(self._arena[at : at + len(head)].cpu(), head):
                        raise RuntimeError(f"{entry.name} did not arrive as it is in {file.path}")

    def _uploader(self, pause: float) -> Uploader:
        way = functools.partial(Noted, device=self._device)
        return Uploader(
            self._pool.fd, self._pool.capacity, way=way, on_pinned=lambda *news: self._pinned.put(news), pause=pause
        )

    def _load(self, uploader: Uploader) -> Timed:
        way = uploader.way
        assert isinstance(way, Noted)
        way.begun.clear()
        self._holder += 1
        landed: dict[tuple[int, int], float] = {}
        over: list[BaseException | None] = []
        started = False
        began = time.perf_counter()

        def told(done: int, total: int) -> None:
            if done == total:
                self._posts.put(lambda: over.append(None))

        def arrived(spans: Sequence[Landed], _: bool) -> None:
            nonlocal started
            now = time.perf_counter()
            landed.update({(span.file, span.offset // self._pool.slot_bytes): now for span in spans})
            upload.add(spans)
            if not started and upload.headers() is not None:
                started = True
                upload.start(self._dests, self._arena)

        upload: Upload = uploader.upload([file.size for file in self._source.files], told)
        load = self._pipeline.load(self._source, self._holder, arrived, over.append)
        load.start()
        while not over:
            self._posts.get()()
        if over[0] is not None:
            raise over[0]
        self._tensors()
        seconds = time.perf_counter() - began
        upload.close()
        self._pipeline.release(self._source.checkpoint, self._holder)
        parts = [
            Part(
                one.part.length,
                landed[one.part.file, one.part.offset // self._pool.slot_bytes] - began,
                one.at - began,
                one.ended[0] - began,
            )
            for one in way.begun
        ]
        return Timed(seconds, parts)

    def _punched(self, offset: int) -> None:
        for one in (self._plain, self._quick):
            one.punched(offset)

    def _tensors(self) -> dict[str, torch.Tensor]:
        entries = {entry.name: entry for file in self._source.files for entry in file.header.tensors}
        return {
            one.tensor: self._arena[one.offset : one.offset + one.stop]
            .view(TORCH_DTYPES[entries[one.tensor].dtype])
            .view(entries[one.tensor].shape)
            for one in self._dests
        }


def _dests(source: manifest.Manifest) -> tuple[list[Dest], int]:
    """Every tensor whole, one after another; and the arena's bytes."""
    found, at = [], 0
    for entry in (entry for file in source.files for entry in file.header.tensors):
        if entry.nbytes:
            found.append(Dest(entry.name, 0, entry.nbytes, at))
            at += -(-entry.nbytes // ALIGNMENT) * ALIGNMENT
    return found, at


def measure(
    directory: Path, device: torch.device, rounds: int
) -> tuple[dict[str, list[Timed]], dict[str, list[float]]]:
    """Loads by way, and the limits in bytes per second; every round has one of each."""
    reader = RawReader(checkpoints.weight_files(directory))
    disk = disk_limit(reader, max(checkpoints.weight_files(directory), key=lambda path: path.stat().st_size))
    loads: dict[str, list[Timed]] = {"disk": [], "bounce": [], "direct": []}
    limits: dict[str, list[float]] = {"disk": [], "device": []}
    with Road(directory, device) as road:
        road.bounce()  # takes the pool's memory
        for _ in range(rounds):
            limits["disk"].append(reader.rate(disk.setting) * disk.handicap)
            limits["device"].append(upload_rate(str(device)) if device.type == "cuda" else memcpy_rate())
            loads["disk"].append(road.disk())
            loads["bounce"].append(road.bounce())
            if refused := road.register():
                print(f"nothing goes straight: {refused}", flush=True)
            else:
                loads["direct"].append(road.direct())
            road.check()
    reader.close()
    return {name: found for name, found in loads.items() if found}, limits


def measure_library(
    directory: Path, device: torch.device, rounds: int, evict: Callable[[Sequence[Path]], object] = drop_caches
) -> dict[str, list[float]]:
    """Seconds of each load from disk, by what reads; every round has one of each."""
    ways = {"library": "mmap"}
    if device.type == "cuda" and importlib.util.find_spec("kvikio"):
        ways["library (gds)"] = library.GDS
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, backend in ways.items():
            evict(checkpoints.weight_files(directory))
            began = time.perf_counter()
            tensors = library.load_checkpoint(directory, str(device), backend=backend)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - began
            del tensors
            if number:  # the first one begins CUDA, cuFile and threads
                found[name].append(seconds)
    return found


def library_rows(case: str, nbytes: int, loads: dict[str, list[float]]) -> list[dict[str, Any]]:
    found = []
    for name, seconds in loads.items():
        faster = [plain / one for plain, one in zip(loads["library"], seconds, strict=True)]
        rates = [nbytes / one / 1e9 for one in seconds]
        peer = None if name == "library" else "library"
        found.append(row(case, name, "throughput", "GB/s", rates, peer_ratios=faster if peer else (), best_peer=peer))
    return found


def room(folder: Path, device: torch.device) -> int:
    """Bytes of a checkpoint that disk, memory and device have room for."""
    folder.mkdir(parents=True, exist_ok=True)
    places = [shutil.disk_usage(folder).free, available_memory() * 3 // 4]
    places.append(torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory() // 3)
    return int(SHARE * min(places))


def run(
    name: str, folder: Path, rounds: int, given: Sequence[tuple[str, int]] = ()
) -> Iterator[tuple[list[dict[str, Any]], list[str], dict[str, Any]]]:
    """Rows, verdicts and timelines of each shape that fits, the larger ones with as many layers as do; or of those
    that are given with their layers.
    """
    device = torch.device("cuda:0" if name == "cuda" else name)
    for shape, known in given or [(one, 0) for one in SHAPES]:
        fits, layers = (True, known) if known else fitting(shape, room(folder, device))
        if not fits:
            print(f"{shape}: there is no room for a layer of it", flush=True)
            continue
        case = f"device-{shape}" + (f"-{layers}l" if layers else "")
        shards = -(-nbytes_of(shape, layers) // SHARD)
        directory = checkpoints.checkpoint(folder, shape, layers, shards)
        loads, limits = measure(directory, device, rounds)
        nbytes = sum(path.stat().st_size for path in checkpoints.weight_files(directory))
        timelines = {f"{case}/{name}": samples[-1].parts for name, samples in loads.items()}
        found = rows(case, nbytes, loads, limits)
        if shape in LIBRARY:
            found += library_rows(case, nbytes, measure_library(directory, device, rounds))
        yield found, verdicts(case, nbytes, loads, limits), timelines
