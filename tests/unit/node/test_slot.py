"""A slot against a real forkserver, and against one that says what the test wants."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from serverless_llm import framing, wire
from serverless_llm.loader.pool import Pool
from serverless_llm.node import forkserver
from serverless_llm.node import slot as slots
from serverless_llm.node.slot import Slot
from serverless_llm.node.spawner import Spawner

MIB = 1 << 20


def forked(pool: Pool, up: Callable[[Slot], None], lost: Callable[[Slot, str, bool], None]) -> tuple[Slot, Spawner]:
    """A slot and the forkserver that it asks, which is still to be started."""
    spawner = Spawner(
        lambda: slot.boot(),
        lambda device, incarnation, pid: slot.spawned(incarnation, pid),
        lambda device, incarnation, status: slot.exited(incarnation, status),
        lambda cause: slot.forkserver_lost(cause),
        "n0",
    )
    boot = wire.Boot(0, 0, "cpu", 8 * MIB, "view", pool.capacity, 1, 0.0)
    slot = Slot(boot, pool.fd, spawner, lambda *_: None, up, lost, 10.0)
    return slot, spawner


@pytest.mark.slow
def test_a_forkserver_that_hangs_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    news: asyncio.Queue[str] = asyncio.Queue()

    def says(word: str) -> Callable[..., None]:
        return lambda *_: news.put_nowait(word)

    async def until(word: str) -> None:
        async with asyncio.timeout(60):
            while await news.get() != word:
                pass

    async def tell() -> None:
        pool = Pool(MIB)
        slot, spawner = forked(pool, says("up"), says("lost"))
        spawner.start()
        await until("up")
        slot.check()  # nothing is owed
        assert spawner._process is not None
        first = spawner._process.pid
        assert b"\0OMP_WAIT_POLICY=passive\0" in b"\0" + Path(f"/proc/{first}/environ").read_bytes()
        os.kill(first, signal.SIGSTOP)
        monkeypatch.setattr(slots, "FORKSERVER_LIMIT", -1.0)
        slot.kill("to be reaped by a forkserver that does not")
        slot.check()
        monkeypatch.undo()
        await until("lost")
        await until("up")
        assert spawner._process.pid != first
        assert slot.incarnation == 2
        spawner.stop()
        slot.forkserver_lost("stopped")
        await asyncio.sleep(0)  # the link's transport closes in the next turn
        pool.close()

    asyncio.run(tell())


def test_that_memory_cannot_be_pinned_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    pool = Pool(MIB)
    slot, _ = forked(pool, lambda _: None, lambda *_: None)
    for told in (wire.Pinned(5, ""), wire.Pinned(5, "not permitted"), wire.Pinned(0, "not permitted")):
        slot._frame(next(iter(framing.Splitter().feed(wire.encode(told)))))
        assert slot.pinned == told
    assert [record.message for record in caplog.records] == [
        "worker of device 0 goes on without more pinned memory: not permitted"
    ]
    pool.close()


def test_a_forkserver_that_dies_before_any_worker_is_a_failed_boot() -> None:
    lost: list[tuple[int, str, bool]] = []
    spawner = Spawner(lambda: None, lambda *_: None, lambda *_: None, lambda _: None, "n0")
    boot = wire.Boot(0, 0, "cpu", 8 * MIB, "view", MIB, 1, 0.0)

    def told(slot: Slot, cause: str, charged: bool) -> None:
        lost.append((slot.incarnation, cause, charged))

    slot = Slot(boot, -1, spawner, lambda *_: None, lambda _: None, told, 10.0)
    slot.forkserver_lost("the forkserver died")
    slot.forkserver_lost("it died again")
    assert lost == [(1, "the forkserver died", False), (2, "it died again", False)]


class Scripted:
    """A slot whose forkserver and workers are this test: who says what first is its choice."""

    def __init__(self) -> None:
        self.news: asyncio.Queue[tuple[object, ...]] = asyncio.Queue()
        self.spawner = Spawner(lambda: None, lambda *_: None, lambda *_: None, lambda _: None, "n0")
        self.spawner._control, self._asked = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pool = os.memfd_create("pool")
        boot = wire.Boot(0, 0, "cpu", 8 * MIB, "view", MIB, 1, 0.0)
        self.slot = Slot(
            boot,
            self._pool,
            self.spawner,
            lambda *_: None,
            lambda one: self.news.put_nowait(("up", one.pid)),
            lambda _, cause, charged: self.news.put_nowait(("lost", cause, charged)),
            10.0,
        )

    def boot(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        """The next incarnation's process, of which nobody has told yet, and its end of the socket."""
        self.slot.boot()
        return self.asked()

    def asked(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        """What it was asked for, waiting for it."""
        _, descriptors, _, _ = socket.recv_fds(self._asked, forkserver.DATAGRAM, 2)
        os.close(descriptors[1])
        return subprocess.Popen(["sleep", "100"]), socket.socket(fileno=descriptors[0])

    async def told(self) -> tuple[object, ...]:
        async with asyncio.timeout(30):
            return await self.news.get()

    async def close(self) -> None:
        self.slot.forkserver_lost("the end")
        await asyncio.sleep(0)  # the link's transport closes in the next turn
        self.spawner.stop()
        self._asked.close()
        os.close(self._pool)


def test_a_worker_that_is_up_before_its_forkserver_tells_of_it_is_known_and_can_be_killed() -> None:
    """Two sockets tell of a boot, and either may be first. Else its pid came with the next heartbeat only."""

    async def tell() -> None:
        scripted = Scripted()
        process, worker = scripted.boot()
        worker.send(wire.encode(wire.Booted(process.pid, "numerics")))
        assert await scripted.told() == ("up", process.pid)
        scripted.slot.kill("it is not wanted any more")
        assert process.wait(30) == -signal.SIGKILL
        scripted.slot.spawned(1, process.pid)
        worker.close()
        await scripted.close()

    asyncio.run(tell())


def test_a_worker_that_is_to_die_before_it_is_known_dies_when_it_is() -> None:
    async def tell() -> None:
        scripted = Scripted()
        process, worker = scripted.boot()
        scripted.slot.kill("it was not wanted")
        scripted.slot.spawned(1, process.pid)
        assert process.wait(30) == -signal.SIGKILL
        worker.close()
        scripted.slot.exited(1, signal.SIGKILL)
        assert await scripted.told() == ("lost", "it was not wanted", True)
        await scripted.close()

    asyncio.run(tell())


def test_a_worker_that_cannot_be_asked_for_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    async def tell() -> None:
        scripted = Scripted()
        scripted.spawner.up = True
        with monkeypatch.context() as patch:
            patch.setattr(socket, "socketpair", fail)
            scripted.slot.boot()
        assert await scripted.told() == ("lost", "cannot be started: [Errno 24] Too many open files", True)
        process, worker = await asyncio.wait_for(asyncio.to_thread(scripted.asked), 30)
        assert scripted.slot.incarnation == 2
        process.kill()
        process.wait()
        worker.close()
        await scripted.close()

    asyncio.run(tell())


@pytest.mark.parametrize(
    ("verdict", "told"),
    [("", ("lost", "the forkserver died", False)), ("no step for 10 s", ("lost", "no step for 10 s", True))],
)
def test_a_worker_that_goes_with_its_forkserver_is_to_blame_only_for_what_it_did_before(
    verdict: str, told: tuple[object, ...]
) -> None:
    async def tell() -> None:
        scripted = Scripted()
        process, worker = scripted.boot()
        worker.send(wire.encode(wire.Booted(process.pid, "numerics")))
        await scripted.told()
        if verdict:
            scripted.slot.kill(verdict)
        scripted.slot.forkserver_lost("the forkserver died")
        assert await scripted.told() == told
        scripted.slot.forkserver_lost("the next one died too")
        assert await scripted.told() == ("lost", "the next one died too", False)
        process.kill()
        process.wait()
        worker.close()
        await scripted.close()

    asyncio.run(tell())


@pytest.mark.slow
def test_a_worker_that_is_refused_when_it_is_up_counts_as_a_failed_boot() -> None:
    lost: asyncio.Queue[tuple[int, str]] = asyncio.Queue()

    async def tell() -> None:
        pool = Pool(MIB)
        slot, spawner = forked(
            pool,
            lambda one: one.refuse("no memory"),
            lambda one, cause, _: lost.put_nowait((one.incarnation, cause)),
        )
        spawner.start()
        async with asyncio.timeout(60):
            assert await lost.get() == (1, "no memory")
            assert await lost.get() == (2, "no memory")
        assert slot._failed_boots == 2
        assert not slot.up
        spawner.stop()
        slot.forkserver_lost("stopped")
        await asyncio.sleep(0)
        pool.close()

    asyncio.run(tell())
