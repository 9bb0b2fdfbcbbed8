"""Loads that end before their time, whenever that is: nothing of them is left, and others are right."""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serverless_llm.errors import CapacityError
from serverless_llm.loader import manifest, reader
from serverless_llm.loader.manifest import SINGLE, Manifest
from serverless_llm.loader.plan import Landed
from tests.serving import descriptors, until
from tests.unit.loader.checkpoints import Device, Node, Told, random, write

SUFFIX = ".safetensors"
QUARTER = 256 << 10  # bytes of a call: four for a slot


@pytest.fixture(autouse=True)
def _short_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "CALL_BYTES", QUARTER)
    monkeypatch.setattr(reader, "STAGED_CALL_BYTES", QUARTER)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    root = tmp_path_factory.mktemp("sources")
    shards = [[random(3, 1), random(2.5, 2)], [random(2, 3)], [random(0.5, 4), random(4, 5)]]
    return [manifest.build(write(root / str(number), *some)) for number, some in enumerate(shards)]


def opened() -> list[str]:
    """Files of weights that this process has open; what is at hand besides is not the loads'."""
    return [link for link in descriptors(os.getpid()) if SUFFIX in link]


def begin(node: Node, source: Manifest, holder: int, copies: bool) -> Told:
    told = node.load(source, holder, told=Device(node.pool) if copies else Told())
    told.load.start()
    return told


def advance(told: Told, node: Node) -> None:
    """The device copies what it has, if it is one, and one piece of news comes."""
    if isinstance(told, Device) and told.waiting:
        told.copy(told.waiting)
    else:
        node.turn()


def whole(told: Told, node: Node) -> Told:
    """When all of it has come, and was copied."""
    while not told.over or (isinstance(told, Device) and told.waiting):
        advance(told, node)
    return told


def check(node: Node, source: Manifest, told: Told) -> None:
    for number, file in enumerate(source.files):
        came = told.content[number] if isinstance(told, Device) else node.bytes_of(told, number, file.size)
        assert came == (source.directory / file.name).read_bytes()


def settle(node: Node) -> None:
    """Until nothing is being read any more; fails where something goes on for ever."""
    while node.tier._lent or node.pipeline._fills:
        node.turn()


def release(node: Node, source: Manifest, holder: int, told: Told) -> None:
    told.load.cancel()
    node.pipeline.release(source.checkpoint, holder)


@pytest.mark.parametrize("copies", [False, True], ids=["tier", "ring"])
def test_cancelled_after_any_news_a_load_leaves_nothing(sources: list[Manifest], copies: bool) -> None:
    source = sources[0]
    for news in count():
        node = Node(4 if copies else 8)
        told = begin(node, source, 1, copies)
        for _ in range(news):
            if not told.over:
                advance(told, node)
        over, heard = told.over, len(told.spans)
        release(node, source, 1, told)
        settle(node)
        assert len(told.spans) == heard
        assert opened() == []
        check(node, source, _finished(node, source, copies))
        node.pipeline.forget(source.checkpoint)
        assert node.tier.used_bytes == 0
        node.close()
        if over:
            break
    assert news > 20


def _finished(node: Node, source: Manifest, copies: bool) -> Told:
    """A load after it, whole."""
    told = whole(begin(node, source, 2, copies), node)
    release(node, source, 2, told)
    settle(node)
    return told


@settings(max_examples=30)
@given(seed=st.integers(0, 1 << 32), slots=st.sampled_from([4, 8, 12]))
def test_any_loads_that_end_at_any_time_leave_nothing(sources: list[Manifest], seed: int, slots: int) -> None:
    """Of one checkpoint or several, in the tier and through rings, cancelled, released, forgotten, failed."""
    rng, node = Random(seed), Node(slots)
    there: dict[int, tuple[Manifest, Told]] = {}
    for holder in range(150):
        if len(there) < 3 and rng.random() < 0.3:
            source = rng.choice(sources)
            try:
                there[holder] = source, begin(node, source, holder, rng.random() < 0.7)
            except CapacityError:
                continue
        elif there:
            holder, (source, told) = rng.choice(list(there.items()))
            _act(node, source, holder, told, rng)
            if holder not in node.tier.holders(source.checkpoint):
                del there[holder]
    for holder, (source, told) in there.items():
        release(node, source, holder, told)
    settle(node)
    for source in sources:
        node.pipeline.forget(source.checkpoint)
        for file in source.files:
            os.utime(file.path, ns=(0, file.mtime_ns))
    assert node.tier.used_bytes == 0
    assert opened() == []
    node.close()


