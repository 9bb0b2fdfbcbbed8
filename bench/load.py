"""How fast do weights move, against the link's limit and the loaders that others use?

Cold (page cache empty, and proven so) and warm (all files in it), each round in shuffled order, every load after fresh
memory was taken from the host and given back. `ours-service`: a running server, its pool resident; from the order to
the replica that could serve. `ours-library` and the peers: a fresh process each, with everything that it does after
`import torch`, and every page of every tensor summed. The limit, measured in every round: cold, the raw reader; warm,
a memcpy on all cores.

DRAM (1, 4 and 12 GB): the checkpoint is in the pool; what is left is to map it and the first forward. Contend: a load
that a request waits for, beside a prefetch. Beside-decode, in copy mode: a load while a resident model streams.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench import checkpoints, load_pages
from bench.cold_start import draw_prompts
from bench.cold_subjects import Ours, WrongTier
from bench.common import FEWEST_ROUNDS, MOST_ROUNDS, demand_quiet, precise, row, write_results
from bench.limits import RawReader, disk_limit, memcpy_rate
from bench.load_busy import BUSY
from bench.load_ring import POOL, ring
from bench.load_subjects import CASES, LAZY, PEERS, SUBJECTS, Sample, Service, Subject, subject, write_tensorizer
from bench.peers import PeerMissing
from bench.verdicts import at_least, at_most

SHAPE, LAYERS, SHARDS = "llama-3.1-8b", 5, 4  # 4.3 GB
DRAM = {"dram-1g": ("llama-3.2-1b", 4, 1), "dram-4g": (SHAPE, LAYERS, SHARDS), "dram-12g": (SHAPE, 23, 8)}
ALL = (*CASES, "ring", *DRAM, *BUSY)
ON_DEVICE = ("fill", "beside-decode")
SMOKE_POOL = 16 << 20  # smaller than the tiny model
TRIES = 3  # of a load whose bytes came from elsewhere
BYTES, IDLE = 1.001, 0.02  # at most: bytes read over bytes needed, and the share of the time without a request
MAP_MS, FIRST = 10.0, 1.1


Part = tuple[list[dict[str, Any]], list[str], dict[str, Any]]  # rows, verdicts, what else the result keeps


class Key(NamedTuple):
    case: str
    subject: str


@dataclass(frozen=True, slots=True)
class Round:
    """`limits`: bytes per second by case."""

    limits: dict[str, float]
    samples: dict[Key, Sample]


# --- pure: from rounds to rows and verdicts ---


def limit_ratios(rounds: Sequence[Round], key: Key, nbytes: int) -> list[float]:
    return [nbytes / one.samples[key].seconds / one.limits[key.case] for one in rounds]


def ratios(rounds: Sequence[Round], key: Key, peer: str, what: str = "seconds") -> list[float]:
    """Per round, how much more the peer took: above 1, the subject is the better one."""
    other = Key(key.case, peer)
    return [getattr(one.samples[other], what) / getattr(one.samples[key], what) for one in rounds]


def best_peer(rounds: Sequence[Round], case: str) -> str | None:
    """The one with the lowest median time. Warm, not one that only maps the page cache: it moves no byte."""
    passed = LAZY if case == "warm" else ()
    names = [name for name in PEERS if Key(case, name) in rounds[0].samples and name not in passed]
    times = {name: statistics.median(one.samples[Key(case, name)].seconds for one in rounds) for name in names}
    return min(names, key=times.__getitem__, default=None)


def settled(rounds: Sequence[Round], nbytes: int) -> bool:
    """Whether every ratio that will be published is known precisely enough."""
    keys = [key for key in rounds[0].samples if key.subject.startswith("ours")]
    published = [limit_ratios(rounds, key, nbytes) for key in keys if key.case == "cold"]
    for key in keys:
        peer = best_peer(rounds, key.case)
        published += [ratios(rounds, key, peer)] if peer else []
    return all(precise(one) for one in published)


def rows(rounds: Sequence[Round], nbytes: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for key in sorted(rounds[0].samples):
        found += subject_rows(rounds, key, nbytes)
    for case in rounds[0].limits:
        found.append(row(case, "limit", "throughput", "GB/s", [one.limits[case] / 1e9 for one in rounds]))
    return found


def subject_rows(rounds: Sequence[Round], key: Key, nbytes: int) -> list[dict[str, Any]]:
    samples = [one.samples[key] for one in rounds]
    peer = best_peer(rounds, key.case) if key.subject.startswith("ours") else None
    faster = ratios(rounds, key, peer) if peer else []
    leaner = ratios(rounds, key, peer, "cpu_s") if peer else []
    rates = [nbytes / sample.seconds / 1e9 for sample in samples]
    shares = limit_ratios(rounds, key, nbytes)
    found = [
        row(*key, "throughput", "GB/s", rates, limit_ratios=shares, peer_ratios=faster, best_peer=peer),
        row(*key, "cpu_s", "s", [sample.cpu_s for sample in samples], peer_ratios=leaner, best_peer=peer),
        row(*key, "peak_rss_mib", "MiB", [sample.peak_rss_mib for sample in samples]),
        row(*key, "minor_faults", "count", [sample.faults for sample in samples]),
        row(*key, "read_ratio", "x", [sample.storage / nbytes for sample in samples]),
    ]
    if key == Key("cold", "ours-service"):
        idle = [sample.idle for sample in samples if sample.idle is not None]
        found += [row(*key, "queue_empty", "share", idle)] if idle else []
    return found


def prefault_rows(first: Sample) -> list[dict[str, Any]]:
    """The load that took the pool's memory: what a resident pool costs once."""
    return [
        row("cold", "ours-service (first)", "cpu_s", "s", [first.cpu_s]),
        row("cold", "ours-service (first)", "seconds", "s", [first.seconds]),
        row("cold", "ours-service (first)", "peak_rss_mib", "MiB", [first.peak_rss_mib]),
    ]


