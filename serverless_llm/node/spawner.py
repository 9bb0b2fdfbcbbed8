"""The agent's side of the forkserver: starts it, starts another when it dies, asks it for workers."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
from collections.abc import Callable

import msgspec

from serverless_llm.node import forkserver
from serverless_llm.node.processes import STREAMING, command, died, environment

log = logging.getLogger(__name__)

# Compute threads that wait for one another sleep: if they spin, a third busy process makes steps 100 times longer.
PATIENT = {"OMP_WAIT_POLICY": "passive"}
# CUDA counts GPUs as NVML does, which is asked for their memory.
NUMBERED = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
READY_LIMIT = 120.0  # seconds until a forkserver must be up; to import torch from a cold network disk takes some
BACK_OFF = 1.0  # seconds before the next try after a forkserver that died before it was up; doubled each time
BACK_OFF_LIMIT = 30.0


class Spawner:
    """Keeps one forkserver alive. All callbacks come from the loop.

    Args:
        ready: a forkserver can spawn; called again after each restart.
        spawned: (device, incarnation, pid).
        exited: (device, incarnation, wait status); a worker was reaped.
        lost: the forkserver died, and all its workers with it, with the cause; another one is starting.
        node: what workers are called after.
    """

    def __init__(
        self,
        ready: Callable[[], None],
        spawned: Callable[[int, int, int], None],
        exited: Callable[[int, int, int], None],
        lost: Callable[[str], None],
        node: str,
    ) -> None:
        self._ready = ready
        self._spawned = spawned
        self._exited = exited
        self._lost = lost
        self._node = node
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._starting: asyncio.TimerHandle | None = None  # the next start, or the end of patience with this one
        self._verdict = ""  # why this agent killed it
        self._failures = 0  # in a row, before it was up
        self.up = False

    def start(self) -> None:
        """Starts a forkserver; `ready` is called when torch is imported there."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        arguments = command("serverless_llm.node.forkserver", str(theirs.fileno()), str(os.getpid()), self._node)
        environ = {**PATIENT, **NUMBERED, **environment()}
        if STREAMING.items() <= environ.items():  # the agent's own; what workers copy is used again at once
            del environ["GLIBC_TUNABLES"]
        self._process = subprocess.Popen(arguments, pass_fds=[theirs.fileno()], env=environ, stdin=subprocess.DEVNULL)
        theirs.close()
        self._control, self._verdict = ours, ""
        loop = asyncio.get_running_loop()
        loop.add_reader(ours, self._read)
        self._starting = loop.call_later(READY_LIMIT, self.kill, f"was not ready within {READY_LIMIT:g} s")

    def spawn(self, device: int, incarnation: int, pool: int) -> socket.socket:
        """Asks for a worker; returns the agent's end of its socket (non-blocking)."""
        assert self._control is not None
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        request = msgspec.json.encode(forkserver.Spawn(device, incarnation))
        try:
            socket.send_fds(self._control, [request], [theirs.fileno(), pool])
        except OSError:
            log.warning("the forkserver is gone; its end of file follows")
        theirs.close()
        return ours

    def kill(self, verdict: str) -> None:
        """Kills a forkserver that hangs; `lost` follows. `verdict`: what it did."""
        if self._process is not None:
            self._verdict = verdict
            self._process.kill()

    def stop(self) -> None:
        """Ends the forkserver and with it all workers."""
        if self._starting is not None:
            self._starting.cancel()
        if self._control is not None:
            asyncio.get_running_loop().remove_reader(self._control)
            self._control.close()
            self._control = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self.up = False

    def _read(self) -> None:
        assert self._control is not None
        try:
            raw = self._control.recv(forkserver.DATAGRAM)
        except ConnectionResetError:
            raw = b""
        if not raw:
            self._restart()
            return
        match forkserver.REPORTS.decode(raw):
            case forkserver.Spawned(device, incarnation, pid):
                self._spawned(device, incarnation, pid)
            case forkserver.Exited(device, incarnation, status):
                self._exited(device, incarnation, status)
            case _:
                assert self._starting is not None
                self._starting.cancel()
                self.up, self._failures = True, 0
                self._ready()

    def _restart(self) -> None:
        assert self._process is not None
        self._failures += not self.up
        process, delay = self._process, pause(self._failures)
        self.stop()
        status = -process.returncode if process.returncode < 0 else process.returncode << 8
        cause = f"the forkserver {self._verdict or died(status)}"
        log.warning("%s; the next one starts in %.0f s", cause, delay)
        self._lost(cause)
        self._starting = asyncio.get_running_loop().call_later(delay, self.start)


def pause(failures: int) -> float:
    """Seconds before the next try after so many failures."""
    return min(BACK_OFF * 2.0 ** (failures - 1), BACK_OFF_LIMIT) if failures else 0.0
