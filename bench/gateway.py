"""What does the way from a client to the engine and back cost? Added latency, CPU per streamed token, requests/s.

Only the forward pass is replaced: head, agent, worker, a tokenizer of 150,000 tokens, token log, metrics and SSE are
real. Each stream has its first token at once and 20 a second after that; arrivals are spread. Beside it, in turn, a
FastAPI proxy on uvicorn and LiteLLM's proxy, which pass a made-up upstream's stream on, and tokenise nothing.

Time to the first token is what a client sees, from the request sent to the first text. Added latency is that without
what is not the subject's: for ours the client's own way to send and to wake up, seen at a server that answers unread
(`floor`), and the engine's step that made the first token, as the worker times it; for a proxy all that the client sees
of its upstream. CPU is that of the front (for us the head and its text processes), and of all before the worker.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvloop

from bench.checkpoints import default_folder
from bench.common import demand_quiet, row, write_results
from bench.gateway_client import Connection, Stream, connect, request
from bench.gateway_subjects import NAME, PACE, SHORT, Subject, start

Samples = dict[tuple[str, str, str], list[float]]  # (case, subject, metric)
SUBJECTS = ("ours", "fastapi-proxy", "litellm")
LONG = 100  # tokens of one answer while many streams run
TARGETS = {
    ("streams=1", "latency_added_ms"): 1.0,
    ("streams=16", "latency_added_ms"): 1.0,
    ("streams=64", "cpu_us_per_token"): 60.0,
    ("streams=256", "cpu_us_per_token"): 60.0,
    ("streams=64", "head_cpu_us_per_token"): 40.0,
    ("streams=256", "head_cpu_us_per_token"): 40.0,
}


async def connections(subject: Subject, count: int) -> list[Connection]:
    place = urlsplit(subject.url)
    assert place.hostname is not None and place.port is not None
    return [await connect(place.hostname, place.port) for _ in range(count)]


def close(opened: list[Connection]) -> None:
    for one in opened:
        assert one.transport is not None
        one.transport.close()


async def latencies(subject: Subject, streams: int, seconds: float, chance: random.Random) -> list[float]:
    """Milliseconds to the first text: each connection asks again and again, at moments of its own."""
    opened = await connections(subject, streams)
    until = time.perf_counter() + seconds
    seen: list[Stream] = []

    async def go(one: Connection) -> None:
        await asyncio.sleep(chance.uniform(0, SHORT / PACE))
        while time.perf_counter() < until:
            seen.append(await one.ask(request(NAME, SHORT, True, chance)))
            await asyncio.sleep(chance.uniform(0, 1 / PACE))

    await asyncio.gather(*(go(one) for one in opened))
    close(opened)
    return [1000 * one.ttft for one in seen]


async def crowd(subject: Subject, streams: int, tokens: int, chance: random.Random) -> tuple[float, float, list[float]]:
    """Microseconds of CPU per token of the front and of all, and milliseconds to each first text."""
    opened = await connections(subject, streams)

    async def go(one: Connection) -> Stream:
        await asyncio.sleep(chance.uniform(0, 1.0))
        return await one.ask(request(NAME, tokens, True, chance))

    before = subject.cpu_seconds()
    seen = await asyncio.gather(*(go(one) for one in opened))
    await asyncio.sleep(0.1)
    front, every = (
        1e6 * (now - then) / (streams * tokens) for now, then in zip(subject.cpu_seconds(), before, strict=True)
    )
    close(opened)
    return front, every, [1000 * one.ttft for one in seen]


async def rate(subject: Subject, seconds: float, chance: random.Random) -> float:
    """Answers per second of 16 connections that ask for one token, not streamed, one after the other."""
    opened = await connections(subject, 16)
    began = time.perf_counter()
    answers = 0

    async def go(one: Connection) -> None:
        nonlocal answers
        while time.perf_counter() < began + seconds:
            await one.ask(request(NAME, 1, False, chance), streaming=False)
            answers += 1

    await asyncio.gather(*(go(one) for one in opened))
    close(opened)
    return answers / (time.perf_counter() - began)


async def visit(
    subject: Subject, sizes: list[int], tokens: int, seconds: float, seed: int
) -> dict[str, dict[str, float]]:
    """One round's figures of one subject: case -> metric -> value."""
    chance = random.Random(seed)
    figures: dict[str, dict[str, float]] = {}
    for streams in sizes:
        figures[f"streams={streams}"] = case = {}
        subject.engine_seconds()
        if streams <= 16:
            case["ttft_ms"] = statistics.median(await latencies(subject, streams, seconds, chance))
        elif subject.front:
            front, every, times = await crowd(subject, streams, tokens, chance)
            case |= {"head_cpu_us_per_token": front, "cpu_us_per_token": every, "ttft_ms": statistics.median(times)}
        if steps := subject.engine_seconds():
            case["engine_ms"] = 1000 * statistics.median(steps)
    if subject.front:
        figures["short calls"] = {"requests_per_s": await rate(subject, seconds, chance)}
    return figures


