"""An agent's store, whose workers are the test: who waits for room in the DRAM tier, and who comes next."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Awaitable, Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from serverless_llm import wire
from serverless_llm.loader import manifest
from serverless_llm.node import store
from serverless_llm.node.options import AgentOptions, DeviceOptions
from serverless_llm.node.slot import Slot
from serverless_llm.node.store import Store
from tests.unit.loader.checkpoints import random, write

MIB = 1 << 20
VIEW, COPY, CUDA = 0, 1, 2  # devices
LARGE, SMALL, WHOLE = 20, 0.5, 7.5  # MiB of checkpoints; the pool has 8


class Place(Slot):
    """A device whose worker is up, and keeps what it is told."""

    def __init__(self) -> None:
        self.up = True
        self.told: list[wire.Message] = []

    def send(self, message: wire.Message, destination: int = 0, epoch: int = 0) -> None:
        self.told.append(message)


class Desk:
    """A store, and what it says to the head and to its workers."""

    def __init__(self, directory: Path, disk_rate: float = 0.0) -> None:
        self._directory = directory
        self._places = [Place(), Place(), Place()]
        self.told: list[wire.Message] = []
        devices = (
            DeviceOptions("cpu", MIB, "view"),
            DeviceOptions("cpu", MIB, "copy"),
            DeviceOptions("cuda", MIB, "copy"),
        )
        options = AgentOptions(str(directory / "state"), "n0", devices, 8 * MIB, disk_rate)
        self.store = Store(options, self.told.append, self._places.__getitem__)

    def start(
        self,
        number: int,
        megabytes: float,
        device: int = COPY,
        online: bool = True,
        tensors: dict[str, torch.Tensor] | None = None,
        verify: str = "off",
    ) -> None:
        """`tensors`: whose digests are known, instead of random ones."""
        source = write(self._directory / str(number), tensors or random(megabytes, number))
        found = manifest.build(source)
        if tensors:
            content = found.files[0].path.read_bytes()
            digests = [sha256(content[one.start : one.end]).digest() for one in found.files[0].header.tensors]
            self.store._sharing._know(found, digests)
        self.store.start(
            wire.StartLoad(number, device, f"m{number}", str(source), found.checkpoint, "float32", 0, online, verify)
        )

    def order(self, number: int) -> wire.Place:
        """What the worker of a replica was told of it."""
        places = (message for message in self._orders() if isinstance(message, wire.Place))
        return next(place for place in places if place.replica == number)

    async def serve(self, number: int, shared: Sequence[tuple[int, int, int]] = ()) -> None:
        """The replica's worker has all its bytes, and says that it serves."""
        await self.until(lambda: number in self.landed)
        self.store.placed(wire.Placed(number, 0.0, False, [*shared]))

    def _orders(self) -> list[wire.Message]:
        return [message for place in self._places for message in place.told]

    def heard(self, device: int) -> list[wire.Message]:
        return self._places[device].told

    @property
    def placed(self) -> list[int]:
        """Replicas that found room, in their order."""
        return [message.replica for message in self._orders() if isinstance(message, wire.Place)]

    @property
    def landed(self) -> list[int]:
        """Those whose worker was told of their last bytes."""
        return [message.replica for message in self._orders() if isinstance(message, wire.Landed) and message.last]

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                await asyncio.sleep(0.001)  # so that the threads that read get on

    async def waits(self, *numbers: int) -> None:
        await self.until(lambda: all(self.store._replicas[number].room for number in numbers))

    def leave(self, number: int) -> None:
        """The head unloads a replica, and its worker drops it."""
        self.store.unload(number)
        self.store.dropped(number)


def at_a_desk(directory: Path, tell: Callable[[Desk], Awaitable[None]], disk_rate: float = 0.0) -> None:
    async def whole() -> None:
        desk = Desk(directory, disk_rate)
        try:
            await tell(desk)
        finally:
            desk.store.close()

    asyncio.run(whole())


async def crowded(desk: Desk) -> None:
    """Two rings leave one slot: a third waits, for which nobody does, and then one for which somebody does."""
    for number in (1, 2):
        desk.start(number, LARGE)
        await desk.until(lambda: number in desk.placed)  # noqa: B023
    for number, online in ((3, False), (4, True)):
        desk.start(number, LARGE, online=online)
        await desk.waits(number)


@pytest.mark.parametrize("hastened", [False, True])
def test_the_most_urgent_finds_room_first(tmp_path: Path, hastened: bool) -> None:
    async def tell(desk: Desk) -> None:
        await crowded(desk)
        if hastened:
            desk.store.hasten(3)
        desk.leave(1)
        await desk.until(lambda: len(desk.placed) == 4)
        assert desk.placed == ([1, 2, 3, 4] if hastened else [1, 2, 4, 3])
        assert not any(isinstance(message, wire.LoadFailed) for message in desk.told)

    at_a_desk(tmp_path, tell)


