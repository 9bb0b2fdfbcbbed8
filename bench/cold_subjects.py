"""Who is started cold: the server, and peers in processes of their own; each proves where its bytes came from.

Cases: `disk`, nothing of the checkpoint in memory; `dram`, the checkpoint in the DRAM tier (peers: in the page cache).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import psutil

from bench import checkpoints, peers
from bench.common import ROOT, drop_caches, storage_bytes
from tests.serving import Server, until

CASES = ("disk", "dram")
COLD = 0.98  # share of the files that must come from storage for a start to count as cold
WARM = 0.2  # share that may, for one that does not: libraries are read too
GIB = 1 << 30
PATIENCE = 300.0  # seconds for one peer's start
MODEL = "subject"


class WrongTier(Exception):
    """The bytes did not come from where the case wants them to: the sample is invalid."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One start; times in milliseconds, None where the subject cannot tell.

    Attributes:
        ttft: from the request (fresh processes: from their start) to the first token.
        load: until the model can compute.
        disk, upload: of the load, for bytes on their way to DRAM and on from there.
        first, warm: forward of the first prompt, and the median of the same with later prompts.
        storage: bytes that came from storage meanwhile.
        faults: page faults that read nothing, up to the first token.
    """

    ttft: float
    load: float
    first: float
    warm: float
    storage: int
    disk: float | None = None
    upload: float | None = None
    faults: int | None = None


class Subject(Protocol):
    name: str

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def sample(self, case: str, prompts: Sequence[str]) -> Sample:
        """One start, answering `prompts` one after the other.

        Raises:
            WrongTier: it was not such a start.
        """
        ...


def check_tier(case: str, storage: int, nbytes: int) -> None:
    if case == "disk" and storage < COLD * nbytes:
        raise WrongTier(f"disk: only {storage} of {nbytes} bytes came from storage")
    if case == "dram" and storage > WARM * nbytes:
        raise WrongTier(f"dram: {storage} bytes came from storage, {nbytes} were to be in memory")


# --- the server ---


class Ours:
    """A running server with one device; a cold start is one request to a model that is not loaded."""

    name = "ours"

    def __init__(self, directory: Path, device: str, weights: str) -> None:
        self._directory = directory
        self._files = checkpoints.weight_files(directory)
        self._nbytes = sum(path.stat().st_size for path in self._files)
        self._scratch = Path(tempfile.mkdtemp(prefix="serverless-llm-cold-"))
        self._server = Server(self._scratch / "state", *options(device, weights, self._nbytes))

    def __enter__(self) -> Self:
        self._server.start(120)
        self._deploy()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def sample(self, case: str, prompts: Sequence[str]) -> Sample:
        self._unload()
        if case == "disk":
            self._forget()
            self._deploy()
            drop_caches(self._files)
        elif not self._resident():
            self._ask(prompts[0])
            self._unload()
        before, faults = read_bytes(self._server.processes()), minor_faults(self._server.processes())
        began = time.perf_counter()
        metrics = self._ask(prompts[0])
        ttft = 1000 * (time.perf_counter() - began)
        storage = read_bytes(self._server.processes()) - before
        faults = minor_faults(self._server.processes()) - faults
        check_tier(case, storage, self._nbytes)
        warm = [forward(self._ask(prompt)) for prompt in prompts[1:]]
        phases = metrics["cold_start_phases"]
        return Sample(
            ttft=ttft,
            load=phases["load_ms"],
            first=forward(metrics),
            warm=statistics.median(warm),
            storage=storage,
            disk=phases["load_disk_ms"],
            upload=phases["load_upload_ms"],
            faults=faults,
        )

    def _ask(self, prompt: str) -> dict[str, Any]:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 1, "temperature": 0}
        metrics: dict[str, Any] = self._server.put("/v1/completions", body, "POST")["metrics"]
        return metrics

    def _deploy(self) -> None:
        self._server.put(f"/admin/models/{MODEL}", {"source": str(self._directory)})

    def _unload(self) -> None:
        self._server.put(f"/admin/models/{MODEL}/unload", {}, "POST")
        until(lambda: not any(device["replicas"] for device in self._server.devices()), "the model to be unloaded")

    def _forget(self) -> None:
        self._server.put(f"/admin/models/{MODEL}", {}, "DELETE")
        until(lambda: not self._resident(), "the DRAM tier to be empty")

    def _resident(self) -> bool:
        return any(node["resident"] for node in self._server.status()["nodes"])


def options(device: str, weights: str, nbytes: int) -> list[str]:
    """How the server is started for one model of `nbytes`."""
    room = str(math.ceil(1.25 * nbytes) + GIB)
    chosen = ["--devices", f"{device}:1", "--device-memory", room, "--dram", room]
    return [*chosen, "--weights", weights] if device == "cpu" else chosen


def forward(metrics: Mapping[str, Any]) -> float:
    """Milliseconds from a sequence's attachment to its worker to its first token."""
    return float(metrics["time_to_first_token_ms"] - metrics["queue_time_ms"])


