"""Loads through tier, reader and pool, as an agent's store drives them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from serverless_llm.errors import CapacityError, TransientError
from serverless_llm.loader import manifest, toucher
from serverless_llm.loader.link import Priority
from serverless_llm.loader.manifest import Manifest
from serverless_llm.loader.toucher import Toucher
from tests.unit.loader.checkpoints import Node, Told, random, write

SLOW = 20e6  # bytes per second: a call is 50 ms


@pytest.fixture
def node() -> Iterator[Node]:
    node = Node()
    yield node
    node.close()


@pytest.fixture
def slow() -> Iterator[Node]:
    node = Node(rate=SLOW)
    yield node
    node.close()


def checkpoint(path: Path, megabytes: float, seed: int = 0) -> Manifest:
    return manifest.build(write(path, random(megabytes, seed), random(0.1, seed + 1)))


def check(node: Node, source: Manifest, told: Told) -> None:
    assert sum(span.length for span in told.spans) == told.load.done == told.load.total == source.file_bytes
    for number, file in enumerate(source.files):
        assert node.bytes_of(told, number, file.size) == (source.directory / file.name).read_bytes()


def test_cold_then_from_dram(tmp_path: Path, node: Node) -> None:
    source = checkpoint(tmp_path, 2.5)
    told = node.fetch(source)
    check(node, source, told)
    load = told.load
    assert load.came.total == source.file_bytes
    assert load.dram_bytes == 0
    assert load.queue_s >= 0
    assert load.read_s > 0
    again = node.fetch(source, 2)
    check(node, source, again)
    assert (again.load.dram_bytes, again.load.read_s) == (source.file_bytes, 0)
    assert again.calls == [len(again.spans)]
    assert node.tier.holders(source.checkpoint) == {1, 2}


def test_a_cap_makes_progress_visible_and_teaches_the_link(tmp_path: Path, slow: Node) -> None:
    source = checkpoint(tmp_path, 2.5)
    told = slow.fetch(source)
    check(slow, source, told)
    assert len(told.calls) >= 3
    assert slow.pipeline.disk.bandwidth == pytest.approx(SLOW, rel=0.3)
    assert slow.pipeline.disk.bytes == source.file_bytes


@pytest.mark.parametrize("joins", [True, False])
def test_whoever_waits_goes_first(tmp_path: Path, joins: bool) -> None:
    node = Node(12, rate=SLOW)
    try:
        sources = [checkpoint(tmp_path / name, 4.5, number) for number, name in enumerate("ab")]
        prefetches = [node.load(source, number, Priority.PREFETCH) for number, source in enumerate(sources)]
        for told in prefetches:
            told.load.start()
        if joins:  # a second replica of what comes last
            waited = node.load(sources[1], 2, Priority.ONLINE)
            waited.load.start()
        else:
            waited = prefetches[1]
            waited.load.hasten(Priority.ONLINE)
        node.finish(waited)
        assert not prefetches[0].over
        node.finish(prefetches[0])
    finally:
        node.close()


def test_when_who_waits_has_gone_the_rest_wait_like_others(tmp_path: Path, slow: Node) -> None:
    sources = [checkpoint(tmp_path / name, 2.5, number) for number, name in enumerate("ab")]
    before, shared = (slow.load(source, number, Priority.PREFETCH) for number, source in enumerate(sources))
    before.load.start()
    shared.load.start()
    waited = slow.load(sources[1], 2, Priority.ONLINE)
    waited.load.start()
    waited.load.cancel()
    slow.finish(shared)
    assert before.over


def test_two_loads_share_one_read(tmp_path: Path, slow: Node) -> None:
    source = checkpoint(tmp_path, 2.5)
    first = slow.load(source, 1)
    first.load.start()
    slow.turn()
    second = slow.load(source, 2)
    second.load.start()
    assert second.spans == first.spans
    slow.finish(first)
    for told in (first, second):
        assert told.last == 1
        check(slow, source, told)
    assert second.load.dram_bytes + second.load.came.total == source.file_bytes
    assert slow.pipeline.disk.bytes == source.file_bytes


def test_one_of_two_loads_may_go(tmp_path: Path, slow: Node) -> None:
    source = checkpoint(tmp_path, 1.5)
    first, second = slow.load(source, 1), slow.load(source, 2)
    first.load.start()
    second.load.start()
    first.load.cancel()
    first.load.cancel()
    check(slow, source, slow.finish(second))
    assert first.spans == []


def test_a_listener_may_cancel_another(tmp_path: Path, node: Node) -> None:
    source = checkpoint(tmp_path, 1.5)
    second = Told()
    first = node.pipeline.load(source, 1, lambda spans, last: second.load.cancel(), second.failures.append)
    second.load = node.pipeline.load(source, 2, second.landed, second.failures.append)
    first.start()
    second.load.start()
    while first.done < first.total:
        node.turn()
    assert second.spans == []


def test_a_cancelled_load_keeps_whole_pieces_and_its_lease(tmp_path: Path, slow: Node) -> None:
    source = checkpoint(tmp_path, 4)
    told = slow.load(source)
    told.load.start()
    while not slow.tier.residents():
        slow.turn()
    told.load.cancel()
    while source.checkpoint in slow.pipeline._fills:
        slow.turn()
    before = len(told.spans)
    reserved = len(told.load.slots)
    assert len(slow.tier.free_slots) == 8 - reserved  # all stay while the worker may refer to them
    slow.pipeline.release(source.checkpoint, 1)
    kept = dict(slow.tier.residents())[source.checkpoint]
    assert 0 < kept < source.file_bytes
    assert slow.tier.used_bytes <= kept + (1 << 20)
    assert len(told.spans) == before
    again = slow.fetch(source, 2)
    check(slow, source, again)
    assert again.load.dram_bytes == kept


def test_joining_what_was_just_cancelled(tmp_path: Path, slow: Node) -> None:
    source = checkpoint(tmp_path, 3)
    first = slow.load(source, 1)
    first.load.start()
    slow.turn()
    first.load.cancel()
    second = slow.load(source, 2)
    second.load.start()
    assert second.spans == []
    check(slow, source, slow.finish(second))


def test_joining_what_was_cancelled_when_all_had_landed(tmp_path: Path, node: Node) -> None:
    source = checkpoint(tmp_path, 1)
    first = node.load(source, 1)
    first.load.start()
    news = node.posts.get(timeout=30)  # all in two calls, since there are two files
    other = node.posts.get(timeout=30)
    first.load.cancel()
    second = node.load(source, 2)
    second.load.start()
    news()
    other()
    check(node, source, second)
    assert second.load.dram_bytes == source.file_bytes
    assert first.spans == []


def test_eviction_takes_tails_and_only_they_are_read_again(tmp_path: Path, node: Node) -> None:
    first, second = checkpoint(tmp_path / "a", 4, seed=0), checkpoint(tmp_path / "b", 4, seed=10)
    for source in (first, second):
        check(node, source, node.fetch(source))
        node.pipeline.release(source.checkpoint, 1)
    kept = dict(node.tier.residents())[first.checkpoint]
    assert 0 < kept < first.file_bytes
    told = node.fetch(first, 2)
    check(node, first, told)
    assert told.load.dram_bytes == kept


def test_too_large_and_too_large_now(tmp_path: Path, node: Node) -> None:
    huge, first, second = (checkpoint(tmp_path / name, size) for name, size in (("h", 9), ("a", 5), ("b", 4)))
    assert not node.pipeline.fits(huge)
    with pytest.raises(CapacityError, match=r"11\.5 MB of DRAM are needed"):
        node.load(huge)
    node.fetch(first)
    assert node.pipeline.fits(second)
    with pytest.raises(CapacityError):
        node.load(second, 2)
    assert node.tier.holders(second.checkpoint) == frozenset()
    node.pipeline.release(first.checkpoint, 1)
    check(node, second, node.fetch(second, 2))


def test_a_changed_file_fails_all_who_wait_and_leaves_nothing(tmp_path: Path, slow: Node) -> None:
    source = checkpoint(tmp_path, 3)
    first, second = slow.load(source, 1), slow.load(source, 2)
    first.load.start()
    second.load.start()
    slow.turn()
    os.utime(source.directory / source.files[0].name, ns=(0, 0))
    slow.finish(first)
    assert [str(error) for error in first.failures] == [str(error) for error in second.failures]
    assert "changed after its header was read" in str(first.failures[0])
    assert not isinstance(first.failures[0], TransientError)
    for holder in (1, 2):
        slow.pipeline.release(source.checkpoint, holder)
    assert slow.tier.used_bytes == 0


def test_a_missing_file_fails_the_load_and_leaves_nothing(tmp_path: Path, node: Node) -> None:
    source = checkpoint(tmp_path, 1)
    (source.directory / source.files[1].name).unlink()
    told = node.fetch(source)
    assert "No such file" in str(told.failures[0])
    assert isinstance(told.failures[0], TransientError)
    node.pipeline.release(source.checkpoint, 1)
    assert node.tier.used_bytes == 0


def test_memory_is_taken_ahead_of_need_and_kept_for_the_largest(tmp_path: Path) -> None:
    node = Node(slots=16, ahead=2 << 20)
    assert node.pool.memory == 2 << 20
    sources = [checkpoint(tmp_path / str(megabytes), megabytes, megabytes) for megabytes in (4, 6)]
    for source in sources:
        check(node, source, node.fetch(source))
        node.settle()
        node.pipeline.release(source.checkpoint, 1)
        assert not node.pipeline._ahead._trimming  # nothing is free that was not
    largest = node.tier.wanted << 20
    assert largest > sources[1].file_bytes
    assert node.pool.memory > sources[0].file_bytes + sources[1].file_bytes
    for _ in range(2):
        for source in sources:
            node.pipeline.forget(source.checkpoint)
    left = node.settle()
    assert left == sorted(left, reverse=True)
    assert len(set(left)) > 4  # slot by slot
    assert largest - (2 << 20) < left[-1] <= largest  # the last slot of a file was written in part
    node.close()


def test_what_was_refused_is_not_waited_for(tmp_path: Path, node: Node) -> None:
    before = node.tier.wanted
    with pytest.raises(CapacityError):
        node.load(checkpoint(tmp_path, 20))
    assert node.tier.wanted == before


def test_none_is_taken_while_bytes_are_read(tmp_path: Path, slow: Node) -> None:
    told = slow.load(checkpoint(tmp_path, 2))
    told.load.start()
    slow.pipeline.forget("nobody")
    taking = slow.pipeline._ahead._trimming
    slow.finish(told)
    assert (taking, slow.pipeline._ahead._trimming) == (False, True)


def test_none_is_taken_soon_after_bytes_were_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node(slots=16, ahead=4 << 20, pause=3600)
    delays: list[float] = []
    monkeypatch.setattr(Toucher, "touch", lambda _toucher, _slot, delay, _done: delays.append(delay))
    node.fetch(checkpoint(tmp_path, 2))
    assert [3500 < delay <= 3600 for delay in delays] == [True]
    node.close()


def test_none_is_taken_soon_after_bytes_were_found_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node(slots=16, pause=3600)
    delays: list[float] = []
    monkeypatch.setattr(Toucher, "touch", lambda _toucher, _slot, delay, _done: delays.append(delay))
    source = checkpoint(tmp_path, 2)
    node.fetch(source)
    node.pipeline._ahead._quiet_at = 0.0  # an hour later
    node.fetch(source, 2)
    node.pipeline._ahead._trimmed(True)  # the first slot is touched
    assert [3500 < delay <= 3600 for delay in delays] == [True, True]
    node.close()


def test_where_there_is_no_memory_none_is_taken_until_the_next_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toucher, "MARGIN", 1 << 60)
    node = Node(slots=16, ahead=4 << 20)
    assert node.pool.memory == 0
    monkeypatch.undo()
    source = checkpoint(tmp_path, 2)
    node.fetch(source)
    node.settle()
    assert node.pool.memory >= 6 << 20
    node.close()


def test_a_closed_one_takes_and_gives_nothing(tmp_path: Path, node: Node) -> None:
    source = checkpoint(tmp_path, 6)
    node.fetch(source)
    node.pipeline.release(source.checkpoint, 1)
    node.pipeline.close()
    while not node.posts.empty():
        node.turn()
    before = node.pool.memory
    node.pipeline.forget(source.checkpoint)
    assert (node.pool.memory, node.posts.empty()) == (before, True)