def test_others_read_nothing_from_a_start_that_somebody_waits_for_to_its_first_read_or_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "PREPARED_S", 60.0)

    async def tell(desk: Desk) -> None:
        awaited = desk.store._reader._awaited
        desk.start(1, SMALL)
        desk.start(2, SMALL, online=False)
        await asyncio.sleep(0)
        assert awaited == {1}
        desk.store.hasten(2)
        assert awaited == {1, 2}
        await desk.until(lambda: {1, 2} <= {*desk.placed})
        assert awaited == set()
        shutil.rmtree(tmp_path / "1")
        desk.store.start(wire.StartLoad(3, COPY, "m3", str(tmp_path / "1"), "none", "float32", 0, True, "off"))
        await asyncio.sleep(0)
        assert awaited == {3}
        await desk.until(lambda: 3 not in desk.store._replicas)
        await desk.until(lambda: not awaited)

    at_a_desk(tmp_path, tell)


def test_of_two_starts_the_first_is_read_first_though_its_headers_take_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "PREPARED_S", 60.0)
    many = {f"{number}": torch.zeros(8) for number in range(10_000)} | {"large": torch.zeros(MIB // 2)}

    async def tell(desk: Desk) -> None:
        desk.start(1, SMALL, tensors=many)
        desk.start(2, 2)
        await desk.until(lambda: {1, 2} <= {*desk.landed})
        told = [message for message in desk.heard(COPY) if isinstance(message, wire.Landed)]
        assert next(message.replica for message in told) == 1
        assert desk.store._reader._awaited == set()

    at_a_desk(tmp_path, tell, disk_rate=20e6)


def test_a_load_that_ends_in_what_nobody_foresaw_is_told_and_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def exhausted(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def tell(desk: Desk) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", exhausted)
            desk.start(1, SMALL)
            await desk.until(lambda: 1 not in desk.store._replicas)
        assert desk.told == [wire.LoadFailed(1, "RuntimeError: can't start new thread", permanent=False)]
        assert "Traceback" in caplog.text
        assert desk.store._reader._awaited == set()
        desk.start(2, SMALL)
        await desk.serve(2)

    at_a_desk(tmp_path, tell)


def test_who_waits_for_room_holds_up_nobody_who_may_give_some_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "PREPARED_S", 60.0)

    async def tell(desk: Desk) -> None:
        await crowded(desk)
        desk.store.hasten(3)
        assert desk.store._reader._awaited == set()

    at_a_desk(tmp_path, tell)


def test_what_fits_does_not_wait_for_what_does_not(tmp_path: Path) -> None:
    async def tell(desk: Desk) -> None:
        await crowded(desk)
        desk.start(5, SMALL, online=False)
        await desk.until(lambda: 5 in desk.placed)
        assert desk.placed == [1, 2, 5]

    at_a_desk(tmp_path, tell)


def test_one_that_is_unloaded_waits_no_more(tmp_path: Path) -> None:
    async def tell(desk: Desk) -> None:
        await crowded(desk)
        desk.store.unload(4)
        assert wire.Unloaded(4) in desk.told
        desk.leave(1)
        await desk.until(lambda: len(desk.placed) == 3)
        assert desk.placed == [1, 2, 3]

    at_a_desk(tmp_path, tell)


def test_nobody_waits_for_what_stays(tmp_path: Path) -> None:
    """A model that is served from DRAM gives nothing back."""

    async def tell(desk: Desk) -> None:
        desk.start(1, WHOLE, VIEW)
        await desk.until(lambda: desk.placed)
        desk.start(2, LARGE)
        await desk.waits(2)
        desk.store.placed(wire.Placed(1, 0.0, leased=True))
        await desk.until(lambda: 2 not in desk.store._replicas)
        (failed,) = [message for message in desk.told if isinstance(message, wire.LoadFailed)]
        assert (failed.replica, failed.permanent) == (2, False)
        assert "of DRAM are needed for the weights" in failed.message

    at_a_desk(tmp_path, tell)


def test_what_is_on_its_way_out_is_waited_for(tmp_path: Path) -> None:
    async def tell(desk: Desk) -> None:
        desk.start(1, WHOLE, VIEW)
        await desk.until(lambda: desk.placed)
        desk.store.placed(wire.Placed(1, 0.0, leased=True))
        desk.store.unload(1)
        desk.start(2, LARGE)
        await desk.waits(2)
        desk.store.dropped(1)
        await desk.until(lambda: 2 in desk.placed)

    at_a_desk(tmp_path, tell)


@pytest.mark.parametrize(("first", "then"), [((LARGE, COPY), (WHOLE, VIEW)), ((WHOLE, VIEW), (LARGE, COPY))])
def test_room_that_comes_with_the_last_read_is_waited_for(
    tmp_path: Path, first: tuple[float, int], then: tuple[float, int]
) -> None:
    """Of a load whose worker is gone some reads are under way, into slots that nobody else may have."""

    async def tell(desk: Desk) -> None:
        desk.start(1, *first)
        await desk.until(lambda: desk.placed)
        desk.start(2, *then)
        await desk.waits(2)
        await desk.until(lambda: first[1] == VIEW or not desk.store._pipeline._fills)  # then the ring reads alone
        desk.store.worker_lost(first[1])
        await desk.until(lambda: 2 in desk.placed)

    at_a_desk(tmp_path, tell, disk_rate=20e6)


def test_views_are_told_of_what_lies_side_by_side_as_one_and_copies_are_not(tmp_path: Path) -> None:
    """A copy must not cross from one registered chunk of the pool into the next."""

    async def tell(desk: Desk) -> None:
        for number, device in ((1, VIEW), (2, COPY)):
            desk.start(number, 2.5, device)
            await desk.until(lambda: number in desk.landed)  # noqa: B023
            told = [message.pieces for message in desk.heard(device) if isinstance(message, wire.Landed)]
            assert any(length > MIB for pieces in told for _, _, length, _ in pieces) == (device == VIEW)
            assert sum(length for pieces in told for _, _, length, _ in pieces) == desk.order(number).files[0]

    at_a_desk(tmp_path, tell)


def test_gpus_are_told_which_memory_went(tmp_path: Path) -> None:
    async def tell(desk: Desk) -> None:
        desk.store._pool.punch([0, 3])
        assert desk.heard(CUDA) == [wire.Punched(0), wire.Punched(3 * MIB)]
        assert not desk.heard(COPY)

    at_a_desk(tmp_path, tell)


BASE = {name: torch.full((64,), number) for number, name in enumerate("abc")}
TUNED = BASE | {"b": torch.full((64,), 9)}


@pytest.mark.parametrize("verify", ["off", "sample"])
def test_a_worker_is_told_what_a_replica_has_in_common_with_those_that_serve_there(tmp_path: Path, verify: str) -> None:
    async def start(desk: Desk, number: int, *how: Any, **tensors: Any) -> None:
        desk.start(number, SMALL, *how, **tensors)
        await desk.until(lambda: number in desk.placed)

    async def tell(desk: Desk) -> None:
        for number, device in ((1, COPY), (3, CUDA), (4, COPY), (5, VIEW)):
            await start(desk, number, device, tensors=BASE)
            await desk.serve(number)
        desk.store.unload(4)
        await start(desk, 6)  # whose digests are not known
        await desk.serve(6)
        await start(desk, 7, tensors=BASE)  # whose bytes still come
        for number, device in ((2, COPY), (8, VIEW), (9, CUDA)):
            await start(desk, number, device, tensors=TUNED, verify=verify)
        lenders = {2: 1, 8: None, 9: 3} if verify == "off" else dict.fromkeys((2, 8, 9))
        for number, lender in lenders.items():
            assert desk.order(number).twins == ([(lender, 0, 0, 1), (lender, 2, 2, 1)] if lender else [])

    at_a_desk(tmp_path, tell)


def test_the_head_is_told_what_replicas_share(tmp_path: Path) -> None:
    async def tell(desk: Desk) -> None:
        for number in (1, 2):
            desk.start(number, SMALL)
            await desk.until(lambda: number in desk.placed)  # noqa: B023
        await desk.serve(1)
        before = desk.store.link_bytes()["upload"]
        shared = [(5, 1000, 1), (6, 500, 1), (7, 9, 99)]  # one has left meanwhile
        await desk.serve(2, shared)
        total = desk.store._replicas[2].load.total  # type: ignore[union-attr]
        assert desk.store.link_bytes()["upload"] - before == total - 1509
        (ready,) = (one for one in desk.told if isinstance(one, wire.ReplicaReady) and one.replica == 2)
        assert ready.shared == shared
        assert desk.store.shared() == [(1, 5, 1000), (1, 6, 500), (2, 5, 1000), (2, 6, 500), (2, 7, 9)]
        desk.leave(1)
        assert desk.store.shared() == [(2, 5, 1000), (2, 6, 500), (2, 7, 9)]

    at_a_desk(tmp_path, tell)


@pytest.mark.parametrize("ring", [False, True])
def test_what_only_a_server_has_outlives_what_a_disk_has(tmp_path: Path, ring: bool) -> None:
    async def tell(desk: Desk) -> None:
        for number in (1, 2):
            desk.start(number, 3.5)
            await desk.serve(number)
            desk.leave(number)
        far, near = (desk.order(number).checkpoint for number in (1, 2))
        desk.store._pipeline.remote.bandwidth = 1.0
        desk.store._away.watch(far, tmp_path / "1", MIB)
        before = dict(desk.store.resident())
        desk.start(3, LARGE if ring else 3.5)
        await desk.until(lambda: 3 in desk.placed)
        after = dict(desk.store.resident())
        assert after[far] == before[far]
        assert after.get(near, 0) < before[near]

    at_a_desk(tmp_path, tell)