def read_bytes(processes: Iterable[psutil.Process]) -> int:
    """Bytes that these processes had read from storage."""
    return sum(int(process.io_counters().read_bytes) for process in processes if process.is_running())


def minor_faults(processes: Iterable[psutil.Process]) -> int:
    """The tenth field of /proc/PID/stat; a name with spaces ends with the last parenthesis."""
    stats = [Path(f"/proc/{process.pid}/stat").read_text() for process in processes if process.is_running()]
    return sum(int(stat.rpartition(")")[2].split()[7]) for stat in stats)


# --- peers ---


class Child:
    """One process of `bench/starts.py`."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str]) -> None:
        heard, said = os.pipe()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the child
        self.began = time.perf_counter()
        self._process = subprocess.Popen(
            [*command, str(said)],
            env=environ,
            pass_fds=[said],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
        )
        os.close(said)
        self._heard = os.fdopen(heard)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._heard.close()
        self._log.close()

    def hear(self) -> dict[str, Any]:
        """The next thing it says.

        Raises:
            RuntimeError: it ended instead; the text is the end of its output.
        """
        line = self._heard.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(self._log.read().decode(errors="replace")[-2000:])
        heard: dict[str, Any] = json.loads(line)
        return heard

    def order(self, directory: Path, prompts: Sequence[str]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"directory": str(directory), "prompts": list(prompts)}).encode() + b"\n")
        self._process.stdin.flush()

    def storage(self) -> int:
        return storage_bytes(self._process.pid)


class Peer:
    """A peer started in a fresh process (`warm` false), or in one that had all imported before it was asked."""

    def __init__(self, name: str, command: Sequence[str], environ: Mapping[str, str], directory: Path) -> None:
        self.name = name
        self._fresh = not name.endswith("-warm")
        self._command, self._environ, self._directory = command, environ, directory
        self._files = checkpoints.weight_files(directory)
        self._nbytes = sum(path.stat().st_size for path in self._files)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def sample(self, case: str, prompts: Sequence[str]) -> Sample:
        """The peer's libraries are in the page cache in both cases, only its model is cold; `dram` follows `disk`."""
        if self._fresh:
            self._page(case)
            if case == "disk":
                with Child(self._command, self._environ) as libraries:
                    libraries.hear()
            with Child(self._command, self._environ) as child:
                return self._start(case, child, prompts, child.began)
        with Child(self._command, self._environ) as child:
            child.hear()
            self._page(case)
            return self._start(case, child, prompts, time.perf_counter())

    def _page(self, case: str) -> None:
        """Empties the page cache, or fills it with the checkpoint."""
        if case == "disk":
            drop_caches(self._files)
        else:
            for path in self._files:
                touch(path)

    def _start(self, case: str, child: Child, prompts: Sequence[str], began: float) -> Sample:
        before = 0 if self._fresh else child.storage()
        child.order(self._directory, prompts)
        if self._fresh:
            child.hear()
        first = child.hear()
        ttft = 1000 * (time.perf_counter() - began)
        storage = child.storage() - before
        check_tier(case, storage, self._nbytes)
        warm = statistics.median(child.hear()["warm_ms"])
        return Sample(ttft=ttft, load=first["load_ms"], first=first["first_ms"], warm=warm, storage=storage)


def touch(path: Path) -> None:
    """Reads a file through the page cache."""
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(16 << 20)
        while file.readinto(buffer):
            pass


def subject(name: str, directory: Path, device: str, weights: str) -> Subject:
    """The subject called `name`.

    Raises:
        PeerMissing: it cannot run here.
    """
    if name == "ours":
        return Ours(directory, device, weights)
    place = "cpu" if device == "cpu" else "cuda:0"
    architecture = str(json.loads((directory / "config.json").read_text())["architectures"][0])
    peer = name.split("-")[0]
    python = sys.executable if peer == "transformers" else str(peers.python(name))
    environ = peer_environ(os.environ) | ({} if peer == "transformers" else peers.environment(name))
    command = [python, str(ROOT / "bench" / "starts.py"), peer, place, architecture]
    return Peer(name, command, environ, directory)


def peer_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """A peer's surroundings: none of ours, all cores, no network."""
    inherited = {name: value for name, value in environ.items() if name not in ("OMP_NUM_THREADS", "PYTHONPATH")}
    return inherited | {"HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
