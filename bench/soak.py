"""Does every accepted request end once, with the undisturbed tokens, while workers, agents and heads are killed?

A storm is a list of segments. Each starts a server of its own, records what every request answers undisturbed,
then keeps `STREAMS` streams running while it kills -9 workers and agents in a wanted phase (load, prefill, decode,
or whatever is there), and at times the head. At the end nothing may be lost, doubled, different or leaked.
A device on trial is spared: a request whose worker dies in its trial is guilty by design.
Segments are seeded and independent: `--json FILE` skips those already in FILE, so that a storm resumes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from bench.common import write_results
from serverless_llm.demo import tasks
from tests.serving import Leftovers, Server, until

STREAMS = 10
KILLS = 25  # a segment's
MODELS = ("count-a", "count-b", "count-c", "add-a")
PHASES = ("load", "prefill", "decode")
DEVICES = {"cpu": ("--nodes", "2", "--devices", "cpu:1"), "cuda": ("--nodes", "1", "--devices", "cuda:1")}
MEMORY = ("--device-memory", "14MiB", "--dram", "32MiB")
LIMITS = ("--limit", "disk=16MB/s", "--limit", "upload=24MB/s")  # so that a load lasts long enough to be hit


@dataclass(frozen=True, slots=True)
class Request:
    model: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Reply:
    text: str
    finish: str
    usage: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Segment:
    seed: int
    weights: str
    kills: int
    head_kills: int


@dataclass(slots=True)
class Tally:
    """What a segment saw. `cut`: streams that ended with their head, as they must."""

    seed: int
    weights: str
    kills: Counter[str] = field(default_factory=Counter)  # "worker decode" ...
    head_kills: int = 0
    ended: int = 0
    cut: int = 0
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    restart_ms: list[float] = field(default_factory=list)
    before: Leftovers | None = None
    after: Leftovers | None = None


class BrokenStream(Exception):
    """The connection ended before the stream's terminal answer."""


def draw_requests(rng: random.Random, count: int) -> list[Request]:
    """Greedy and seeded requests of at least 64 tokens, some of them penalised, some with a prompt long enough to be
    caught in prefill."""
    requests = []
    for number in range(count):
        start = rng.randrange(1, 700)
        sampling = (
            {"temperature": 0} if number % 2 else {"temperature": 0.8, "seed": rng.randrange(2**31), "top_p": 0.9}
        )
        if number % 4 == 0:
            sampling |= {"min_p": 0.01, "frequency_penalty": 0.1, "repetition_penalty": 1.05}
        length = {"max_tokens": rng.randrange(64, 200)}
        if number % 3 == 0:
            words = " ".join(str(term) for term in range(start, start + 180))
            requests.append(Request(rng.choice(MODELS[:3]), {"prompt": words[:700], **sampling, **length}))
        else:
            message = {"role": "user", "content": f"{start} {start + 1} {start + 2}"}
            requests.append(Request(rng.choice(MODELS[:3]), {"messages": [message], **sampling, **length}))
    return requests


async def ask(session: aiohttp.ClientSession, url: str, request: Request) -> Reply:
    """One streamed request, read to its end.

    Raises:
        BrokenStream: no terminal answer, or more than one.
    """
    route = "chat/completions" if "messages" in request.body else "completions"
    body = {"model": request.model, "stream": True, "stream_options": {"include_usage": True}, **request.body}
    text, finishes, usage, done = [], [], None, 0
    async with session.post(f"{url}/v1/{route}", json=body) as answer:
        if answer.status != 200:
            raise BrokenStream(f"{answer.status}: {(await answer.text())[:300]}")
        async for line in answer.content:
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                done += 1
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise BrokenStream(str(event["error"]))
            for choice in event["choices"]:
                text.append(choice.get("text") or choice.get("delta", {}).get("content") or "")
                finishes += [choice["finish_reason"]] if choice["finish_reason"] else []
            usage = event.get("usage") or usage
    if done != 1 or len(finishes) != 1 or usage is None:
        raise BrokenStream(f"{done} ends, finish reasons {finishes}, usage {usage}")
    return Reply("".join(text), finishes[0], (usage["prompt_tokens"], usage["completion_tokens"]))


