"""Which blocks of which spans are compared when, how digests are kept, and what is said of those that differ."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverless_llm.loader import digest
from serverless_llm.loader.digest import BLOCK, DIGEST, SAMPLE, Blocks, Digests, Key, joined
from serverless_llm.loader.header import Header, TensorEntry
from serverless_llm.loader.manifest import FileEntry
from serverless_llm.loader.plan import Landed, Piece, cut, home, pieces
from serverless_llm.loader.pool import MAX_SLOT, MIN_SLOT, slot_size

PAGE = 4096
SIZES = st.lists(st.integers(1, 5 * BLOCK), min_size=1, max_size=3)


def whole(sizes: list[int]) -> list[Key]:
    return [Key(file, number) for file, size in enumerate(sizes) for number in range(-(-size // BLOCK))]


def files(*sizes: int) -> list[FileEntry]:
    """Files of no tensor, of which only the sizes count."""
    return [FileEntry(f"{size}", Path(f"/m/{size}"), size, 0, Header((), {}, min(size, 8))) for size in sizes]


def test_a_block_lies_in_one_slot() -> None:
    assert MIN_SLOT % BLOCK == MAX_SLOT % BLOCK == slot_size(3 << 30) % BLOCK == 0


@given(
    sizes=SIZES,
    slot=st.sampled_from([1, 2, 4]),
    page=st.sampled_from([PAGE * 3, BLOCK // 2, 3 * BLOCK]),
    data=st.data(),
)
def test_any_spans_make_each_block_once(sizes: list[int], slot: int, page: int, data: st.DataObject) -> None:
    """As a reader tells of them: pieces in any slots, cut into calls, in any order."""
    homes = dict.fromkeys(pieces(files(*sizes), (), slot * BLOCK))
    places = data.draw(st.permutations(range(len(homes))))
    spans = [
        Landed(*part, place * slot * BLOCK + part.offset - piece.offset)
        for piece, place in zip(homes, places, strict=True)
        for part in cut(piece, page)
    ]
    spans = data.draw(st.permutations(spans))
    turn = data.draw(st.integers(0, len(spans)))
    blocks = Blocks(sizes)
    parts = [*blocks.parts(spans[:turn]), *blocks.parts(spans[turn:])]
    assert joined(parts, slot * BLOCK) == joined(spans, slot * BLOCK)
    assert all(part.offset // BLOCK == (part.offset + part.length - 1) // BLOCK for part in parts)
    found = [block for part in parts if (block := blocks.completed(part))]
    assert sorted(map(digest.key_of, found)) == whole(sizes)
    assert sum(block.length for block in found) == sum(sizes)
    for block in found:
        piece = home(Piece(*block[:3]), sizes[block.file], slot * BLOCK)
        place = places[list(homes).index(piece)]
        assert block.pool_offset == place * slot * BLOCK + block.offset - piece.offset


def test_a_span_is_cut_where_blocks_begin() -> None:
    span = Landed(1, 5, 2 * BLOCK, 100)
    assert list(Blocks([0, 3 * BLOCK]).parts([span])) == [
        Landed(1, 5, BLOCK - 5, 100),
        Landed(1, BLOCK, BLOCK, 95 + BLOCK),
        Landed(1, 2 * BLOCK, 5, 95 + 2 * BLOCK),
    ]


def test_only_wanted_blocks_are_cut() -> None:
    span = Landed(0, 0, 3 * BLOCK, 7 * BLOCK)
    assert list(Blocks([3 * BLOCK], {Key(0, 1)}).parts([span])) == [Landed(0, BLOCK, BLOCK, 8 * BLOCK)]


def test_a_block_waits_for_its_last_byte() -> None:
    blocks = Blocks([BLOCK])
    assert blocks.completed(Landed(0, 0, BLOCK - 1, 0)) is None
    assert blocks.completed(Landed(0, BLOCK - 1, 1, BLOCK - 1)) == Landed(0, 0, BLOCK, 0)


def test_neighbours_in_file_and_pool_are_joined_and_their_order_is_kept() -> None:
    first, second = Landed(0, 0, BLOCK, 0), Landed(0, BLOCK, BLOCK, BLOCK)
    apart = [Landed(0, 2 * BLOCK, BLOCK, 9 * BLOCK), Landed(0, 4 * BLOCK, BLOCK, 10 * BLOCK)]
    other = Landed(1, 5 * BLOCK, BLOCK, 11 * BLOCK)
    spans = [other, first, second, *apart]
    assert joined(spans, 2 * BLOCK) == [other, Landed(0, 0, 2 * BLOCK, 0), *apart]
    assert joined([second, first], 2 * BLOCK) == [second, first]
    assert joined([], BLOCK) == []
    assert joined([first, second], BLOCK) == [first, second]  # they lie in two slots


@pytest.mark.parametrize("sizes", [[1], [BLOCK], [3 * BLOCK + 1], [200 * BLOCK], [63 * BLOCK, BLOCK], [5, 70 * BLOCK]])
@pytest.mark.parametrize("before", [0, 1, 77])
def test_a_sample_sees_every_block_within_so_many_starts(sizes: list[int], before: int) -> None:
    """A block that differs is found within `SAMPLE` starts, whichever start is the first."""
    keys = whole(sizes)
    seen: list[Key] = []
    for start in range(before, before + min(SAMPLE, len(keys))):
        due = digest.sampled("c", sizes, start)
        compared = [key for key in keys if due(key)]
        assert len(keys) // SAMPLE <= len(compared) <= -(-len(keys) // SAMPLE)
        assert compared
        seen += compared
    assert sorted(seen) == keys  # each one once


def test_checkpoints_begin_their_samples_apart() -> None:
    def first(checkpoint: str) -> int:
        due = digest.sampled(checkpoint, [SAMPLE * BLOCK], 0)
        return next(number for number in range(SAMPLE) if due(Key(0, number)))

    assert len({first(f"{number:032x}") for number in range(20)}) > 10


def test_all_of_it_is_due_in_full() -> None:
    assert all(map(digest.every, whole([BLOCK, 3])))


def some(sizes: list[int]) -> Digests:
    return {key: bytes([key.file, key.number]) * (DIGEST // 2) for key in whole(sizes)}


@given(SIZES)
def test_digests_come_back_as_they_were_kept(sizes: list[int]) -> None:
    assert digest.decode("c", sizes, digest.encode("c", sizes, some(sizes))) == some(sizes)


@given(st.data())
def test_damage_is_noticed(data: st.DataObject) -> None:
    kept = digest.encode("c", [BLOCK, 5], some([BLOCK, 5]))
    place = data.draw(st.integers(0, len(kept) - 1))
    flipped = kept[:place] + bytes([kept[place] ^ 1 << data.draw(st.integers(0, 7))]) + kept[place + 1 :]
    assert digest.decode("c", [BLOCK, 5], flipped) is None
    assert digest.decode("c", [BLOCK, 5], kept[:place]) is None
    assert digest.decode("c", [BLOCK, 5], kept + b"x") is None


def test_digests_of_another_checkpoint_are_not_taken() -> None:
    kept = digest.encode("c", [BLOCK, 5], some([BLOCK, 5]))
    assert digest.decode("d", [BLOCK, 5], kept) is None
    assert digest.decode("c", [BLOCK, 6], kept) is None
    assert digest.decode("c", [5, BLOCK], kept) is None


def tensor(name: str, start: int, stop: int) -> TensorEntry:
    return TensorEntry(name, "F32", ((stop - start) // 4,), start, stop)


def test_what_differs_is_named_by_file_bytes_and_tensors() -> None:
    entries = tensor("a", 80, BLOCK), tensor("b", BLOCK, BLOCK + 40), tensor("c", BLOCK + 40, 3 * BLOCK)
    last = [tensor(f"z{number}", 3 * BLOCK + 4 * number, 3 * BLOCK + 4 * number + 4) for number in range(5)]
    header = Header((*entries, *last), {}, 80)
    one = FileEntry("one.safetensors", Path("/m/one.safetensors"), 3 * BLOCK + 20, 0, header)
    blocks = [Landed(0, number * BLOCK, BLOCK, 0) for number in range(3)]
    said = [digest.described([one], [block]) for block in blocks]
    assert said[0] == "/m/one.safetensors: bytes 0 ... 1048575, in them the header, 'a'"
    assert said[1] == "/m/one.safetensors: bytes 1048576 ... 2097151, in them 'b', 'c'"
    assert said[2] == "/m/one.safetensors: bytes 2097152 ... 3145727, in them 'c'"
    assert digest.described([one], [Landed(0, 3 * BLOCK, 20, 0)]).endswith("in them 'z0', 'z1', 'z2', 2 more")
    assert "1048575 (and 2 other blocks), in them the" in digest.described([one], blocks[::-1])
    assert "1048575 (and 1 other block), in them the" in digest.described([one], blocks[:2])


def test_a_header_that_ends_where_a_block_does_is_not_in_the_next() -> None:
    tensors = [tensor(f"z{number}", BLOCK + 4 * number, BLOCK + 4 * number + 4) for number in range(3)]
    one = FileEntry("one", Path("/m/one"), BLOCK + 12, 0, Header(tuple(tensors), {}, BLOCK))
    assert digest.described([one], [Landed(0, BLOCK, 12, 0)]).endswith("in them 'z0', 'z1', 'z2'")