def verdicts(rounds: Sequence[Round], nbytes: int) -> list[str]:
    """What is promised, what was measured."""
    found = []
    for key in sorted(rounds[0].samples):
        peer = best_peer(rounds, key.case)
        if not key.subject.startswith("ours") or peer is None:
            continue
        service = key.subject == "ours-service"
        if key.case == "cold" and service:
            found.append(at_least(f"{_name(key)} over the limit", limit_ratios(rounds, key, nbytes), 0.97))
        found.append(at_least(f"{_name(key)} over {peer}", ratios(rounds, key, peer), 1.0))
        if key.case == "cold":
            leaner = ratios(rounds, key, peer, "cpu_s")
            found.append(at_least(f"CPU of {peer} over {_name(key)}", leaner, 2.0 if service else 1.0))
        if key == Key("cold", "ours-service"):
            samples = [one.samples[key] for one in rounds]
            found.append(at_most("bytes read over needed", [sample.storage / nbytes for sample in samples], BYTES))
            idle = [sample.idle for sample in samples if sample.idle is not None]
            found += [at_most("share of the time with no request", idle, IDLE)] if idle else []
    return found


def _name(key: Key) -> str:
    return f"{key.case} {key.subject.removeprefix('ours-')}"


# --- measuring: cold and warm ---


def measure(arguments: argparse.Namespace, directory: Path, cases: Sequence[str]) -> tuple[list[Round], Sample | None]:
    """Rounds until all is precise, or as many as allowed; and the server's first load."""
    rng = random.Random(arguments.seed)
    reader = RawReader(checkpoints.weight_files(directory))
    disk = disk_limit(reader, max(checkpoints.weight_files(directory), key=lambda path: path.stat().st_size))
    limits: dict[str, Callable[[], float]] = {
        "cold": lambda: reader.rate(disk.setting) * disk.handicap,
        "warm": lambda: max(memcpy_rate(threads) for threads in (1, 2)),
    }
    fewest, most = (2, 2) if arguments.smoke else (min(FEWEST_ROUNDS, arguments.rounds), arguments.rounds)
    done: list[Round] = []
    with contextlib.ExitStack() as stack:
        subjects = [stack.enter_context(one) for one in chosen(arguments, directory)]
        while len(done) < most and not (len(done) >= fewest and settled(done, reader.nbytes)):
            samples: dict[Key, Sample] = {}
            for one in rng.sample(subjects, len(subjects)):
                samples |= {Key(case, one.name): _sample(one, case) for case in cases}
            done.append(Round({case: limits[case]() for case in cases}, samples))
            shown = (f"{'/'.join(key)} {reader.nbytes / one.seconds / 1e9:.2f}" for key, one in sorted(samples.items()))
            rates = ", ".join(f"{case} {rate / 1e9:.2f}" for case, rate in done[-1].limits.items())
            print(f"round {len(done)}: GB/s: limits {rates}; {', '.join(shown)}", flush=True)
        service = next((one for one in subjects if isinstance(one, Service)), None)
    reader.close()
    return done, service.prefault if service else None


