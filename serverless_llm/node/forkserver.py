"""The forkserver: a process that has imported torch and the engine, and forks workers from there in milliseconds.

Run by the agent as `python -m serverless_llm.node.forkserver FD PARENT NODE`, FD being a SOCK_SEQPACKET control socket.
It has one thread, so that its children are whole. Protocol, one JSON datagram each:

- it says `Ready` once;
- the agent asks `Spawn` with two descriptors (the worker's socket, the pool), answered by `Spawned`;
- it says `Exited` when a child was reaped, or instead of `Spawned` where none could be made.

It ends with the control socket, or with the agent; its workers end with it (PDEATHSIG).
"""

from __future__ import annotations

import gc
import os
import select
import socket
import sys

import msgspec

from serverless_llm.node.processes import die_with, retitle

DATAGRAM = 4096
FAILED = 1 << 8  # the wait status of a process that exited with 1


class Ready(msgspec.Struct, tag=True, frozen=True):
    pid: int


class Spawn(msgspec.Struct, tag=True, frozen=True):
    device: int
    incarnation: int


class Spawned(msgspec.Struct, tag=True, frozen=True):
    device: int
    incarnation: int
    pid: int


class Exited(msgspec.Struct, tag=True, frozen=True):
    """`status` is a wait status."""

    device: int
    incarnation: int
    status: int


REPORTS = msgspec.json.Decoder(Ready | Spawned | Exited)


class Forkserver:
    """Forks on request and reaps; the only state is its living children, by pidfd."""

    def __init__(self, control: socket.socket, node: str) -> None:
        self._control, self._node = control, node
        self._children: dict[int, tuple[int, Spawn]] = {}
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)

    def run(self) -> None:
        """Serves until the agent closes the control socket."""
        self._report(Ready(os.getpid()))
        while True:
            for descriptor, _ in self._poll.poll():
                if descriptor in self._children:
                    self._reap(descriptor)
                elif not self._serve():
                    return

    def _serve(self) -> bool:
        raw, descriptors, _, _ = socket.recv_fds(self._control, DATAGRAM, 2)
        if not raw:
            return False
        request = msgspec.json.decode(raw, type=Spawn)
        pid = self._fork()
        if pid == 0:
            self._become_worker(request.device, *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        if pid < 0:
            self._report(Exited(request.device, request.incarnation, FAILED))
            return True
        pidfd = os.pidfd_open(pid)
        self._children[pidfd] = (pid, request)
        self._poll.register(pidfd, select.POLLIN)
        self._report(Spawned(request.device, request.incarnation, pid))
        return True

    def _fork(self) -> int:
        """As `os.fork`; -1 where the system has no more processes or memory: the other workers must not die of it."""
        try:
            return os.fork()
        except OSError as error:
            print(f"no worker can be forked: {error}", file=sys.stderr, flush=True)
            return -1

    def _reap(self, pidfd: int) -> None:
        pid, request = self._children.pop(pidfd)
        self._poll.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        self._report(Exited(request.device, request.incarnation, status))

    def _report(self, report: Ready | Spawned | Exited) -> None:
        self._control.send(msgspec.json.encode(report))

    def _become_worker(self, device: int, worker_socket: int, pool: int) -> None:
        from serverless_llm.node import worker

        status = 1
        try:
            die_with(_FORKSERVER)
            retitle(f"worker {self._node}/{device} (serverless-llm)")
            self._control.close()
            for pidfd in self._children:
                os.close(pidfd)
            status = worker.main(socket.socket(fileno=worker_socket), pool)
        except BaseException:  # noqa: BLE001 - the edge of the process: said on stderr, told by the exit status
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(status)


def warm() -> None:
    """Imports what workers need, on one thread, and spares it from copy-on-write by the garbage collector."""
    gc.disable()  # which would look through all of torch again and again
    import torch

    from serverless_llm.node import worker

    torch.set_num_threads(1)
    worker.rehearse()
    gc.freeze()
    gc.enable()


_FORKSERVER = os.getpid()


def main() -> None:
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    die_with(parent)
    warm()
    Forkserver(socket.socket(fileno=descriptor), sys.argv[3]).run()


if __name__ == "__main__":
    main()
