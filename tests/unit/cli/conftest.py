"""A scripted HTTP server, and one command line run in this process."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from serverless_llm.cli.main import main


class Scripted(http.server.ThreadingHTTPServer):
    """Answers each (method, path) with its scripted (status, JSON), (status, events) or raw bytes; 404 otherwise."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[tuple[str, str], tuple[int, Any]] = {}
        self.seen: list[tuple[str, str, Any, str | None]] = []  # method, path, body, Authorization

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Scripted

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        self.server.seen.append((self.command, self.path, body, self.headers.get("Authorization")))
        status, answer = self.server.answers.get((self.command, self.path), (404, b"no such page"))
        raw = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


def events(*events: dict[str, Any]) -> bytes:
    """A server-sent event stream, `[DONE]` at its end."""
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"


@pytest.fixture
def server() -> Iterator[Scripted]:
    scripted = Scripted()
    thread = threading.Thread(target=scripted.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield scripted
    scripted.shutdown()
    thread.join()
    scripted.server_close()


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


class CommandLine:
    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str) -> Outcome:
        status = main(arguments)
        captured = self._capsys.readouterr()
        return Outcome(status, captured.out, captured.err)


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """Runs command lines with an empty state directory of their own."""
    for name in ("URL", "API_KEY"):
        monkeypatch.delenv(f"SERVERLESS_LLM_{name}", raising=False)
    monkeypatch.setenv("SERVERLESS_LLM_STATE_DIR", str(tmp_path))
    return CommandLine(capsys)


@pytest.fixture
def running(server: Scripted, monkeypatch: pytest.MonkeyPatch, cli: CommandLine) -> Scripted:
    """The scripted server as the one that the command line finds."""
    monkeypatch.setenv("SERVERLESS_LLM_URL", server.url)
    return server
