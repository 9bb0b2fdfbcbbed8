"""What stands between a load and its replica: real files, a real pool, flipped bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from itertools import takewhile
from pathlib import Path

import pytest

from serverless_llm.loader import digest, manifest
from serverless_llm.loader.digest import BLOCK, Digests, Due, Key
from serverless_llm.loader.hasher import Hasher
from serverless_llm.loader.manifest import Manifest
from serverless_llm.loader.plan import Landed
from serverless_llm.loader.waiting import Load
from serverless_llm.node.check import IN_A_TURN, Check, Tally, Verdicts
from serverless_llm.node.digests import sizes_of
from tests.unit.loader.checkpoints import Node, random, write

MEGABYTES = 5
PLACE = 3 * BLOCK + 77  # of a byte to be flipped


class Start:
    """One replica's start, as an agent's store begins it."""

    def __init__(
        self,
        node: Bench,
        source: Manifest,
        holder: int,
        known: Digests | None,
        due: Due,
        ring: bool,
        suspect: AbstractSet[Key],
    ) -> None:
        self._node = node
        self._source = source
        self._holder = holder
        self.spans: list[Landed] = []
        self.arrived: list[Landed] = []
        self.learned: Digests | None = None
        self.again: list[Landed] = []
        self.failed: list[Landed] = []
        self.last = False
        verdicts = Verdicts(self._passed, self._learn, self._reload, self._fail)
        self.check = Check(
            sizes_of(source), known, due, node.hasher, node.posts.put, verdicts, node.tally, suspect, ring
        )
        self.told = self.copied = 0
        self._before = node.tally.bytes
        self._partial = due is not digest.every
        self._ring = ring
        self.load = self._begin()

    def _begin(self) -> Load:
        failures: list[Exception] = []
        load = self._node.pipeline.load(self._source, self._holder, self._landed, failures.append, ring=self._ring)
        load.start()
        return load

    def _landed(self, spans: Sequence[Landed], last: bool) -> None:
        self.arrived += spans
        self.check.landed(spans, last)

    def _passed(self, spans: Sequence[Landed], last: bool) -> None:
        assert not self.last
        self.spans += spans
        self.last = last
        self.told += sum(span.length for span in spans)
        slot = self._node.pool.slot_bytes
        assert all(span.offset // slot == (span.offset + span.length - 1) // slot for span in spans)
        assert self._partial or self.told <= self._node.tally.bytes - self._before

    def _learn(self, digests: Digests) -> None:
        assert self.learned is None
        self.learned = digests

    def _reload(self, blocks: Sequence[Landed]) -> None:
        assert not self.again
        self.again += blocks
        if self.load.ringed:
            return
        assert self._node.pipeline.discard(self._source, blocks)
        self.load = self._begin()

    def _fail(self, blocks: Sequence[Landed]) -> None:
        self.failed += blocks

    def finish(self) -> Start:
        while not self.last and not self.failed:
            self._node.turn()
        return self


class Bench(Node):
    """The loader's parts of one agent, with a hasher."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__(rate=rate)
        self.hasher = Hasher(self.pool)
        self.tally = Tally()

    def start(
        self,
        source: Manifest,
        known: Digests | None = None,
        due: Due = digest.every,
        holder: int = 1,
        ring: bool = False,
        suspect: AbstractSet[Key] = frozenset(),
    ) -> Start:
        return Start(self, source, holder, known, due, ring, suspect)

    def learn(self, source: Manifest) -> Digests:
        learned = self.start(source).finish().learned
        assert learned is not None
        return learned

    def flip(self, told: Start, place: int) -> None:
        """One bit of DRAM."""
        span = next(one for one in told.spans if one.file == 0 and one.offset <= place < one.offset + one.length)
        self.pool.range(span.pool_offset + place - span.offset, 1)[0] ^= 1

    def holds(self, told: Start, source: Manifest) -> bool:
        """Whether all spans that were passed on are as on disk."""
        content = (source.directory / manifest.SINGLE).read_bytes()
        return all(
            self.pool.range(one.pool_offset, one.length) == content[one.offset : one.offset + one.length]
            for one in told.spans
        )

    def close(self) -> None:
        self.hasher.close()
        super().close()


@pytest.fixture
def node() -> Iterator[Bench]:
    node = Bench()
    yield node
    node.close()


@pytest.fixture
def source(tmp_path: Path) -> Manifest:
    return manifest.build(write(tmp_path / "m", random(MEGABYTES)))


