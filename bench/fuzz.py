"""Does the header parser judge as the reference does, whatever comes, and at what worst cost?

Goes on where the result stands: a seed is 10,000 headers, and seeds that have run are not run again. New ways through
the parser join the corpus, `tests/headers.json`, the shortest header of each. Fails, and prints the header, on any
exception but CheckpointError, on a verdict that docs/header.md does not explain, over 1 s of CPU, and over ten times
the header's bytes and 256 KiB.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import sys
import time
import tracemalloc
from base64 import b64decode, b64encode
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from bench.common import RESULTS, ROOT, commit, row, write_results
from serverless_llm.errors import CheckpointError
from serverless_llm.loader import header
from tests import headers

CORPUS = ROOT / "tests" / "headers.json"
BATCH = 10_000  # headers of one seed
WEIGHED = 100  # of them, those whose memory is measured, which is slow
BIG = 1 << 16, 1 << 20  # bytes of the one big header of each seed
LARGEST_KEPT = 256  # bytes of a header in the corpus
PATIENCE = 300.0  # seconds for a batch that takes two or three
SLOW = 1.0
SAVED = 50  # batches between two writings of the result
WORST = ("slowest_s", "memory_ratio", "memory_beyond")
Corpus = dict[str, str]  # by signature, the header in base 64


@dataclass
class Batch:
    """What one seed's headers did."""

    known: dict[str, int]  # by signature, the bytes of its shortest header so far
    new: Corpus = field(default_factory=dict)
    worst: dict[str, float] = field(default_factory=lambda: dict.fromkeys(WORST, 0.0))
    accepted: int = 0
    fault: str = ""

    def judge(self, content: bytes) -> bool:
        """Compares the verdicts; whether the way there was new, and the header short enough to keep."""
        began = time.thread_time()
        mine = headers.ours(content)
        self._note("slowest_s", time.thread_time() - began)
        theirs = headers.reference(content)
        self.accepted += not isinstance(mine, CheckpointError)
        self.fault = self.fault or headers.disagreement(content, mine, theirs)
        way = headers.signature(mine, theirs)
        if len(content) >= self.known.get(way, LARGEST_KEPT):
            return False
        new = way not in self.known
        self.known[way] = len(content)
        self.new[way] = b64encode(content).decode()
        return new

    def weigh(self, content: bytes) -> None:
        tracemalloc.start()
        with contextlib.suppress(CheckpointError):
            header.parse(content, len(content))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        self._note("memory_beyond", (peak - 10 * len(content)) / 1024)
        if len(content) >= BIG[0]:
            self._note("memory_ratio", peak / len(content))
        if peak > 10 * len(content) + headers.ALLOWANCE:
            self.fault = self.fault or f"{peak} bytes for {len(content)} of {content[:200]!r}"

    def _note(self, name: str, figure: float) -> None:
        self.worst[name] = max(self.worst[name], figure)


def batch(seed: int, known: Corpus) -> Batch:
    """A seed's headers: mutants of the corpus, generated ones, and a big one."""
    rng = random.Random(seed)
    bases = [b64decode(one) for one in known.values()]
    done = Batch({way: len(base) for way, base in zip(known, bases, strict=True)})
    bases += [headers.generated(rng) for _ in bases]  # most of the corpus is bad
    for turn in range(BATCH):
        if turn == 0:
            content = headers.big(rng, rng.randint(*BIG))
        else:
            content = headers.generated(rng) if turn % 3 == 0 else headers.mutant(rng, rng.choice(bases))
        try:
            if done.judge(content):
                bases.append(content)
            if turn % (BATCH // WEIGHED) == 0:
                done.weigh(content)
        except BaseException as error:
            error.add_note(f"seed {seed}: {content[:2000]!r}")
            raise
    if done.worst["slowest_s"] > SLOW:
        done.fault = done.fault or f"seed {seed}: a header took {done.worst['slowest_s']:.1f} s"
    return done


def run(seeds: Iterator[int], known: Corpus, processes: int) -> Iterator[Batch]:
    """Batches as they end; each starts from the corpus as it is then."""
    context = multiprocessing.get_context("fork")
    with context.Pool(processes, os.nice, (10,)) as pool:
        running = [pool.apply_async(batch, (seed, known)) for seed in islice(seeds, processes)]
        while running:
            done = running.pop(0).get(PATIENCE)
            known |= done.new
            yield done
            running += [pool.apply_async(batch, (seed, known)) for seed in islice(seeds, 1)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executions", type=int, default=10_000_000, help="in all, those of earlier calls among them")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no further batch after them")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--result", type=Path, default=RESULTS / "fuzz.json")
    parser.add_argument("--corpus", type=Path, default=CORPUS)
    arguments = parser.parse_args()
    arguments.commit = commit()  # before the corpus, which is a tracked file, grows
    before: dict[str, Any] = json.loads(arguments.result.read_text()) if arguments.result.exists() else {}
    state = before.get("state", {"seeds": 0, "accepted": 0, "faults": 0, "worst": dict.fromkeys(WORST, 0.0)})
    known: Corpus = json.loads(arguments.corpus.read_text())
    deadline = time.monotonic() + arguments.seconds
    first, last = state["seeds"], -(-arguments.executions // BATCH)
    seeds = (seed for seed in range(first, last) if time.monotonic() < deadline)
    faults = []
    for done in run(seeds, known, arguments.processes):
        count(state, done)
        faults += [done.fault] if done.fault else []
        print(f"{state['seeds'] * BATCH:,} headers, {len(known)} in the corpus, {len(faults)} faults", flush=True)
        if state["seeds"] % SAVED == 0:
            save(arguments, state, known)
    if state["seeds"] > first:
        save(arguments, state, known)
    else:
        print(f"{first * BATCH:,} headers have run; --executions asks for more")
    print(*faults, sep="\n", file=sys.stderr)
    return 1 if faults else 0


def count(state: dict[str, Any], done: Batch) -> None:
    state["seeds"] += 1
    state["accepted"] += done.accepted
    state["faults"] += bool(done.fault)
    state["worst"] = {name: max(state["worst"][name], done.worst[name]) for name in WORST}


def save(arguments: argparse.Namespace, state: dict[str, Any], known: Corpus) -> None:
    arguments.corpus.write_text(json.dumps(dict(sorted(known.items())), indent=0) + "\n")
    options = {"executions": arguments.executions, "processes": arguments.processes}
    told = {"state": state, "commit": arguments.commit}
    write_results(arguments.result, "fuzz", options, rows(state, len(known)), **told)


def rows(state: dict[str, Any], corpus: int) -> list[dict[str, Any]]:
    figures = [
        ("executions", "count", state["seeds"] * BATCH),
        ("accepted", "count", state["accepted"]),
        ("corpus", "count", corpus),
        ("faults", "count", state["faults"]),
        ("slowest", "ms", 1000 * state["worst"]["slowest_s"]),
        ("memory, from 64 KiB", "x header", state["worst"]["memory_ratio"]),
        ("memory beyond 10 x header", "KiB", max(0.0, state["worst"]["memory_beyond"])),
    ]
    spread = {"p10": None, "p90": None, "p99": None}  # each is one count, or one extreme
    return [row("headers", "ours", metric, unit, [figure]) | spread for metric, unit, figure in figures]


if __name__ == "__main__":
    sys.exit(main())
