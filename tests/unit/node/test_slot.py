"""A slot against a real forkserver."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable

import pytest

from serverless_llm import wire
from serverless_llm.loader.pool import Pool
from serverless_llm.node import slot as slots
from serverless_llm.node.slot import Slot
from serverless_llm.node.spawner import Spawner

MIB = 1 << 20


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
        spawner = Spawner(
            lambda: slot.boot(),
            lambda device, incarnation, pid: slot.spawned(incarnation, pid),
            lambda device, incarnation, status: slot.exited(incarnation, status),
            lambda cause: slot.forkserver_lost(cause),
        )
        boot = wire.Boot(0, 0, "cpu", 8 * MIB, "view", pool.capacity, 1, 0.0)
        slot = Slot(boot, pool.fd, spawner, says("frame"), says("up"), says("lost"), 10.0)
        spawner.start()
        await until("up")
        slot.check()  # nothing is owed
        assert spawner._process is not None
        first = spawner._process.pid
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


def test_a_forkserver_that_dies_before_any_worker_is_a_failed_boot() -> None:
    lost: list[tuple[int, str]] = []
    spawner = Spawner(lambda: None, lambda *_: None, lambda *_: None, lambda _: None)
    boot = wire.Boot(0, 0, "cpu", 8 * MIB, "view", MIB, 1, 0.0)

    def told(slot: Slot, cause: str) -> None:
        lost.append((slot.incarnation, cause))

    slot = Slot(boot, -1, spawner, lambda *_: None, lambda _: None, told, 10.0)
    slot.forkserver_lost("the forkserver died")
    slot.forkserver_lost("it died again")
    assert lost == [(1, "the forkserver died"), (2, "it died again")]


@pytest.mark.slow
def test_a_worker_that_is_refused_when_it_is_up_counts_as_a_failed_boot() -> None:
    lost: asyncio.Queue[tuple[int, str]] = asyncio.Queue()

    async def tell() -> None:
        pool = Pool(MIB)
        spawner = Spawner(
            lambda: slot.boot(),
            lambda device, incarnation, pid: slot.spawned(incarnation, pid),
            lambda device, incarnation, status: slot.exited(incarnation, status),
            lambda cause: slot.forkserver_lost(cause),
        )
        boot = wire.Boot(0, 0, "cpu", 8 * MIB, "view", pool.capacity, 1, 0.0)
        slot = Slot(
            boot,
            pool.fd,
            spawner,
            lambda *_: None,
            lambda one: one.refuse("no memory"),
            lambda one, cause: lost.put_nowait((one.incarnation, cause)),
            10.0,
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


@pytest.mark.slow
def test_a_worker_that_is_up_before_the_forkserver_says_so_is_known_by_its_pid_and_can_be_killed() -> None:
    """On a busy machine the child may run before its parent does again."""
    held: list[int] = []
    ups: asyncio.Queue[int] = asyncio.Queue()
    lost: asyncio.Queue[str] = asyncio.Queue()

    async def tell() -> None:
        pool = Pool(MIB)
        spawner = Spawner(
            lambda: slot.boot(),
            lambda device, incarnation, pid: held.append(pid),
            lambda device, incarnation, status: slot.exited(incarnation, status),
            lambda cause: slot.forkserver_lost(cause),
        )
        boot = wire.Boot(0, 0, "cpu", 8 * MIB, "view", pool.capacity, 1, 0.0)
        slot = Slot(
            boot,
            pool.fd,
            spawner,
            lambda *_: None,
            lambda one: ups.put_nowait(one.pid),
            lambda _, cause: lost.put_nowait(cause),
            10.0,
        )
        spawner.start()
        async with asyncio.timeout(60):
            pid = await ups.get()
            slot.kill("no longer wanted")
            assert await lost.get() == "no longer wanted"
        assert pid == held[0]
        spawner.stop()
        slot.forkserver_lost("stopped")
        await asyncio.sleep(0)
        pool.close()

    asyncio.run(tell())