def flip_on_disk(source: Manifest, place: int = PLACE) -> None:
    """One bit that no stamp tells of."""
    path = source.files[0].path
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(place)
        (old,) = file.read(1)
        file.seek(place)
        file.write(bytes([old ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert manifest.build(source.directory).checkpoint == source.checkpoint


def evict(node: Bench, source: Manifest, *holders: int) -> None:
    for holder in holders:
        node.pipeline.release(source.checkpoint, holder)
    node.pipeline.forget(source.checkpoint)
    node.settle()
    assert node.tier.residents() == []


def test_the_first_load_learns_and_passes_all(node: Bench, source: Manifest) -> None:
    told = node.start(source).finish()
    assert sum(span.length for span in told.spans) == source.file_bytes == node.tally.bytes
    assert node.holds(told, source)
    assert told.learned is not None
    assert len(told.learned) == digest.count(sizes_of(source))


def test_a_start_from_dram_is_compared_and_reads_nothing(node: Bench, source: Manifest) -> None:
    known = node.learn(source)
    told = node.start(source, known, holder=2).finish()
    assert told.learned is None
    assert told.load.dram_bytes == source.file_bytes
    assert node.tally == Tally(bytes=2 * source.file_bytes)
    assert sum(span.length for span in told.spans) == source.file_bytes


def test_a_flipped_bit_in_dram_is_read_again_and_alone(node: Bench, source: Manifest) -> None:
    first = node.start(source).finish()
    assert first.learned is not None
    node.flip(first, PLACE)
    assert not node.holds(first, source)
    told = node.start(source, first.learned, holder=2).finish()
    assert [block.offset for block in told.again] == [3 * BLOCK]
    assert told.failed == []
    assert told.load.came.total == BLOCK
    assert node.tally.dram == 1
    assert node.tally.disk == 0
    assert sum(span.length for span in told.spans) == source.file_bytes
    assert node.holds(told, source)
    assert node.holds(first, source)  # who views the same slots is mended, too


def test_a_flipped_bit_on_disk_fails_the_load_and_is_not_passed_on(node: Bench, source: Manifest) -> None:
    known = node.learn(source)
    evict(node, source, 1)
    flip_on_disk(source)
    told = node.start(source, known, holder=2).finish()
    assert [block.offset for block in told.failed] == [3 * BLOCK]
    assert not told.last
    assert sum(span.length for span in told.spans) == source.file_bytes - BLOCK
    assert (node.tally.dram, node.tally.disk) == (0, 1)
    flip_on_disk(source)  # restored
    node.pipeline.discard(source, told.failed)
    healed = node.start(source, known, holder=3).finish()
    assert healed.last
    assert healed.again == []
    assert node.holds(healed, source)


def test_both_at_once_are_told_apart(node: Bench, source: Manifest) -> None:
    first = node.start(source).finish()
    node.flip(first, PLACE)
    node.flip(first, PLACE + BLOCK)
    flip_on_disk(source)
    told = node.start(source, first.learned, holder=2).finish()
    assert [block.offset for block in told.failed] == [3 * BLOCK]
    assert (node.tally.dram, node.tally.disk) == (1, 1)


def test_a_sample_catches_it_when_its_block_is_due(node: Bench, source: Manifest) -> None:
    first = node.start(source).finish()
    node.flip(first, PLACE)
    sizes = sizes_of(source)
    caught = 0
    for start in range(digest.count(sizes)):
        before = node.tally.bytes
        due = digest.sampled(source.checkpoint, sizes, start)
        told = node.start(source, first.learned, due, holder=2).finish()
        assert node.tally.bytes - before <= BLOCK * (1 + len(told.again))
        assert sum(span.length for span in told.spans) == source.file_bytes
        caught += len(told.again)
    assert caught == 1
    assert node.holds(first, source)


def none(key: Key) -> bool:
    return False


def test_the_first_load_learns_all_of_a_sample_too(node: Bench, source: Manifest) -> None:
    learned = node.start(source, due=none).finish().learned
    assert learned is not None
    assert len(learned) == digest.count(sizes_of(source))


def test_after_a_difference_all_is_compared(node: Bench, source: Manifest) -> None:
    known = node.learn(source)
    before = node.tally.bytes
    assert node.start(source, known, none, holder=2, suspect={Key(0, 1)}).finish().last
    assert node.tally.bytes - before == source.file_bytes
    assert node.tally.dram == 1


def test_spans_smaller_than_a_block_are_held_back_until_it_is_whole(source: Manifest) -> None:
    node = Bench(rate=10e6)  # calls of half a block
    told = node.start(source).finish()
    assert sum(span.length for span in told.spans) == source.file_bytes
    assert node.holds(told, source)
    node.close()


def test_replicas_that_share_a_read_are_compared_each(node: Bench, source: Manifest) -> None:
    known = node.learn(source)
    evict(node, source, 1)
    flip_on_disk(source)
    first, second = node.start(source, known, holder=1), node.start(source, known, holder=2)
    while not (first.again and second.load.done == source.file_bytes):
        node.turn()
    second.check.cancel()
    second.load.cancel()
    assert first.finish().failed


def test_nothing_is_told_after_a_cancellation(node: Bench, source: Manifest) -> None:
    known = node.learn(source)
    told = node.start(source, known, holder=2)  # from DRAM: the hasher has its order
    before = list(told.spans)
    told.check.cancel()
    told.check.cancel()
    node.turn()
    told.check.landed([], True)
    assert told.spans == before
    assert not told.last
    assert node.tally.bytes == source.file_bytes


def test_what_is_distrusted_while_others_of_it_are_read_goes_when_they_have_landed(source: Manifest) -> None:
    node = Bench(rate=10e6)
    told = node.start(source)
    while not told.spans:
        node.turn()
    assert not node.pipeline.discard(source, told.spans[:1])
    told.finish()
    assert node.holds(told, source)
    ((_, nbytes),) = node.tier.residents()
    assert 0 < nbytes < source.file_bytes
    again = node.start(source, told.learned, holder=2).finish()
    assert again.load.dram_bytes == nbytes
    assert node.holds(again, source)
    node.close()


def test_what_passes_through_a_ring_is_told_of_in_its_order(tmp_path: Path, node: Bench) -> None:
    """A slot is used again by what the device says that it has copied: bytes, counted from the beginning."""
    large = manifest.build(write(tmp_path / "large", random(20)))
    known: Digests | None = None
    for attempt in range(2):
        told = node.start(large, known, holder=1 + attempt, ring=True)
        assert told.load.ringed
        seen = bytearray(large.file_bytes)
        while not told.last:
            node.turn()
            for span in told.spans:
                seen[span.offset : span.offset + span.length] = node.pool.range(span.pool_offset, span.length)
                told.copied += span.length
            told.spans.clear()
            told.load.copied(told.copied)
        assert bytes(seen) == large.files[0].path.read_bytes()
        node.pipeline.release(large.checkpoint, 1 + attempt)
        known = known or told.learned


def test_a_difference_in_a_ring_is_told_at_once_and_is_for_good_the_next_time(tmp_path: Path, node: Bench) -> None:
    """What was copied already would have to be told of again."""
    large = manifest.build(write(tmp_path / "large", random(20)))
    known = {Key(0, number): b"another" for number in range(digest.count(sizes_of(large)))}
    first = node.start(large, known, ring=True)
    while not first.again:
        node.turn()
    first.check.cancel()
    first.load.cancel()
    assert first.spans == []
    second = node.start(large, known, holder=2, ring=True, suspect={digest.key_of(block) for block in first.again})
    assert second.finish().failed
    assert node.tally.disk == len(second.failed)


def test_nothing_behind_a_difference_in_a_ring_is_told_of(tmp_path: Path, node: Bench) -> None:
    """What the device says that it has copied would be taken for other bytes."""
    large = manifest.build(write(tmp_path / "large", random(20)))
    first = Key(0, 0)
    told = node.start(large, {first: b"another"}, {first}.__contains__, ring=True)
    while not told.again:
        node.turn()
    before = list(takewhile(lambda span: span.offset > 0, told.arrived))
    assert digest.joined(told.spans, BLOCK) == digest.joined(before, BLOCK)


def test_much_that_is_there_at_once_leaves_turns_to_others(node: Bench) -> None:
    blocks = 3 * IN_A_TURN + 5
    told: list[tuple[int, bool]] = []
    verdicts = Verdicts(
        passed=lambda spans, last: told.append((sum(span.length for span in spans) // BLOCK, last)),
        learned=lambda _: None,
        again=lambda _: None,
        failed=lambda _: None,
    )
    check = Check([blocks * BLOCK], {}, none, node.hasher, node.posts.put, verdicts, node.tally)
    check.landed([Landed(0, number * BLOCK, BLOCK, number * BLOCK) for number in range(blocks)], True)
    assert told == [(IN_A_TURN, False)]
    for _ in range(3):
        node.turn()
    assert told == [(IN_A_TURN, False)] * 3 + [(5, False), (0, True)]