def _act(node: Node, source: Manifest, holder: int, told: Told, rng: Random) -> None:
    match rng.choice(["go on"] * 12 + ["cancel", "release", "forget", "change"]):
        case "cancel":
            told.load.cancel()
        case "release":
            release(node, source, holder, told)
        case "forget":
            node.pipeline.forget(source.checkpoint)
        case "change":  # for who opens or closes it while it is so
            file = rng.choice(source.files)
            os.utime(file.path, ns=(0, rng.choice([0, file.mtime_ns, file.mtime_ns])))
        case _ if told.last and not (isinstance(told, Device) and told.waiting):
            check(node, source, told)
        case _ if node.reader._queue or not node.posts.empty() or (isinstance(told, Device) and told.waiting):
            advance(told, node)


def test_what_is_read_anew_after_a_cancelled_read_keeps_its_slots(sources: list[Manifest]) -> None:
    """All had landed, some was not to be trusted, and who joined meanwhile has it read again."""
    source, node = sources[1], Node(8)
    first = begin(node, source, 1, False)
    until(lambda: not node.reader._queue, "all to be read, of which no turn has told yet")
    assert not node.pipeline.discard(source, [Landed(0, 0, 1, 0)])
    first.load.cancel()
    second = begin(node, source, 2, False)
    fill = node.pipeline._fills[source.checkpoint]
    while node.pipeline._fills.get(source.checkpoint) is fill:
        node.turn()
    release(node, source, 1, first)
    release(node, source, 2, second)
    assert len(node.tier.free_slots) == 8 - len(second.load.slots)  # what is being read into is nobody else's
    settle(node)
    node.tier.check_invariants()
    check(node, source, _finished(node, source, False))
    node.close()


def test_a_load_that_failed_reads_and_tells_no_more(sources: list[Manifest]) -> None:
    """What stays in the tier cannot be read, while what passes through the ring could."""
    source, node = sources[2], Node(4)
    os.utime(source.files[0].path, ns=(0, 0))
    told = begin(node, source, 1, True)
    assert told.load.ringed
    while not told.over:
        advance(told, node)
    heard = len(told.spans)
    while node.reader._queue:
        node.turn()
    assert isinstance(told, Device)
    told.copy(told.waiting)
    assert not node.reader._queue
    assert (len(told.failures), len(told.spans)) == (1, heard)
    os.utime(source.files[0].path, ns=(0, source.files[0].mtime_ns))
    release(node, source, 1, told)
    settle(node)
    assert (node.tier.used_bytes, opened()) == (0, [])
    node.close()


# --- a read that does not return ---


@pytest.fixture
def stuck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    """A checkpoint whose file is a pipe by now: it opens when somebody writes to it."""
    monkeypatch.setattr(reader, "STUCK_S", 0.02)
    source = manifest.build(write(tmp_path / "stuck", random(4.5, 77)))
    (source.directory / SINGLE).unlink()
    os.mkfifo(source.directory / SINGLE)
    return source


def let_go(source: Manifest) -> None:
    os.close(os.open(source.directory / SINGLE, os.O_RDWR))


@pytest.mark.parametrize("copies", [False, True], ids=["tier", "ring"])
def test_beside_a_read_that_is_stuck_others_load_and_its_slots_are_nobodys(
    sources: list[Manifest], stuck: Manifest, copies: bool
) -> None:
    node, other = Node(4 if copies else 7), sources[1]
    hung = begin(node, stuck, 1, copies)

    def hanging() -> set[reader.Transfer]:
        return {read.transfer for read in node.reader._reads if read.stuck}

    until(lambda: len(hanging()) == 1 + copies, "all of it to be stuck")
    held = node.tier.used_bytes
    release(node, stuck, 1, hung)
    assert node.tier.used_bytes == held
    told = whole(begin(node, other, 7, True), node)
    check(node, other, told)
    assert (hung.load.ringed, told.load.ringed) == (copies, False)
    with pytest.raises(CapacityError):
        node.load(sources[0], 3)
    let_go(stuck)
    release(node, other, 7, told)
    settle(node)
    node.pipeline.forget(other.checkpoint)
    assert (node.tier.used_bytes, opened()) == (0, [])
    assert (hung.spans, hung.failures) == ([], [])
    node.close()