class Storm:
    """One segment: streams and kills over one server."""

    def __init__(self, segment: Segment, device: str, folder: Path) -> None:
        seed, weights = segment.seed, segment.weights
        self.rng = random.Random(seed)
        self.tally = Tally(seed, weights)
        self.kills, self.head_kills = segment.kills, segment.head_kills
        self.server = Server(folder, *DEVICES[device], *MEMORY, *LIMITS, "--weights", weights, *models())
        self.requests = draw_requests(self.rng, 24)
        self.expected: list[Reply] = []
        self.stopping = False
        self.head_epoch = 0  # odd while the head is down

    async def run(self) -> Tally:
        with self.server:
            async with session() as client:
                for request in self.requests:
                    self.expected.append(await ask(client, self.server.url, request))
            self.tally.before = await asyncio.to_thread(self.settled)
            streams = [asyncio.create_task(self.stream(number)) for number in range(STREAMS)]
            await self.kill_all()
            self.stopping = True
            await asyncio.gather(*streams)
            self.tally.after = await asyncio.to_thread(self.settled)
        return self.tally

    def settled(self) -> Leftovers:
        """Counted once every worker is up and no sequence or load is left."""
        until(lambda: all(quiet(device) for device in self.server.devices()), "the server to be quiet", 60)
        time.sleep(1.0)
        return self.server.leftovers()

    async def stream(self, number: int) -> None:
        rng = random.Random(f"{self.tally.seed}:{number}")
        async with session() as client:
            while not self.stopping:
                index = rng.randrange(len(self.requests))
                epoch = self.head_epoch
                try:
                    reply = await ask(client, self.server.url, self.requests[index])
                except (BrokenStream, aiohttp.ClientError, ConnectionError) as error:
                    await self.broken(index, epoch, error)
                    continue
                self.tally.ended += 1
                if reply != self.expected[index]:
                    self.tally.wrong.append(f"request {index}: {reply} instead of {self.expected[index]}")

    async def broken(self, index: int, epoch: int, error: Exception) -> None:
        """A stream may end early only with its head."""
        if epoch % 2 or epoch != self.head_epoch:
            self.tally.cut += 1
            while self.head_epoch % 2:
                await asyncio.sleep(0.05)
        else:
            self.tally.lost.append(f"request {index}: {type(error).__name__} {error}")

    async def kill_all(self) -> None:
        heads = set(self.rng.sample(range(self.kills), self.head_kills))
        for number in range(self.kills):
            await asyncio.sleep(self.rng.uniform(0.05, 0.4))
            await self.kill_one()
            if number in heads:
                await self.kill_head()

    async def kill_one(self) -> None:
        wanted = min(PHASES, key=lambda phase: (self.seen(phase) + self.rng.random() * 3, phase))
        target = "agent" if self.rng.random() < 0.25 else "worker"
        device, phase = await self.find(wanted)
        pid = device["agent_pid"] if target == "agent" else device["worker_pid"]
        os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        self.tally.kills[f"{target} {phase}"] += 1
        await self.recovered(device, target)
        if target == "worker":
            self.tally.restart_ms.append(1000 * (time.monotonic() - killed))

    def seen(self, phase: str) -> int:
        return sum(count for name, count in self.tally.kills.items() if name.endswith(phase))

    async def find(self, wanted: str) -> tuple[dict[str, Any], str]:
        """A device in the wanted phase; after a while any busy one, then any."""
        begin = time.monotonic()
        while True:
            seen = await asyncio.to_thread(self.server.devices)
            devices = [device for device in seen if device["worker_pid"] and not device["trial"]]
            phases = [(device, phase_of(device)) for device in devices]
            waited = time.monotonic() - begin
            fitting = [
                pair for pair in phases if pair[1] == wanted or (waited > 5 and pair[1] != "idle") or waited > 10
            ]
            if fitting:
                return self.rng.choice(fitting)
            await asyncio.sleep(0.002)

    async def recovered(self, old: dict[str, Any], target: str) -> None:
        key = "agent_pid" if target == "agent" else "worker_pid"

        def again() -> bool:
            now = [device for device in self.server.devices() if device["device"] == old["device"]]
            return bool(now) and now[0]["worker_pid"] not in (0, None, old["worker_pid"]) and now[0][key] != old[key]

        await asyncio.to_thread(until, again, f"{old['device']} to come back", 60.0, 0.005)

    async def kill_head(self) -> None:
        self.head_epoch += 1
        self.server.kill_head()
        await asyncio.to_thread(self.server.start)
        self.tally.head_kills += 1
        self.head_epoch += 1


def session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120), connector=aiohttp.TCPConnector(limit=0))


def models() -> list[str]:
    sources = {"count": tasks.checkpoint_dir("demo-count"), "add": tasks.checkpoint_dir("demo-add")}
    return [part for name in MODELS for part in ("--model", f"{name}={sources[name.split('-')[0]]}")]