def note(samples: Samples, subjects: dict[str, Subject], seen: dict[str, dict[str, dict[str, float]]]) -> None:
    """Adds one round."""
    for name in subjects.keys() - {"floor", "upstream"}:
        for case, metrics in seen[name].items():
            for metric, value in metrics.items():
                samples[case, name, metric].append(value)
                behind = seen["floor" if name == "ours" else "upstream"].get(case, {})
                if metric == "ttft_ms" and metric in behind:
                    own = behind[metric] + metrics.get("engine_ms", 0.0)
                    samples[case, name, "latency_added_ms"].append(value - own)


UNITS = {"ttft_ms": "ms", "latency_added_ms": "ms", "engine_ms": "ms", "requests_per_s": "1/s"}


def rows(samples: Samples) -> list[dict[str, Any]]:
    made = []
    for (case, name, metric), values in sorted(samples.items()):
        extra: dict[str, Any] = {}
        peers = {peer: seen for (c, peer, m), seen in samples.items() if (c, m) == (case, metric) and peer != "ours"}
        if name == "ours" and peers:
            higher = metric == "requests_per_s"
            best = (max if higher else min)(peers, key=lambda peer: statistics.median(peers[peer]))
            pairs = zip(values, peers[best], strict=True)
            extra = {"peer_ratios": [a / b if higher else b / a for a, b in pairs], "best_peer": best}
        made.append(row(case, name, metric, UNITS.get(metric, "us"), values, **extra))
    return made


def judge(samples: Samples) -> list[str]:
    verdicts = []
    for (case, metric), most in TARGETS.items():
        if values := samples.get((case, "ours", metric)):
            value = statistics.median(values)
            verdicts.append(f"{case} {metric}: {value:.3g}, at most {most:g}: {'met' if value <= most else 'MISSED'}")
    return verdicts


def measure(subjects: dict[str, Subject], arguments: argparse.Namespace, say: Callable[[str], None]) -> Samples:
    samples: Samples = defaultdict(list)
    sizes, tokens, seconds = ([1, 16], 4, 0.3) if arguments.smoke else ([1, 16, 64, 256], LONG, 4.0)
    sizes = arguments.streams or sizes
    names = list(subjects)
    began = time.monotonic()
    for number in range(2 if arguments.smoke else arguments.rounds):
        if time.monotonic() - began > 60 * arguments.minutes:
            break
        shift = number % len(names)
        seen = {}
        for name in names[shift:] + names[:shift]:
            seed = arguments.seed + number
            seen[name] = uvloop.run(visit(subjects[name], sizes, tokens, seconds, seed))
        note(samples, subjects, seen)
        say(f"round {number + 1}: " + "; ".join(f"{name} {summary(seen[name])}" for name in names))
    return samples


def summary(figures: dict[str, dict[str, float]]) -> str:
    return ", ".join(f"{case} {metric} {value:.3g}" for case, seen in figures.items() for metric, value in seen.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--streams", nargs="+", type=int, help="default: 1 16 64 256")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--minutes", type=float, default=60.0, help="start no round after these")
    parser.add_argument("--checkpoints", type=Path, default=default_folder(), help="where they are kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="two tiny rounds of ours")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    names = ["ours"] if arguments.smoke else arguments.subjects
    demand_quiet(arguments.smoke)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        subjects = start(stack, names, arguments.checkpoints, scratch, 256)
        demand_quiet(arguments.smoke)
        samples = measure(subjects, arguments, lambda line: print(line, flush=True))
    for line in judge(samples):
        print(line)
    if arguments.json:
        write_results(arguments.json, "gateway", vars(arguments), rows(samples), verdicts=judge(samples))
    return 0


if __name__ == "__main__":
    sys.exit(main())
