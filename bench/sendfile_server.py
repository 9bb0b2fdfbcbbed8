"""A server of files in a process of its own: ranges by `sendfile`, over plain HTTP and as an S3-compatible bucket.

`python -m bench.sendfile_server DIRECTORY HOST` prints its port. Below any path lie the directory's files; a path with
`list-type` in its query lists them as keys of `PREFIX`, `/sent` tells how many bytes of bodies it has sent since its
start. Python touches no byte of a body, so that the link or the client is what bounds a measurement.
"""

from __future__ import annotations

import os
import re
import socketserver
import sys
import threading
from email.utils import formatdate
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit
from xml.sax.saxutils import escape

PREFIX = "model"  # what the files lie below, in a bucket of any name
CALL = 1 << 20  # bytes of one sendfile: what the count is exact to
RANGE = re.compile(rb"(?im)^range:\s*bytes=(\d+)-(\d+)\s*$")


class Part(NamedTuple):
    """Bytes of a file that a request is answered with."""

    start: int
    stop: int
    total: int

    @property
    def headers(self) -> str:
        shown = f"Content-Range: bytes {self.start}-{self.stop - 1}/{self.total}\r\n"
        return f"Content-Length: {self.stop - self.start}\r\n{shown}"


def wanted(head: bytes, total: int) -> Part | None:
    """The range that a request's head asks for; None: all."""
    given = RANGE.search(head)
    return Part(int(given[1]), min(int(given[2]) + 1, total), total) if given else None


class Sender(socketserver.StreamRequestHandler):
    server: Files
    disable_nagle_algorithm = True

    def handle(self) -> None:
        try:
            while self._answer():
                pass
        except ConnectionError:  # the client went: it was killed, or has what it wanted
            pass

    def _answer(self) -> bool:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            line = self.rfile.readline()
            if not line:
                return False
            head += line
        method, target = head.split(b"\r\n", 1)[0].decode().split()[:2]
        url = urlsplit(target)
        path = self.server.folder / url.path.rsplit("/", 1)[-1]
        if "list-type" in url.query:
            self._text(self.server.listing())
        elif url.path == "/sent":
            self._text(str(self.server.sent))
        elif path.is_file():
            self._file(path, head, method == "GET")
        else:
            self.wfile.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        return True

    def _text(self, text: str) -> None:
        self.wfile.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())

    def _file(self, path: Path, head: bytes, body: bool) -> None:
        total, at = path.stat().st_size, formatdate(path.stat().st_mtime, usegmt=True)
        part = wanted(head, total)
        answer = f"HTTP/1.1 {'206 Partial Content' if part else '200 OK'}\r\nLast-Modified: {at}\r\n"
        answer += f'ETag: "{_etag(path)}"\r\nAccept-Ranges: bytes\r\n'
        self.wfile.write((answer + (part.headers if part else f"Content-Length: {total}\r\n") + "\r\n").encode())
        if body:
            start, stop, _ = part or Part(0, total, total)
            with path.open("rb") as opened:
                while start < stop:
                    count = os.sendfile(self.connection.fileno(), opened.fileno(), start, min(CALL, stop - start))
                    self.server.count(count)
                    start += count


class Files(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, folder: Path, host: str) -> None:
        super().__init__((host, 0), Sender)
        self.folder = folder
        self.sent = 0
        self._lock = threading.Lock()

    def count(self, nbytes: int) -> None:
        with self._lock:
            self.sent += nbytes

    def listing(self) -> str:
        rows = "".join(
            f"<Contents><Key>{PREFIX}/{escape(path.name)}</Key><Size>{path.stat().st_size}</Size>"
            f"<ETag>&quot;{_etag(path)}&quot;</ETag><LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for path in sorted(self.folder.iterdir())
        )
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>"


def _etag(path: Path) -> str:
    return f"{path.stat().st_size:x}-{path.stat().st_mtime_ns:x}"


def main() -> None:
    with Files(Path(sys.argv[1]), sys.argv[2]) as server:
        print(server.socket.getsockname()[1], flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
