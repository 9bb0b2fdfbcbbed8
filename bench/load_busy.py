"""Loads that are not alone: `contend`, beside a prefetch; `beside-decode`, while a resident model streams."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Self

from tokenizers import Tokenizer

from bench import checkpoints
from bench.cold_subjects import options
from bench.common import drop_caches, quantile, row
from bench.load_subjects import cpu, prepare
from bench.pretouch import TOLD
from bench.verdicts import at_least, at_most
from tests.serving import Server, until

PATIENCE, POLL = 300.0, 0.02
SELDOM = 0.3  # seconds between looks where answering them would slow the steps down that are timed
QUIET = 3.0  # seconds of streaming before a load begins
PAUSE = 3.0  # seconds after which a server has begun to take memory for the next load
LOOK, IDLE = 0.5, 0.04  # seconds, and CPU seconds in them: below, it has all of it
SPARE = 64  # tokens of the context that a stream leaves: its prompt's
CONTEND, ITL, SPEED = 1.1, 1.2, 0.8


class Streamed(NamedTuple):
    """Seconds between tokens, before the load and during it."""

    quiet: list[float]
    during: list[float]


class Busy:
    """A server with one device and two models, `first` and `second`."""

    def __init__(self, first: Path, second: Path, weights: str, device: str) -> None:
        self._sources = {"first": first, "second": second}
        self._files = [path for source in (first, second) for path in checkpoints.weight_files(source)]
        self._scratch = Path(tempfile.mkdtemp(prefix="serverless-llm-busy-"))
        room = sum(path.stat().st_size for path in self._files)
        self._server = Server(self._scratch / "state", *options(device, weights, room))

    def __enter__(self) -> Self:
        self._server.start(120)
        for name in self._sources:
            self._deploy(name)
            self._load(name)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def online(self, prefetch: bool) -> float:
        """Seconds that the second takes from disk when a request asks for it, beside the first's if `prefetch`."""
        self._cool("first", "second")
        if prefetch:
            self._server.put("/admin/models/first/load", {}, "POST")
            until(lambda: any(one["done"] for one in self._replicas()), "some bytes", PATIENCE, POLL)
        body = {"model": "second", "prompt": "abc", "max_tokens": 1}
        metrics: dict[str, Any] = self._server.put("/v1/completions", body, "POST")["metrics"]
        if prefetch:
            self._wait("first")
        return float(metrics["cold_start_phases"]["load_ms"]) / 1000

    def beside(self) -> tuple[float, Streamed]:
        """Seconds that the second takes from disk while the first streams; and the stream."""
        self._cool("second")
        self._settle()
        time.sleep(TOLD)
        times: list[float] = []
        enough = threading.Event()
        stream = threading.Thread(target=self._stream, args=(times, enough), daemon=True)
        stream.start()
        until(lambda: (len(times) > 2 and times[-1] - times[0] > QUIET) or not stream.is_alive(), "a stream", PATIENCE)
        prepared = time.perf_counter()
        self._prepare("second")
        began = time.perf_counter()
        seconds = self._load("second", SELDOM)
        enough.set()
        stream.join()
        ended = began + seconds
        if not times or times[-1] < ended:
            raise RuntimeError("the stream ended before the load did")
        gaps = [(at, at - before) for before, at in pairwise(times)]
        return seconds, Streamed(
            [gap for at, gap in gaps if at < prepared], [gap for at, gap in gaps if began <= at < ended]
        )

    def alone(self) -> float:
        """Seconds that the second takes from disk with nothing beside it."""
        self._cool("second")
        self._settle()
        self._prepare("second")
        return self._load("second")

    def _stream(self, times: list[float], enough: threading.Event) -> None:
        """Notes when tokens come, until it is enough."""
        letter = Tokenizer.from_file(str(self._sources["first"] / "tokenizer.json")).encode("a").ids[-1]
        models = {one["id"]: one["max_model_len"] for one in self._server.get("/v1/models")["data"]}
        body = {
            "model": "first", "prompt": "abc", "max_tokens": models["first"] - SPARE, "stream": True,
            "logit_bias": {str(letter): 100},
        }  # fmt: skip
        request = urllib.request.Request(f"{self._server.url}/v1/completions", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            for line in answer:
                if line.startswith(b"data: {"):
                    times.append(time.perf_counter())
                if enough.is_set():
                    return

    def _load(self, name: str, poll: float = POLL) -> float:
        before = self._seconds(name)
        self._server.put(f"/admin/models/{name}/load", {}, "POST")
        self._wait(name, poll)
        return self._seconds(name) - before

    def _seconds(self, name: str) -> float:
        return self._server.metric("serverless_llm_load_seconds_sum", model_name=name, phase="total")

    def _wait(self, name: str, poll: float = POLL) -> None:
        until(
            lambda: self._server.get(f"/admin/models/{name}")["state"] == "loaded",
            f"{name} to be there",
            PATIENCE,
            poll,
        )

    def _replicas(self) -> list[dict[str, Any]]:
        return [replica for device in self._server.devices() for replica in device["replicas"]]

    def _cool(self, *names: str) -> None:
        """Nothing of these models is in memory: to the server they are new checkpoints, by their time."""
        for name in names:
            self._server.put(f"/admin/models/{name}", {}, "DELETE")
        kept = len(self._sources) - len(names)
        until(lambda: len(self._replicas()) <= kept, "the device to be empty")
        for name in names:
            for path in checkpoints.weight_files(self._sources[name]):
                os.utime(path)
            self._deploy(name)
        drop_caches(self._files)

    def _prepare(self, name: str) -> None:
        """The memory that was given back goes to the next load at once, not from the machine's own host."""
        prepare("cold", checkpoints.weight_files(self._sources[name]))

    def _settle(self) -> None:
        """Until the server has taken what memory it takes ahead of need: that is no part of a quiet stream."""
        time.sleep(PAUSE)
        until(lambda: self._work(LOOK) < IDLE, "a server at rest", PATIENCE)

    def _work(self, seconds: float) -> float:
        """CPU seconds of all of the server's processes in so many seconds."""
        processes = self._server.processes()
        before = cpu(processes)
        time.sleep(seconds)
        return cpu(processes) - before

    def _deploy(self, name: str) -> None:
        self._server.put(f"/admin/models/{name}", {"source": str(self._sources[name])})


def contend(prefetched: Path, wanted: Path, rounds: int, device: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows and verdict: a request's load beside a prefetch, against the same alone."""
    alone, beside = [], []
    with Busy(prefetched, wanted, "view", device) as busy:
        for _ in range(rounds):
            alone.append(busy.online(prefetch=False))
            beside.append(busy.online(prefetch=True))
    slower = [one / other for one, other in zip(beside, alone, strict=True)]
    name = ("contend", "ours-service")
    found = [
        row(*name, "seconds", "s", beside),
        row(*name, "seconds_alone", "s", alone),
        row(*name, "seconds_ratio", "x", slower),
    ]
    return found, [at_most("contend: a load beside a prefetch, over the same alone", slower, CONTEND)]


def beside_decode(resident: Path, loaded: Path, rounds: int, device: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows and verdicts: what a load in copy mode does to a stream, and the stream to the load."""
    alone, beside, streams = [], [], []
    with Busy(resident, loaded, "copy", device) as busy:
        for _ in range(rounds):
            alone.append(busy.alone())
            seconds, streamed = busy.beside()
            beside.append(seconds)
            streams.append(streamed)
    quiet, during = _all(one.quiet for one in streams), _all(one.during for one in streams)
    ratio = quantile(during, 0.99) / quantile(quiet, 0.99)
    speed = [one / other for one, other in zip(alone, beside, strict=True)]
    name = ("beside-decode", "ours-service")
    found = [
        row(*name, "itl_p99_ratio", "x", [ratio]),
        row(*name, "itl_quiet_ms", "ms", [1000 * gap for gap in quiet]),
        row(*name, "itl_during_ms", "ms", [1000 * gap for gap in during]),
        row(*name, "speed_ratio", "x", speed),
    ]
    return found, [
        at_most("beside-decode: P99 between tokens during a load, over without one", [ratio], ITL),
        at_least("beside-decode: the load's speed, over the same alone", speed, SPEED),
    ]


def _all(lists: Iterable[list[float]]) -> list[float]:
    return [one for several in lists for one in several]


BUSY = {"contend": contend, "beside-decode": beside_decode}
