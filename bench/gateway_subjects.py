"""Servers under `bench.gateway`, each with its processes: ours on a paced engine, proxies before a paced upstream."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil

from bench import peers
from serverless_llm.cli.make_checkpoint import make_checkpoint
from serverless_llm.demo.tokenizer import MARKERS, tokenizer_json, write_json
from tests.serving import Server, free_port, until

PACED = Path(__file__).parent / "paced"
PACE = 20  # tokens a second of one stream
SHORT = 4  # tokens of one answer while few streams run; the floor ends as late as these
GRID_MS = 5.0  # tokens of this span travel together, see `paced/sitecustomize.py`
VOCABULARY = 150_000
NAME = "paced"


@dataclass(frozen=True, slots=True)
class Subject:
    """`front`: the processes that a client talks to. `behind`: those between them and the engine or upstream.
    `steps`: where our engine writes down the seconds of each step that gives a sequence its first token."""

    name: str
    url: str
    front: tuple[psutil.Process, ...]
    behind: tuple[psutil.Process, ...] = ()
    steps: Path | None = None

    def engine_seconds(self) -> list[float]:
        """Of the first tokens since the last call."""
        if self.steps is None:
            return []
        seen = [float(line) for line in self.steps.read_text().split()]
        self.steps.write_text("")
        return seen

    def cpu_seconds(self) -> tuple[float, float]:
        """Of the front, and of all."""
        front = _seconds(self.front)
        return front, front + _seconds(self.behind)


def _seconds(processes: tuple[psutil.Process, ...]) -> float:
    times = [process.cpu_times() for process in processes]
    return sum(one.user + one.system for one in times)


# --- ours ---


def checkpoint(folder: Path) -> Path:
    """One layer of Qwen3-0.6B with a tokenizer of 150,000 merged tokens, made once."""
    directory = folder / f"qwen3-0.6b-1-vocabulary-{VOCABULARY}"
    if not directory.exists():
        made = directory.with_suffix(".partial")
        shutil.rmtree(made, ignore_errors=True)
        make_checkpoint("qwen3-0.6b", made, layers=1)
        write_json(made / "tokenizer.json", big_tokenizer())
        for name in ("config.json", "generation_config.json"):
            contents = msgspec.json.decode((made / name).read_bytes())
            write_json(made / name, contents | {"bos_token_id": VOCABULARY, "eos_token_id": VOCABULARY + 1})
        made.rename(directory)
    return directory


def big_tokenizer() -> dict[str, Any]:
    """Byte-level BPE: pairs of letters, then pairs of pairs, as many as there is room for; markers follow."""
    contents = tokenizer_json()
    vocabulary: dict[str, int] = contents["model"]["vocab"]
    letters = "abcdefghijklmnopqrstuvwxyz"
    pairs = [(a, b) for a in letters for b in letters]
    merges = [*pairs, *((a + b, c + d) for a, b in pairs for c, d in pairs)][: VOCABULARY - len(vocabulary)]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    contents["model"]["merges"] = [list(merge) for merge in merges]
    for number, marker in enumerate(contents["added_tokens"]):
        marker["id"] = VOCABULARY + number
    assert len(contents["added_tokens"]) == len(MARKERS)
    return contents


@contextmanager
def ours(folder: Path, scratch: Path, streams: int) -> Iterator[Subject]:
    """A whole server; in its workers only the forward pass is replaced."""
    source = checkpoint(folder)
    path = os.pathsep.join([str(PACED), str(PACED.parents[1]), os.environ.get("PYTHONPATH", "")])
    steps = scratch / "steps"
    environ = {
        "BENCH_PACE": str(PACE),
        "BENCH_VOCABULARY": str(VOCABULARY),
        "BENCH_STEPS": str(steps),
        "PYTHONPATH": path,
    }
    former = {name: os.environ.get(name) for name in environ}
    os.environ.update(environ)
    options = ("--devices", "cpu:1", "--device-memory", "2GiB", "--dram", "1GiB")
    server = Server(scratch / "state", *options)
    try:
        server.start()
    finally:
        for name, value in former.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    try:
        server.put(f"/admin/models/{NAME}", {"source": str(source), "max_concurrency": streams, "keep_alive": "1h"})
        body = {"model": NAME, "messages": [{"role": "user", "content": "wake up"}], "max_tokens": 2}
        server.put("/v1/chat/completions", body, "POST")
        assert server.head is not None
        agents = {device["agent_pid"] for device in server.devices()}
        head = psutil.Process(server.head.pid)
        texts = [child for child in head.children() if child.pid not in agents]
        yield Subject("ours", server.url, (head, *texts), tuple(psutil.Process(pid) for pid in agents), steps)
    finally:
        server.stop()


# --- proxies ---


@contextmanager
def process(command: list[str], port: int, environ: dict[str, str]) -> Iterator[psutil.Process]:
    """A server of its own, until it listens; its tree is ended."""
    begun = psutil.Popen(command, env=os.environ | environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: begun.poll() is not None or _listens(port), f"{command[0]} to listen", 120.0, 0.2)
        if begun.poll() is not None:
            raise peers.PeerMissing(f"{' '.join(command)} exited with {begun.returncode}")
        yield begun
    finally:
        for one in _tree(begun) if begun.poll() is None else ():
            one.kill()
        begun.wait()


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=2).close()
    except OSError:
        return False
    return True


@contextmanager
def upstream() -> Iterator[Subject]:
    port = free_port()
    command = [sys.executable, "-m", "bench.paced.backend", str(port)]
    with process(command, port, {"BENCH_PACE": str(PACE)}) as one:
        yield Subject("upstream", f"http://127.0.0.1:{port}", (one,))


@contextmanager
def floor() -> Iterator[Subject]:
    port = free_port()
    with process([sys.executable, "-m", "bench.paced.floor", str(port), str((SHORT - 1) / PACE)], port, {}):
        yield Subject("floor", f"http://127.0.0.1:{port}", ())


@contextmanager
def fastapi_proxy(behind: Subject) -> Iterator[Subject]:
    port = free_port()
    command = [str(peers.python("fastapi-proxy")), str(PACED / "fastapi_proxy.py"), str(port), behind.url]
    with process(command, port, {}) as one:
        yield Subject("fastapi-proxy", f"http://127.0.0.1:{port}", _tree(one))


@contextmanager
def litellm(behind: Subject, scratch: Path) -> Iterator[Subject]:
    port, config = free_port(), scratch / "litellm.json"
    model = {"model": f"openai/{NAME}", "api_base": f"{behind.url}/v1", "api_key": "none"}
    config.write_bytes(msgspec.json.encode({"model_list": [{"model_name": NAME, "litellm_params": model}]}))
    program = peers.python("litellm").parent / "litellm"
    command = [str(program), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    with process(command, port, peers.environment("litellm")) as one:
        yield Subject("litellm", f"http://127.0.0.1:{port}", _tree(one))


def _tree(process: psutil.Process) -> tuple[psutil.Process, ...]:
    return process, *process.children(recursive=True)


def start(stack: ExitStack, names: list[str], folder: Path, scratch: Path, streams: int) -> dict[str, Subject]:
    """The floor, the upstream and every subject that is named.

    Raises:
        PeerMissing: one is not installed, or does not start.
    """
    behind = stack.enter_context(upstream())
    begin = {
        "ours": lambda: ours(folder, scratch, streams),
        "fastapi-proxy": lambda: fastapi_proxy(behind),
        "litellm": lambda: litellm(behind, scratch),
    }
    bare = stack.enter_context(floor())
    return {"floor": bare, "upstream": behind} | {name: stack.enter_context(begin[name]()) for name in names}