def quiet(device: dict[str, Any]) -> bool:
    busy = device["sequences"] or any(replica["state"] != "ready" for replica in device["replicas"])
    return bool(device["worker_pid"]) and not busy


def phase_of(device: dict[str, Any]) -> str:
    if any(replica["state"] == "loading" for replica in device["replicas"]):
        return "load"
    states = {sequence["state"] for sequence in device["sequences"]}
    return "prefill" if "dispatched" in states else "decode" if "running" in states else "idle"


def run_segment(segment: Segment, device: str) -> Tally:
    folder = Path(tempfile.mkdtemp(prefix="serverless-llm-soak-"))
    try:
        return asyncio.run(Storm(segment, device, folder / "state").run())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def faults(tally: Tally) -> list[str]:
    """What must not be, in words; empty when the segment is clean."""
    assert tally.before is not None
    assert tally.after is not None
    before, after = asdict(tally.before), asdict(tally.after)
    grown = [f"{what} grew from {before[what]} to {after[what]}" for what in before if after[what] > before[what]]
    return [*tally.lost, *tally.wrong, *grown]


def plan(seed: int, kills: int, head_kills: int) -> list[Segment]:
    """Segments of about `KILLS` kills, half in copy mode."""
    count = -(-kills // KILLS)
    shares = [(number + 1) * head_kills // count - number * head_kills // count for number in range(count)]
    sizes = [(number + 1) * kills // count - number * kills // count for number in range(count)]
    return [
        Segment(seed + number, "view" if number % 2 else "copy", sizes[number], shares[number])
        for number in range(count)
    ]


def as_json(tally: Tally) -> dict[str, Any]:
    return asdict(tally) | {"kills": dict(tally.kills), "faults": faults(tally)}


def rows(segments: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of evidence.md: one for all kills, one per phase and mode."""
    kills: Counter[str] = sum((Counter(segment["kills"]) for segment in segments), Counter())
    restarts = sorted(ms for segment in segments for ms in segment["restart_ms"])
    figures: dict[str, dict[str, float]] = {
        "all": {
            "kills": sum(kills.values()),
            "busy_kills": sum(count for name, count in kills.items() if not name.endswith("idle")),
            "head_kills": sum(segment["head_kills"] for segment in segments),
            "ended": sum(segment["ended"] for segment in segments),
            "lost_or_doubled": sum(len(segment["lost"]) for segment in segments),
            "wrong_tokens": sum(len(segment["wrong"]) for segment in segments),
            "leaked": sum("grew" in fault for segment in segments for fault in segment["faults"]),
            "worker_back_p50_ms": restarts[len(restarts) // 2] if restarts else 0,
            "worker_back_max_ms": restarts[-1] if restarts else 0,
        }
    }
    for phase in (*PHASES, "idle"):
        figures[phase] = {"kills": sum(count for name, count in kills.items() if name.endswith(phase))}
    for weights in ("view", "copy"):
        of_mode = [segment for segment in segments if segment["weights"] == weights]
        figures[weights] = {"kills": sum(sum(segment["kills"].values()) for segment in of_mode)}
    return [
        {"case": case, "subject": "ours", "metric": metric, "unit": "ms" if metric.endswith("ms") else "count",
         "median": value, "p10": None, "p90": None, "n": len(segments), "ratio_to_limit": None,
         "ratio_to_best_peer": None, "best_peer": None}
        for case, metrics in figures.items()
        for metric, value in metrics.items()
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--head-kills", type=int, default=20)
    parser.add_argument("--smoke", action="store_true", help="three kills, one of them beside a killed head")
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    done = json.loads(arguments.json.read_text())["segments"] if arguments.json and arguments.json.exists() else []
    kills, head_kills = (3, 1) if arguments.smoke else (arguments.kills, arguments.head_kills)
    for segment in plan(arguments.seed, kills, head_kills):
        if any(old["seed"] == segment.seed for old in done):
            continue
        began = time.monotonic()
        done.append(as_json(run_segment(segment, arguments.device)) | {"seconds": round(time.monotonic() - began, 1)})
        print(json.dumps(done[-1], indent=None)[:2000], flush=True)
        if arguments.json:
            write_results(arguments.json, "soak", vars(arguments), rows(done), segments=done)
    for row in rows(done):
        print(f"{row['case']:8} {row['metric']:20} {row['median']:.0f}")
    return 1 if any(segment["faults"] for segment in done) else 0


if __name__ == "__main__":
    sys.exit(main())
