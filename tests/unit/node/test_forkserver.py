"""A forkserver that cannot fork."""

from __future__ import annotations

import errno
import os
import socket

import msgspec
import pytest

from serverless_llm.node.forkserver import DATAGRAM, FAILED, REPORTS, Exited, Forkserver, Spawn
from serverless_llm.node.processes import died


def test_a_fork_that_fails_is_that_workers_failure_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> int:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fail)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    agents, workers = socket.socketpair()
    pool = os.memfd_create("pool")
    with ours, theirs, agents:
        server = Forkserver(theirs, "node0")
        socket.send_fds(ours, [msgspec.json.encode(Spawn(2, 5))], [workers.fileno(), pool])
        workers.close()
        os.close(pool)
        assert server._serve()
        assert REPORTS.decode(ours.recv(DATAGRAM)) == Exited(2, 5, FAILED)
        assert agents.recv(1) == b""  # its descriptors are closed
    assert died(FAILED) == "exited with 1"
    assert "no worker can be forked: [Errno 11]" in capsys.readouterr().err
