"""One device's place for a worker, as its agent sees it: which incarnation is there, and whether it still moves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable

import msgspec

from serverless_llm import framing, wire
from serverless_llm.node.links import SocketLink
from serverless_llm.node.processes import died
from serverless_llm.node.spawner import Spawner

log = logging.getLogger(__name__)

PREDICTED_STEPS = 20  # a step may take this many times its prediction before its worker counts as stuck
BOOT_LIMIT = 60.0  # seconds from fork to Booted; a CUDA context takes some
FORKSERVER_LIMIT = 30.0  # seconds that a fork may take, and a killed worker's way out of the kernel
BACK_OFF = 0.1  # seconds, doubled with every incarnation that dies before it is up
BACK_OFF_LIMIT = 5.0


class Slot:
    """Boots a worker, boots the next one when it died, and kills one that is stuck.

    A frame to the worker arms the watchdog, any frame of the worker moves it on, and a Beat that says that nothing
    is left to do disarms it. An idle worker therefore never needs to wake up.

    Args:
        boot: what every incarnation is told, its number aside.
        pool: descriptor of the DRAM pool, owned by the agent.
        receive: a frame of the worker.
        up: the worker is up.
        lost: it is gone for good (reaped), or never came up; the next one boots. With the cause, and whether that may
            be what ran there: not where it went with the forkserver.
        stuck_after: seconds of silence with work to do that a worker is allowed.
    """

    def __init__(
        self,
        boot: wire.Boot,
        pool: int,
        spawner: Spawner,
        receive: Callable[[Slot, framing.Frame], None],
        up: Callable[[Slot], None],
        lost: Callable[[Slot, str, bool], None],
        stuck_after: float,
    ) -> None:
        self.device = boot.device
        self.incarnation = 0
        self.pid = 0
        self.step = 0
        self.numerics_id = ""
        self.pinned = wire.Pinned(0, "")
        self.up = False
        self._boot = boot
        self._pool = pool
        self._spawner = spawner
        self._receive = receive
        self._told_up = up
        self._told_lost = lost
        self._stuck_after = stuck_after
        self._link: SocketLink | None = None
        self._pidfd = -1
        self._due: float | None = None  # when the worker must have said something
        self._owed: float | None = None  # when the forkserver must have said something
        self._patience = stuck_after
        self._verdict = ""  # why this agent killed the worker
        self._failed_boots = 0

    def boot(self) -> None:
        """Starts the next incarnation. The forkserver must be up."""
        self.incarnation += 1
        self.step = 0
        self.pinned = wire.Pinned(0, "")
        self._due = self._now() + BOOT_LIMIT
        self._owed = self._now() + FORKSERVER_LIMIT
        try:
            socket = self._spawner.spawn(self.device, self.incarnation, self._pool)
        except OSError as error:  # this process has no descriptors left for now
            self._gone(f"cannot be started: {error}", True)
            self._again()
            return
        socket.send(wire.encode(msgspec.structs.replace(self._boot, incarnation=self.incarnation)))
        incarnation = self.incarnation

        def receive(frame: framing.Frame) -> None:
            if incarnation == self.incarnation:
                self._frame(frame)

        link = SocketLink(receive, lambda cause: self._ended(incarnation))
        self._link = link
        self._connecting = asyncio.ensure_future(
            asyncio.get_running_loop().create_unix_connection(lambda: link, sock=socket)
        )

    def send(self, message: wire.Message, destination: int = 0, epoch: int = 0) -> None:
        """Tells the worker something."""
        self.relay(wire.encode(message, destination=destination, epoch=epoch))

    def relay(self, raw: bytes) -> None:
        """Passes frames on; dropped where no worker is up (its loss has been told)."""
        if not self.up:
            return
        assert self._link is not None
        if self._due is None:
            self._due = self._now() + self._patience
        self._link.send(raw)

    def kill(self, cause: str) -> None:
        """Kills the worker; `lost` follows when it was reaped. `cause`: what to say of it, "" how it died.

        One whose process is not known yet is killed when it is.
        """
        if self._link is None:
            return
        self._verdict = self._verdict or cause
        if self._pidfd >= 0:
            self._owed = self._owed or self._now() + FORKSERVER_LIMIT
            with contextlib.suppress(ProcessLookupError):  # reaped already, the report is on its way
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def refuse(self, cause: str) -> None:
        """Kills a worker that just came up, as if it had not: `lost` follows, and the next one boots later."""
        self.up = False
        self.kill(cause)

    def forgive(self) -> None:
        """This agent was asleep itself: the worker's silence proves nothing."""
        if self._due is not None:
            self._due = self._now() + self._patience
        if self._owed is not None:
            self._owed = self._now() + FORKSERVER_LIMIT

    def check(self) -> None:
        """Kills a worker, or the forkserver, that owes a sign of life; to be called every second or so."""
        if self._due is not None and self._now() > self._due:
            self._due = None
            self.kill(f"no step for {self._patience:.0f} s" if self.up else f"not up within {BOOT_LIMIT:.0f} s")
        if self._owed is not None and self._now() > self._owed:
            self._owed = None
            self._spawner.kill(f"hung for {FORKSERVER_LIMIT:.0f} s")

    # --- what the forkserver tells ---

    def spawned(self, incarnation: int, pid: int) -> None:
        assert incarnation == self.incarnation
        self._owed = None
        self._meet(pid)

    def _meet(self, pid: int) -> None:
        """Whichever tells of it first: the forkserver, or the worker, which may be up before its parent runs again."""
        if self._pidfd >= 0:
            return
        self.pid = pid
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            log.debug("worker %d of device %d was reaped at once", pid, self.device)
        if self._verdict:
            self.kill(self._verdict)

    def exited(self, incarnation: int, status: int) -> None:
        assert incarnation == self.incarnation
        self._gone(self._verdict or died(status), True)
        self._again()

    def forkserver_lost(self, cause: str) -> None:
        """All workers died with it; `boot` is called when another one is ready."""
        if self._link is None:
            self.incarnation += 1  # a boot that could not be tried, or waits no more
        self._gone(self._verdict or cause, bool(self._verdict))

    def _again(self) -> None:
        if self._failed_boots == 0:
            self.boot()
            return
        delay = min(BACK_OFF * 2.0 ** (self._failed_boots - 1), BACK_OFF_LIMIT)
        asyncio.get_running_loop().call_later(delay, self._boot_again, self.incarnation)

    def _boot_again(self, incarnation: int) -> None:
        if incarnation == self.incarnation and self._spawner.up:
            self.boot()

    def _gone(self, cause: str, charged: bool) -> None:
        self._failed_boots = 0 if self.up else self._failed_boots + 1
        self.up, self.pid, self._due, self._owed, self._verdict = False, 0, None, None, ""
        link, self._link = self._link, None
        if link is not None:
            link.close(cause)
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        log.warning("worker of device %d, incarnation %d: %s", self.device, self.incarnation, cause)
        self._told_lost(self, cause, charged)

    # --- what the worker tells ---

    def _frame(self, frame: framing.Frame) -> None:
        if frame.header.kind == wire.KIND[wire.Booted]:
            booted = wire.decode(frame.header.kind, frame.body)
            assert isinstance(booted, wire.Booted)
            self._meet(booted.pid)
            self.numerics_id, self.up, self._due = booted.numerics_id, True, None
            self._told_up(self)
        elif frame.header.kind == wire.KIND[wire.Failed] and not self.up:
            failed = wire.decode(frame.header.kind, frame.body)
            assert isinstance(failed, wire.Failed)
            self._verdict = failed.message
        elif frame.header.kind == wire.KIND[wire.Beat]:
            beat = wire.decode(frame.header.kind, frame.body)
            assert isinstance(beat, wire.Beat)
            self._beat(beat)
        elif frame.header.kind == wire.KIND[wire.Pinned]:
            pinned = wire.decode(frame.header.kind, frame.body)
            assert isinstance(pinned, wire.Pinned)
            self._note(pinned)
        else:
            if self._due is not None:
                self._due = self._now() + self._patience
            self._receive(self, frame)

    def _note(self, pinned: wire.Pinned) -> None:
        if pinned.refused and not self.pinned.refused:
            log.warning("worker of device %d goes on without more pinned memory: %s", self.device, pinned.refused)
        self.pinned = pinned

    def _beat(self, beat: wire.Beat) -> None:
        self.step = beat.step
        self._patience = max(self._stuck_after, PREDICTED_STEPS * beat.predicted_s)
        self._due = self._now() + self._patience if beat.runnable else None

    def _ended(self, incarnation: int) -> None:
        # A worker that closed its socket has nothing left to live for; usually it is dead already.
        if incarnation == self.incarnation and self._link is not None:
            self.kill("")

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
