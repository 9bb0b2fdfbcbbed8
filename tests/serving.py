"""A real server in its own processes, as an operator would start it, for integration tests and benches."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import psutil

T = TypeVar("T")
WORKERS = 16  # processes of pytest at once, at most


def free_port() -> int:
    """Nobody listens on it, the kernel gives it to nobody else, and no other test at work takes it."""
    while True:
        port = next(PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def ports() -> Iterator[int]:
    """Below those for port 0 and for connections; every one of pytest's processes has its own, from anywhere on."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    own = range(20_000 + worker % WORKERS, 32_768, WORKERS)
    first = random.SystemRandom().randrange(len(own))
    return itertools.cycle([*own[first:], *own[:first]])


def until(condition: Callable[[], T | None], what: str, seconds: float = 30.0, pause: float = 0.01) -> T:
    """Asks `condition` again and again until it gives something true.

    Raises:
        TimeoutError: it did not within `seconds`; names `what`.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(pause)
    raise TimeoutError(f"waited {seconds} s for {what}")


PORTS = ports()


def hear_ctrl_c() -> None:
    """For `preexec_fn`: a shell's background job, as this may be, has its children ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What a running server holds: compared before and after a storm."""

    processes: int
    descriptors: int
    memfds: int
    sockets: int
    files: int


class Server:
    """`serverless-llm serve` on loopback with a state directory of its own; a context that always cleans up."""

    def __init__(self, state: Path, *options: str, port: int | None = None, through: Sequence[str] = ()) -> None:
        """`through`: a command that runs the server's own, which follows it."""
        self.state = state
        self.port = port or free_port()
        self.options = options
        self.through = through
        self.url = f"http://127.0.0.1:{self.port}"
        self.head: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, seconds: float = 60.0) -> None:
        command = [*self.through, sys.executable, "-m", "serverless_llm", "serve", "--port", str(self.port)]
        command += ["--state-dir", str(self.state), *self.options]
        self.state.mkdir(parents=True, exist_ok=True)
        with (self.state / "head.log").open("ab") as log:
            self.head = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        until(self._ready, f"the server to be ready; see {self.state}/head.log", seconds)

    def _ready(self) -> bool:
        assert self.head is not None
        if self.head.poll() is not None:
            raise RuntimeError(f"serve exited with {self.head.returncode}: {(self.state / 'head.log').read_text()}")
        try:
            with urllib.request.urlopen(f"{self.url}/ready", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def kill_head(self) -> None:
        assert self.head is not None
        self.head.kill()
        self.head.wait()

    def stop(self) -> int:
        """SIGTERM, then, whatever is left of the server's processes, SIGKILL. Returns the head's exit status."""
        assert self.head is not None
        self.head.send_signal(signal.SIGTERM)
        try:
            return self.head.wait(40)
        except subprocess.TimeoutExpired:
            self.head.kill()
            return self.head.wait()
        finally:
            for process in self.processes():
                process.kill()

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return json.loads(answer.read())

    def put(self, path: str, body: dict[str, Any], method: str = "PUT") -> Any:
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), method=method)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read() or b"null")

    def status(self) -> Any:
        return self.get("/admin/status")

    def devices(self) -> list[dict[str, Any]]:
        """Every device's status, its node's name and agent beside it."""
        return [
            device | {"node": node["node"], "agent_pid": node["agent_pid"]}
            for node in self.status()["nodes"]
            for device in node["devices"]
        ]

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry `labels`."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        samples = [line for line in lines if line.split("{")[0].split(" ")[0] == name]
        return sum(float(line.rsplit(" ", 1)[1]) for line in samples if all(label in line for label in wanted))

    def processes(self) -> list[psutil.Process]:
        """The head, its text processes, the agents and all that they started, found by the state directory."""
        found = {}
        for process in psutil.process_iter(["pid", "cmdline"]):
            if str(self.state) in " ".join(process.info["cmdline"] or []):
                found[process.pid] = process
                for child in children(process):
                    found[child.pid] = child
        found.pop(os.getpid(), None)
        return list(found.values())

    def leftovers(self) -> Leftovers:
        links = [link for process in self.processes() for link in descriptors(process.pid)]
        files = sum(len(names) for _, _, names in os.walk(self.state))
        return Leftovers(
            processes=len(self.processes()),
            descriptors=len(links),
            memfds=sum("memfd:" in link or link.endswith("(deleted)") for link in links),
            sockets=sum(link.startswith("socket:") for link in links),
            files=files,
        )


def children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def descriptors(pid: int) -> list[str]:
    """Where every open descriptor of a process points; empty when it is gone."""
    folder = Path(f"/proc/{pid}/fd")
    links = []
    try:
        for entry in folder.iterdir():
            links.append(str(entry.readlink()))
    except (FileNotFoundError, ProcessLookupError):
        return links
    return links
