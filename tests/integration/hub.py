"""A small Hugging Face hub on loopback: the routes that `huggingface_hub` asks for one model's files.

Weights are handed out by a host of their own, as the real hub does: by a redirect, whose host must not see the token.
"""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

RANGE = re.compile(r"bytes=(\d+)-")
LATE_SECONDS = 1.2  # over a patience of one second, the least that huggingface_hub knows


@dataclass
class Repository:
    """Files by name at one commit, which all of `revisions` name.

    `gated`: who asks for a file gets 403. `sizes`: what the list of files says where that is not the truth.
    """

    files: dict[str, bytes]
    revisions: tuple[str, ...] = ("main",)
    gated: bool = False
    sizes: dict[str, int] = field(default_factory=dict)

    @functools.cached_property
    def etags(self) -> dict[str, str]:
        return {name: hashlib.sha256(data).hexdigest() for name, data in self.files.items()}

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted(self.etags.items())).encode()).hexdigest()


@dataclass(frozen=True)
class Asked:
    """One request. `begin`: of its Range, 0 without one."""

    method: str
    path: str
    begin: int
    token: str | None


@dataclass
class Hub:
    """Serves `repositories` by id while it is entered. Of `stalls` (file -> bytes) no more is sent than that.

    `late`: names of files about which it answers `LATE_SECONDS` late, once each.
    """

    repositories: dict[str, Repository]
    stalls: dict[str, int] = field(default_factory=dict)
    late: set[str] = field(default_factory=set)
    asked: list[Asked] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._released = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._released.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def gets(self, suffix: str) -> list[Asked]:
        """The requests for files whose names end so, where they were answered by the file."""
        return [one for one in self.asked if one.method == "GET" and one.path.endswith(suffix) and not _moved(one.path)]

    def hold(self, seconds: float | None = None) -> None:
        self._released.wait(seconds)


def _moved(path: str) -> bool:
    return "/resolve/" in path and path.endswith(".safetensors")


class _Server(http.server.ThreadingHTTPServer):
    request_queue_size = 64
    hub: Hub

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed is part of the tests."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        given = RANGE.match(self.headers.get("Range", ""))
        begin = int(given[1]) if given else 0
        self.server.hub.asked.append(Asked(self.command, path, begin, self.headers.get("Authorization")))
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path)
        file = re.fullmatch(r"(?:/elsewhere)?/([^/]+/[^/]+)/(?:resolve|raw)/([^/]+)/(.+)", path)
        found = info or file
        about = path.rpartition("/")[2]
        if about in self.server.hub.late and self.command == "HEAD":
            self.server.hub.late.remove(about)
            self.server.hub.hold(LATE_SECONDS)
        repository = self.server.hub.repositories.get(found[1]) if found else None
        if repository is None or found is None:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif repository.gated and file:
            self._answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif found[2] not in {*repository.revisions, repository.commit}:
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif file:
            moved = f"http://localhost:{self.server.server_address[1]}/elsewhere{path.replace('/resolve/', '/raw/')}"
            self._file(repository, file[3], begin, moved if _moved(path) else "")
        else:
            siblings = [self._listed(repository, name) for name in repository.files]
            value = {"id": found[1], "modelId": found[1], "sha": repository.commit, "siblings": siblings}
            self._answer(200, json.dumps(value).encode(), {})

    do_HEAD = do_GET  # noqa: N815

    def _listed(self, repository: Repository, name: str) -> dict[str, Any]:
        size = repository.sizes.get(name, len(repository.files[name]))
        apart = {"lfs": {"sha256": repository.etags[name], "size": size, "pointerSize": 134}}
        return {"rfilename": name, "size": size} | (apart if name.endswith(".safetensors") else {})

    def _file(self, repository: Repository, name: str, begin: int, moved: str) -> None:
        data = repository.files[name]
        headers = {"ETag": f'"{repository.etags[name]}"', "X-Repo-Commit": repository.commit}
        headers |= {"Accept-Ranges": "bytes", "X-Linked-Size": str(len(data))}
        if moved:
            headers |= {"X-Linked-ETag": headers["ETag"], "ETag": '"of the redirect"', "Location": moved}
            self._answer(302, b"", headers)
            return
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        self._answer(206 if begin else 200, data[begin:], headers, self.server.hub.stalls.get(name))

    def _answer(self, status: int, body: bytes, headers: dict[str, str], stall: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[:stall])
        if stall is not None:
            self.wfile.flush()
            self.server.hub.hold()

    def log_message(self, *_: object) -> None:
        pass
