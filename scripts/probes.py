"""A running server seen from outside: its HTTP surface, its metrics, and what `/proc` says of its processes."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serverless_llm.demo import tasks

COMMAND = [str(Path(sys.executable).parent / "serverless-llm")]
DISK_RATE = "20MB/s"  # so that the phases of a start can be seen
PATIENCE = 60.0  # seconds until anything that must happen has happened
POLL = 0.02


class Broken(Exception):
    """A proof that failed."""


def prove(true: object, what: str) -> None:
    if not true:
        raise Broken(what)


def until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(POLL)
    raise Broken(f"{what}: not within {PATIENCE:.0f} s")


# --- what /proc says ---


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def storage_bytes(pid: int) -> int:
    """Bytes that a process made the kernel fetch from storage."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def family(text: str) -> list[int]:
    """Living processes whose command line holds `text`, and all that they started."""
    parents, found = {}, set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if text in (folder / "cmdline").read_bytes().decode(errors="replace"):
                found.add(int(folder.name))
    found.discard(os.getpid())
    while more := {pid for pid, parent in parents.items() if parent in found and pid not in found}:
        found |= more
    return sorted(filter(alive, found))


def forget_cached(folders: list[Path]) -> str:
    """Takes the checkpoints out of the page cache; says by which means."""
    os.sync()
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
        return "page cache dropped"
    for file in (file for folder in folders for file in folder.glob("*.safetensors")):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return "files dropped from the page cache"


# --- the server, seen from outside ---


@dataclass
class Answer:
    """What a client got. `moments`: seconds since the request, of every piece of text."""

    prompt: str
    text: str = ""
    finish: str = ""
    moments: list[float] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    error: str = ""


class Server:
    """One `serverless-llm serve` with a state directory of its own."""

    def __init__(self, folder: Path, device_memory: int) -> None:
        self.device_memory = device_memory
        self.state = folder / "state"
        self.log = folder / "serve.log"
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts a head; one on the same state directory and port when there was one before."""
        command = [*COMMAND, "serve", "--port", str(self.port), "--state-dir", str(self.state)]
        command += ["--devices", "cpu:2", "--device-memory", str(self.device_memory), "--dram", "64MiB"]
        command += ["--limit", f"disk={DISK_RATE}"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.port = until(self._port, "the server listens")
        until(self._ready, "the server is ready")

    def _port(self) -> int:
        assert self.process is not None
        prove(self.process.poll() is None, f"the server runs; its log: {self.log}")
        with contextlib.suppress(OSError, ValueError):
            head = json.loads((self.state / "head.json").read_text())
            return int(head["url"].rpartition(":")[2]) if head["pid"] == self.process.pid else 0
        return 0

    def _ready(self) -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self.call("GET", "/ready")[0] == 200
        return False

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        content = None if body is None else json.dumps(body)
        connection.request(method, path, content, {"Content-Type": "application/json"})
        with contextlib.closing(connection), connection.getresponse() as response:
            return response.status, response.read()

    def status(self) -> Any:
        return json.loads(self.call("GET", "/admin/status")[1])

    def devices(self) -> list[dict[str, Any]]:
        return [device for node in self.status()["nodes"] for device in node["devices"]]

    def device_of(self, model: str) -> dict[str, Any]:
        """The device that has a replica of `model`."""
        held = [device for device in self.devices() if any(rep["model"] == model for rep in device["replicas"])]
        prove(held, f"a device holds {model}")
        return held[0]

    def agent(self) -> int:
        return int(until(lambda: [node["agent_pid"] for node in self.status()["nodes"]], "a node is there")[0])

    def loaded(self) -> set[str]:
        return {replica["model"] for device in self.devices() for replica in device["replicas"]}

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a counter's samples that carry `labels`."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        lines = self.call("GET", "/metrics")[1].decode().splitlines()
        samples = [line for line in lines if line.split("{")[0].split(" ")[0] == f"serverless_llm_{name}"]
        return sum(float(line.rsplit(" ", 1)[1]) for line in samples if all(label in line for label in wanted))

    def disk_bytes(self) -> float:
        """Weight bytes moved from disk, by `/metrics`, once two heartbeats have told them."""
        time.sleep(2.2)
        return self.metric("bytes_moved_total", link="disk")

    def agent_disk_bytes(self) -> int:
        """Weight bytes that the living agents moved from disk since they started, by `/admin/status`."""
        time.sleep(2.2)
        return sum(int(node["link_bytes"].get("disk", 0)) for node in self.status()["nodes"])

    def ask(self, model: str, prompt: str, answer: Answer | None = None, **options: Any) -> Answer:
        """One streamed chat answer; `answer` is filled while it comes."""
        answer = answer or Answer(prompt)
        body = {"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0, "stream": True}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        began = time.monotonic()
        content = json.dumps(body | {"max_tokens": tasks.TASKS[model].longest} | options)
        connection.request("POST", "/v1/chat/completions", content, {"Content-Type": "application/json"})
        with contextlib.closing(connection), connection.getresponse() as response:
            prove(response.status == 200, f"{model} answers (it said {response.status})")
            for line in response:
                if line.startswith(b"data: {"):
                    _take(answer, json.loads(line[6:]), time.monotonic() - began)
        return answer

    def kill_head(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            subprocess.run([*COMMAND, "stop", "--state-dir", str(self.state)], stdout=subprocess.DEVNULL, check=False)
            self.process.wait()


def _take(answer: Answer, event: dict[str, Any], moment: float) -> None:
    if "error" in event:
        answer.error = event["error"]["message"]
        return
    answer.metrics = event.get("metrics") or answer.metrics
    for choice in event["choices"]:
        if text := choice["delta"].get("content"):
            answer.text += text
            answer.moments.append(moment)
        answer.finish = choice.get("finish_reason") or answer.finish
