"""What do 1,000 idle streams and a reader that never reads cost the others? Memory of the head, and late tokens.

256 streams get a token each 50 ms; 1,000 more wait for their turn, with heartbeats; one of the 256 stops reading.
A token is late by what lies between it and the one before, above the engine's own 50 ms and its grid of 5 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import uvloop

from bench.checkpoints import default_folder
from bench.common import demand_quiet, quantile, row, write_results
from bench.gateway import close, connections
from bench.gateway_client import Connection, Stream, request
from bench.gateway_subjects import GRID_MS, NAME, PACE, Subject, ours

Samples = dict[tuple[str, str], list[float]]  # (case, metric)
LAST = 2  # seconds after which a waiting stream has its headers
MOST_KIB, MOST_LATE_MS = 1024.0, 1000.0 / PACE


async def visit(subject: Subject, active: int, idle: int, tokens: int, chance: random.Random) -> dict[str, float]:
    """One round with the crowd."""
    opened = await connections(subject, active)
    running = [asyncio.create_task(go(one, tokens, chance)) for one in opened]
    await asyncio.sleep(1.5)
    before = resident(subject)
    crowd = await connections(subject, idle)
    waiting = [asyncio.create_task(go(one, 1, chance)) for one in crowd]
    if idle:
        assert opened[0].transport is not None
        opened[0].transport.pause_reading()
    await asyncio.sleep(2 * LAST)
    after = resident(subject)
    seen = await asyncio.gather(*running[1:])
    stall = opened[0]
    close([stall])
    await asyncio.gather(running[0], return_exceptions=True)
    await asyncio.gather(*waiting)
    close(opened[1:] + crowd)
    late = [1000 * one.worst_gap - 1000 / PACE - GRID_MS for one in seen]
    figures = {"late_ms": max(late), "late_p50_ms": quantile(late, 0.5)}
    return figures | ({"head_kib_per_stream": (after - before) / 1024 / idle} if idle else {})


async def go(one: Connection, tokens: int, chance: random.Random) -> Stream:
    await asyncio.sleep(chance.uniform(0, 1.0))
    return await one.ask(request(NAME, tokens, True, chance))


def resident(subject: Subject) -> int:
    """Bytes of the head alone."""
    held: int = subject.front[0].memory_info().rss
    return held


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--active", type=int, default=256)
    parser.add_argument("--idle", type=int, default=1000)
    parser.add_argument("--checkpoints", type=Path, default=default_folder(), help="where they are kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="one round of 8 and 20 streams")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rounds, active, idle = (1, 8, 20) if arguments.smoke else (arguments.rounds, arguments.active, arguments.idle)
    samples: Samples = defaultdict(list)
    gc.disable()  # a full pass over the crowd's clients takes this process 150 ms, and no token is read meanwhile
    with tempfile.TemporaryDirectory() as scratch, ours(arguments.checkpoints, Path(scratch), active) as subject:
        demand_quiet(arguments.smoke)
        for number in range(rounds):
            for case, crowd in (("alone", 0), ("crowd", idle)):
                chance = random.Random(arguments.seed + number)
                for metric, value in uvloop.run(visit(subject, active, crowd, 200, chance)).items():
                    samples[case, metric].append(value)
                    print(f"round {number + 1}, {case}: {metric} {value:.3g}", flush=True)
    verdicts = judge(samples)
    print("\n".join(verdicts))
    if arguments.json:
        units = {"head_kib_per_stream": "KiB"}
        made = [
            row(case, "ours", metric, units.get(metric, "ms"), values) for (case, metric), values in samples.items()
        ]
        write_results(arguments.json, "gateway_crowd", vars(arguments), made, verdicts=verdicts)
    return 0


def judge(samples: Samples) -> list[str]:
    """The worst of all rounds counts. `late_more_ms`: than alone in the same round, which is the crowd's part."""
    bounds = {"head_kib_per_stream": MOST_KIB, "late_ms": MOST_LATE_MS, "late_more_ms": MOST_LATE_MS}
    late, alone = samples["crowd", "late_ms"], samples["alone", "late_ms"]
    worst = {metric: max(samples["crowd", metric]) for metric in ("head_kib_per_stream", "late_ms")}
    worst["late_more_ms"] = max(one - other for one, other in zip(late, alone, strict=True))
    return [
        f"{metric}: {worst[metric]:.3g}, at most {most:g}: {'met' if worst[metric] <= most else 'MISSED'}"
        for metric, most in bounds.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
