"""A link of a known rate to a server of files: a network namespace behind a pair of virtual devices, paced by `tbf`."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Self

import psutil

from bench.common import ROOT

BURST_S = 0.01  # of the rate, at once: more than the kernel's timer takes to look again
PLAIN = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class LinkMissing(Exception):
    """No such link can be made here; the text says why."""


class Link:
    """A server of a directory's files behind `rate` bits per second; None: on loopback.

    It holds a network namespace and a device, both named by this process, while it is entered.
    """

    def __init__(self, directory: Path, rate: int | None) -> None:
        self._directory = directory
        self._rate = rate
        self._name = f"bench{os.getpid()}"
        net = f"198.18.{os.getpid() % 250}"  # of RFC 2544's range for benchmarks
        self._near, self._far = (f"{net}.1", f"{net}.2") if rate else ("127.0.0.1", "127.0.0.1")

    def __enter__(self) -> Self:
        """Raises:
        LinkMissing: the system or its rights do not allow it.
        """
        if self._rate:
            _ip("netns", "add", self._name)
        try:
            if self._rate:
                self._connect(self._rate)
            self._serve()
        except BaseException:
            self._disconnect()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._server.kill()
        self._server.communicate()
        self._disconnect()

    @property
    def address(self) -> str:
        """HOST:PORT of the server."""
        return f"{self._far}:{self._port}"

    @property
    def environment(self) -> dict[str, str]:
        """In which s3://bucket/model is here, and no proxy stands between."""
        return {
            "AWS_ENDPOINT_URL": f"http://{self.address}", "AWS_ALLOW_HTTP": "true", "AWS_REGION": "here",
            "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "NO_PROXY": "*", "no_proxy": "*",
        }  # fmt: skip

    @property
    def server(self) -> psutil.Process:
        return psutil.Process(self._server.pid)

    def sent(self) -> int:
        """Bytes of bodies that the server has sent."""
        with PLAIN.open(f"http://{self.address}/sent") as answer:
            return int(answer.read())

    def _connect(self, rate: int) -> None:
        name, inside = self._name, ("netns", "exec", self._name)
        _ip("link", "add", name, "type", "veth", "peer", "name", "far", "netns", name)
        _ip("address", "add", f"{self._near}/30", "dev", name)
        _ip("link", "set", name, "up")
        _ip("-n", name, "address", "add", f"{self._far}/30", "dev", "far")
        _ip("-n", name, "link", "set", "far", "up")
        burst = str(int(rate / 8 * BURST_S))
        _ip(*inside, "tc", "qdisc", "add", "dev", "far", "root",
            "tbf", "rate", str(rate), "burst", burst, "latency", "50ms")  # fmt: skip

    def _serve(self) -> None:
        inside = ["ip", "netns", "exec", self._name] if self._rate else []
        command = [*inside, sys.executable, "-m", "bench.sendfile_server", str(self._directory), self._far]
        environ = os.environ | {"PYTHONPATH": str(ROOT)}
        self._server = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)
        assert self._server.stdout is not None
        self._port = int(self._server.stdout.readline())

    def _disconnect(self) -> None:
        """The devices first: the namespace takes its time, and the next link has the same names."""
        for what in ("link", "netns") if self._rate else ():
            subprocess.run(["ip", what, "delete", self._name], stderr=subprocess.DEVNULL, check=False)


def _ip(*arguments: str) -> None:
    try:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise LinkMissing("there is no `ip`: install iproute2") from None
    except subprocess.CalledProcessError as error:
        raise LinkMissing(f"ip {' '.join(arguments)}: {error.stderr.strip()}") from error
