"""Completions of a real server over HTTP, whole and streamed, as small clients see them."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import urllib.error
import urllib.parse
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from serverless_llm.cli.make_checkpoint import make_checkpoint
from tests.serving import Server, until

TOKENS = 200  # of an answer: some tenths of a second


def checkpoint(directory: Path, seed: int = 0) -> Path:
    """Three files, a megabyte together."""
    make_checkpoint("tiny-llama", directory, layers=6, dtype="float32", shards=3, seed=seed)
    return directory


def deploy(server: Server, name: str, source: Path, **spec: Any) -> None:
    server.put(f"/admin/models/{name}", {"source": str(source), **spec})


def body(name: str, **changes: Any) -> dict[str, Any]:
    fixed = {"model": name, "prompt": [1, 2, 3, 4, 5], "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    return fixed | changes


def ask(server: Server, name: str, **changes: Any) -> tuple[int, Any]:
    """Status and text, or error, of an answer that does not stream."""
    try:
        answer = server.put("/v1/completions", body(name, **changes), "POST")
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["error"]
    assert answer["usage"]["completion_tokens"] == changes.get("max_tokens", TOKENS)
    return 200, answer["choices"][0]["text"]


class Streamed:
    """One streamed answer. `begin` returns with its first token."""

    def __init__(self, server: Server, name: str, **changes: Any) -> None:
        url = urllib.parse.urlsplit(server.url)
        assert url.hostname
        self.connection = http.client.HTTPConnection(url.hostname, url.port, timeout=120)
        raw = json.dumps(body(name, stream=True, **changes))
        self.connection.request("POST", "/v1/completions", raw, {"Content-Type": "application/json"})
        self.answer: http.client.HTTPResponse | None = None
        self.text = ""
        self.tail: list[Any] = []

    def begin(self) -> Streamed:
        self.answer = self.connection.getresponse()
        assert self.answer.status == 200, self.answer.read()
        self._read(enough=lambda: bool(self.text))
        return self

    def rest(self) -> str:
        """All of its text, once it has ended well."""
        self._read(enough=lambda: False)
        self.leave()
        assert self.tail[-1] == "[DONE]"
        assert self.tail[-2]["choices"][0]["finish_reason"] == "length"
        return self.text

    def cut(self) -> bool:
        """Whether it ended before its time, once it has ended."""
        with contextlib.suppress(OSError, http.client.HTTPException):
            self._read(enough=lambda: False)
        self.leave()
        return bool(self.tail[-1] != "[DONE]")

    def leave(self) -> None:
        """Hangs up."""
        if self.answer is not None:
            self.answer.close()
        self.connection.close()

    def _read(self, enough: Callable[[], bool]) -> None:
        assert self.answer is not None
        while not enough() and (line := self.answer.readline()):
            if line.startswith(b"data: [DONE]"):
                self.tail.append("[DONE]")
            elif line.startswith(b"data: "):
                event = json.loads(line[6:])
                self.text += event["choices"][0]["text"]
                self.tail.append(event)


def apart(work: Callable[[], Any]) -> Future[Any]:
    """In a thread of its own."""
    future: Future[Any] = Future()
    threading.Thread(target=lambda: future.set_result(work()), daemon=True).start()
    return future


def status(server: Server, name: str) -> dict[str, Any]:
    (row,) = [row for row in server.get("/v1/models")["data"] if row["id"] == name]
    found: dict[str, Any] = row["status"]
    return found


def loading(server: Server, name: str) -> None:
    """Returns in the middle of a load, which goes on unless a file of it is held."""

    def half() -> bool:
        shown = [one for device in server.devices() for one in device["replicas"] if one["model"] == name]
        return any(0 < one["done"] < one["total"] for one in shown)

    until(half, f"a load of {name}", pause=0.002)