def _sample(one: Subject, case: str) -> Sample:
    for left in reversed(range(TRIES)):
        try:
            return one.sample(case)
        except WrongTier as error:
            print(f"{one.name}: {error}; {left} tries left", file=sys.stderr, flush=True)
    sys.exit(f"{one.name} could not be loaded {case}")


def chosen(arguments: argparse.Namespace, directory: Path) -> list[Subject]:
    """The subjects asked for. A smoke run goes without a peer that is not installed, any other fails."""
    found: list[Subject] = []
    for name in arguments.subjects:
        try:
            found.append(subject(name, directory))
            if name == "tensorizer":
                write_tensorizer(directory)
        except PeerMissing as error:
            if not arguments.smoke:
                sys.exit(str(error))
            print(error, file=sys.stderr)
    return found


def page_rows(directory: Path, nbytes: int) -> list[dict[str, Any]]:
    reader = RawReader(checkpoints.weight_files(directory))
    setting = disk_limit(reader, checkpoints.weight_files(directory)[0]).setting
    found = load_pages.measure(directory, nbytes, lambda: reader.rate(setting), FEWEST_ROUNDS)
    reader.close()
    return found


def through_ring(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    shape, layers, shards = smoke_shape() if arguments.smoke else (SHAPE, LAYERS, SHARDS)
    directory = checkpoints.checkpoint(arguments.checkpoints, shape, layers, shards)
    files = checkpoints.weight_files(directory)
    reader = RawReader(files)
    disk = disk_limit(reader, max(files, key=lambda path: path.stat().st_size))
    rounds, pool = (2, SMOKE_POOL) if arguments.smoke else (FEWEST_ROUNDS, POOL)
    found = ring(directory, reader, disk.setting, disk.handicap, rounds, pool)
    reader.close()
    return found


# --- measuring: from DRAM ---


def dram(arguments: argparse.Namespace, case: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Starts of one checkpoint that is in the pool."""
    shape, layers, shards = smoke_shape() if arguments.smoke else DRAM[case]
    directory = checkpoints.checkpoint(arguments.checkpoints, shape, layers, shards)
    rng = random.Random(arguments.seed)
    with Ours(directory, "cpu", "view") as ours:
        found = [ours.sample("dram", draw_prompts(rng)) for _ in range(2 if arguments.smoke else FEWEST_ROUNDS)]
    mapping, first = [one.upload or 0.0 for one in found], [one.first / one.warm for one in found]
    faults = [one.faults or 0 for one in found]
    name = (case, "ours-service")
    lines = [
        at_most(f"{case} mapping in ms", mapping, MAP_MS),
        at_most(f"{case} first forward over warm", first, FIRST),
    ]
    return [
        row(*name, "map_ms", "ms", mapping),
        row(*name, "first_forward_ratio", "x", first),
        row(*name, "warm_forward_ms", "ms", [one.warm for one in found]),
        row(*name, "minor_faults", "count", faults),
    ], lines


def smoke_shape() -> tuple[str, int, int]:
    return checkpoints.SMOKE_SHAPE, checkpoints.SMOKE_LAYERS, 2


def busy_shapes(case: str, smoke: bool) -> list[tuple[str, int, int]]:
    """What is prefetched and what is asked for; or what streams and what is loaded."""
    if smoke:
        return [smoke_shape(), (checkpoints.SMOKE_SHAPE, 1, 1)]
    return [DRAM["dram-4g"], DRAM["dram-1g"]] if case == "contend" else [DRAM["dram-1g"], DRAM["dram-4g"]]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=(*ALL, "fill"), help="default: all that the device has")
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--checkpoints", type=Path, default=checkpoints.default_folder(), help="where they are kept")
    parser.add_argument("--rounds", type=int, default=MOST_ROUNDS, help="at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pages", action="store_true", help="a row for each kind of pool pages, set up on the machine")
    parser.add_argument("--device", help=f"cuda: {' and '.join(ON_DEVICE)} on a GPU (fill: from disk and from DRAM)")
    parser.add_argument("--smoke", action="store_true", help="two rounds with a tiny model")
    parser.add_argument("--json", type=Path)
    found = parser.parse_args()
    found.cases = found.cases or list(ON_DEVICE if found.device else ALL)
    return found


def main() -> int:
    arguments = parse()
    demand_quiet(arguments.smoke)
    found: list[dict[str, Any]] = []
    judged: list[str] = []
    extra: dict[str, Any] = {}
    for entries, lines, more in on_device(arguments) if arguments.device else on_cpu(arguments):
        found, judged, extra = found + entries, judged + lines, extra | more
        show(entries, lines)
        if arguments.json:  # what is known: the rest may take an hour
            write_results(arguments.json, "load", vars(arguments), found, verdicts=judged, **extra)
    return 0


def on_cpu(arguments: argparse.Namespace) -> Iterator[Part]:
    if cases := [case for case in arguments.cases if case in CASES]:
        shape, layers, shards = smoke_shape() if arguments.smoke else (SHAPE, LAYERS, SHARDS)
        directory = checkpoints.checkpoint(arguments.checkpoints, shape, layers, shards)
        nbytes = sum(path.stat().st_size for path in checkpoints.weight_files(directory))
        rounds, first = measure(arguments, directory, cases)
        found = rows(rounds, nbytes) + (prefault_rows(first) if first else [])
        yield found, verdicts(rounds, nbytes), {"bytes": nbytes, "rounds": [as_json(one) for one in rounds]}
        if arguments.pages:
            yield page_rows(directory, nbytes), [], {}
    if "ring" in arguments.cases:
        yield *through_ring(arguments), {}
    for case in [case for case in arguments.cases if case in DRAM][: 1 if arguments.smoke else None]:
        yield *dram(arguments, case), {}
    for case in [case for case in arguments.cases if case in BUSY]:
        yield *busy(arguments, case), {}


def busy(arguments: argparse.Namespace, case: str) -> tuple[list[dict[str, Any]], list[str]]:
    shapes = busy_shapes(case, arguments.smoke)
    one, other = (checkpoints.checkpoint(arguments.checkpoints, *shape) for shape in shapes)
    rounds = 1 if arguments.smoke else min(FEWEST_ROUNDS, arguments.rounds)
    return BUSY[case](one, other, rounds, arguments.device or "cpu")


def on_device(arguments: argparse.Namespace) -> Iterator[Part]:
    """Shape by shape; then a load beside a stream."""
    from bench import load_device

    timelines: dict[str, Any] = {}
    shapes = [(checkpoints.SMOKE_SHAPE, checkpoints.SMOKE_LAYERS)] if arguments.smoke else []
    rounds = 2 if arguments.smoke else min(load_device.ROUNDS, arguments.rounds)
    if "fill" in arguments.cases:
        for entries, lines, parts in load_device.run(arguments.device, arguments.checkpoints, rounds, shapes):
            timelines |= parts
            yield entries, lines, {"timelines": timelines}
    if "beside-decode" in arguments.cases:
        yield *busy(arguments, "beside-decode"), {}


def show(found: Sequence[dict[str, Any]], judged: Sequence[str]) -> None:
    for entry in found:
        limit = "" if entry["ratio_to_limit"] is None else f"{entry['ratio_to_limit']:.2f} of the limit"
        print(f"{entry['case']:8} {entry['subject']:22} {entry['metric']:20} {entry['median']:10.2f} {limit}")
    print(*judged, sep="\n", flush=True)


def as_json(one: Round) -> dict[str, Any]:
    """Every sample, so that other statistics can be drawn from a result."""
    return {"limits": one.limits} | {"/".join(key): asdict(sample) for key, sample in one.samples.items()}


if __name__ == "__main__":
    sys.exit(main())
