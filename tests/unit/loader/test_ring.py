"""Checkpoints larger than the room for them, copied to a device through slots that are used again and again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serverless_llm.errors import CapacityError, CheckpointError
from serverless_llm.loader import manifest
from serverless_llm.loader.link import Priority
from serverless_llm.loader.manifest import Manifest
from tests.unit.loader.checkpoints import Device, Node, random, write

SLOTS = 8  # of 1 MiB


@pytest.fixture
def node() -> Iterator[Node]:
    node = Node(SLOTS)
    yield node
    node.close()


def checkpoint(path: Path, *megabytes: float, seed: int = 0) -> Manifest:
    return manifest.build(write(path, *(random(size, seed + number) for number, size in enumerate(megabytes))))


def begin(node: Node, source: Manifest, holder: int = 1, priority: int = Priority.ONLINE) -> Device:
    device = Device(node.pool)
    node.load(source, holder, priority, device)
    device.load.start()
    return device


def finish(node: Node, device: Device) -> Device:
    """Copies whatever comes, until the load has ended."""
    while not device.over:
        if device.waiting:
            device.copy(device.waiting)
        else:
            node.turn()
    device.copy(device.waiting)
    return device


def check(source: Manifest, device: Device) -> None:
    assert not device.failures
    assert sum(span.length for span in device.spans) == device.load.done == device.load.total == source.file_bytes
    for number, file in enumerate(source.files):
        assert device.content[number] == (source.directory / file.name).read_bytes()


def drain(node: Node) -> None:
    """Until no ring has a slot; fails where one keeps any."""
    while node.tier._lent:
        node.turn()


def test_a_checkpoint_larger_than_the_pool_arrives_whole(tmp_path: Path, node: Node) -> None:
    source = checkpoint(tmp_path, 11.5, 9.3)
    assert not node.pipeline.fits(source)
    assert node.pipeline.fits(source, ring=True)
    device = finish(node, begin(node, source))
    check(source, device)
    load = device.load
    assert load.ringed
    assert load.came.total == source.file_bytes
    assert load.read_s > 0
    node.pipeline.release(source.checkpoint, 1)
    drain(node)
    assert node.pool.memory <= SLOTS << 20


def test_what_finds_free_slots_stays_and_is_not_read_again(tmp_path: Path, node: Node) -> None:
    source = checkpoint(tmp_path, 20)
    finish(node, begin(node, source))
    node.pipeline.release(source.checkpoint, 1)
    [(_, kept)] = node.tier.residents()
    assert kept == 2 << 20, "of eight slots three were the ring's, and two or three are for the next load"
    again = finish(node, begin(node, source, 2))
    check(source, again)
    assert again.load.dram_bytes == kept
    assert again.load.came.total == source.file_bytes - kept


def test_nothing_is_read_over_what_was_not_copied(tmp_path: Path, node: Node) -> None:
    source = checkpoint(tmp_path, 20)
    device = begin(node, source)
    while device.load.done < 5 << 20:
        node.turn()
    assert not node.reader._queue, "two slots are kept, three are the ring's: all were read"
    device.copy(device.waiting)
    assert node.reader._queue
    check(source, finish(node, device))


def test_with_room_for_all_there_is_no_ring(tmp_path: Path, node: Node) -> None:
    source = checkpoint(tmp_path, 5)
    device = finish(node, begin(node, source))
    check(source, device)
    assert not device.load.ringed
    assert node.tier.residents() == [(source.checkpoint, source.file_bytes)]


def test_others_leave_for_headers_and_ring_and_not_for_more(tmp_path: Path, node: Node) -> None:
    idle = checkpoint(tmp_path / "idle", 2.5, seed=9)
    node.fetch(idle)
    node.pipeline.release(idle.checkpoint, 1)
    source = checkpoint(tmp_path / "large", 20)
    check(source, finish(node, begin(node, source)))
    residents = dict(node.tier.residents())
    assert residents[idle.checkpoint] == idle.file_bytes
    assert residents[source.checkpoint] == 1 << 20, "of eight slots three are the idle one's, three were the ring's"


@pytest.mark.parametrize("one", [True, False])
def test_two_at_once(tmp_path: Path, node: Node, one: bool) -> None:
    sources = [checkpoint(tmp_path / "a", 12), checkpoint(tmp_path / "b", 12, seed=5)]
    if one:
        sources[1] = sources[0]
    devices = [begin(node, source, holder) for holder, source in enumerate(sources)]
    while not all(device.over for device in devices):
        if any(device.waiting for device in devices):
            for device in devices:
                device.copy()
        else:
            node.turn()
    for source, device in zip(sources, devices, strict=True):
        check(source, finish(node, device))
        node.pipeline.release(source.checkpoint, devices.index(device))
    drain(node)


def test_a_ring_stays_as_wide_however_often_it_is_loaded(tmp_path: Path) -> None:
    node, widths = Node(16), []
    source = checkpoint(tmp_path, 30)
    for holder in range(5):
        device = begin(node, source, holder)
        widths.append(len(node.tier._lent))
        check(source, finish(node, device))
        node.pipeline.release(source.checkpoint, holder)
        drain(node)
    assert min(widths) == widths[0] == 7
    node.close()


def test_what_it_kept_gives_way_to_its_ring(tmp_path: Path, node: Node) -> None:
    source, other = checkpoint(tmp_path / "large", 3.5, 3.5), checkpoint(tmp_path / "other", 1.5, seed=9)
    check(source, finish(node, begin(node, source)))
    node.pipeline.release(source.checkpoint, 1)
    node.fetch(other, 2)
    assert len(node.tier.free_slots) == 0
    device = finish(node, begin(node, source, 3))
    check(source, device)
    assert device.load.ringed
    assert device.load.dram_bytes > 2 << 20


def test_what_others_refer_to_does_not_give_way(tmp_path: Path, node: Node) -> None:
    source = checkpoint(tmp_path / "large", 20)
    first = begin(node, source, 1)
    node.fetch(checkpoint(tmp_path / "other", 2.5, seed=9), 2)
    with pytest.raises(CapacityError, match="of DRAM are needed for the weights"):
        begin(node, source, 3)
    check(source, finish(node, first))


def test_it_fits_where_headers_fill_the_pool(tmp_path: Path, node: Node) -> None:
    source = checkpoint(tmp_path, *[0.5] * SLOTS)
    assert node.pipeline.fits(source, ring=True)
    check(source, finish(node, begin(node, source)))


def test_who_waits_hastens_all_of_a_ring_s_reads(tmp_path: Path) -> None:
    node = Node(SLOTS, rate=40e6)
    sources = [checkpoint(tmp_path / name, 9, seed=seed) for seed, name in enumerate("ab")]
    before, device = (begin(node, source, holder, Priority.PREFETCH) for holder, source in enumerate(sources))
    device.load.hasten(Priority.ONLINE)
    priorities = []
    while not device.over:
        with node.reader._wake:
            priorities += [one.rank.priority for one in node.reader._queue if one.files is device.load.route.files]
        device.copy(device.waiting)
        node.turn()
    assert set(priorities) == {Priority.ONLINE}
    assert not before.over
    check(sources[1], finish(node, device))
    node.close()


def test_beside_what_is_leased_it_goes_through_what_is_left(tmp_path: Path, node: Node) -> None:
    leased, source = checkpoint(tmp_path / "leased", 5.5, seed=9), checkpoint(tmp_path / "small", 4)
    node.fetch(leased, 7)
    check(source, finish(node, begin(node, source)))
    full = Node(2)
    try:
        full.fetch(checkpoint(tmp_path / "two", 0.9, 0.9, seed=3), 7)
        with pytest.raises(CapacityError, match="of DRAM are needed for the weights"):
            full.load(source, told=Device(full.pool))
        full.tier.check_invariants()
    finally:
        full.close()


@pytest.mark.parametrize("after", [0, 3, 9])
def test_cancelled_at_any_time_it_gives_everything_back(tmp_path: Path, node: Node, after: int) -> None:
    source = checkpoint(tmp_path, 20)
    device = begin(node, source)
    while len(device.spans) < after:
        device.copy(device.waiting)
        node.turn()
    device.load.cancel()
    told = len(device.spans)
    node.pipeline.release(source.checkpoint, 1)
    drain(node)
    assert len(device.spans) == told
    check(source, finish(node, begin(node, source, 2)))


def test_a_file_that_changes_meanwhile_ends_it_once(tmp_path: Path, node: Node) -> None:
    source = checkpoint(tmp_path, 20)
    device = begin(node, source)
    os.utime(tmp_path / manifest.SINGLE, ns=(0, 0))
    finish(node, device)
    assert [type(error) for error in device.failures] == [CheckpointError]
    assert "was changed" in str(device.failures[0])
    node.pipeline.release(source.checkpoint, 1)
    drain(node)
    assert node.tier.residents() == []


def test_after_an_error_nothing_of_it_is_trusted_though_it_is_leased(tmp_path: Path, node: Node) -> None:
    source = checkpoint(tmp_path, 20)
    device = begin(node, source)
    while device.load.done < 5 << 20:
        node.turn()
    os.utime(tmp_path / manifest.SINGLE, ns=(0, 0))
    finish(node, device)
    assert device.failures
    os.utime(tmp_path / manifest.SINGLE, ns=(0, source.files[0].mtime_ns))
    again = begin(node, source, 2)
    assert again.load.dram_bytes == 0
    check(source, finish(node, again))


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.floats(0.1, 6), min_size=1, max_size=3), spare=st.integers(1, 5), seed=st.integers(0, 999))
def test_whatever_the_sizes_and_the_pace(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[float], spare: int, seed: int
) -> None:
    pace = Random(seed)  # what comes when is up to threads
    node = Node(len(sizes) + spare)
    try:
        source = checkpoint(tmp_path_factory.mktemp("ring"), *sizes)
        device = begin(node, source)
        while not device.over:
            if device.waiting and (node.posts.empty() or pace.random() < 0.5):
                device.copy(pace.randint(1, 4))
            else:
                node.turn()
        check(source, finish(node, device))
        node.pipeline.release(source.checkpoint, 1)
        drain(node)
    finally:
        node.close()
