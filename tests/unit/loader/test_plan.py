"""Read plans as values."""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from serverless_llm.loader import plan
from serverless_llm.loader.plan import Landed, Piece


class File(NamedTuple):
    size: int
    data_offset: int


def calls(pieces: list[Piece], most: int) -> list[tuple[Piece, ...]]:
    left = deque(pieces)
    return list(iter(lambda: plan.take(left, most), ()))


def test_headers_first_then_file_order() -> None:
    files = [File(10, 3), File(9, 5)]
    assert plan.pieces(files, (), 4) == [
        Piece(0, 0, 4),
        Piece(1, 0, 4),
        Piece(1, 4, 4),
        Piece(0, 4, 4),
        Piece(0, 8, 2),
        Piece(1, 8, 1),
    ]


def test_a_header_that_ends_with_a_piece_needs_no_other() -> None:
    assert plan.pieces([File(8, 4), File(4, 4)], (), 4) == [Piece(0, 0, 4), Piece(1, 0, 4), Piece(0, 4, 4)]


def test_what_is_resident_is_left_out() -> None:
    assert plan.pieces([File(10, 3)], {Piece(0, 4, 4)}, 4) == [Piece(0, 0, 4), Piece(0, 8, 2)]


def test_calls_join_what_follows_in_one_file() -> None:
    pieces = [Piece(0, 0, 4), Piece(0, 4, 4), Piece(0, 8, 4), Piece(0, 16, 4), Piece(1, 20, 4)]
    assert calls(pieces, 8) == [
        (Piece(0, 0, 4), Piece(0, 4, 4)),
        (Piece(0, 8, 4),),
        (Piece(0, 16, 4),),
        (Piece(1, 20, 4),),
    ]
    assert plan.take(deque(), 8) == ()


def test_calls_cut_what_is_longer() -> None:
    assert calls([Piece(0, 8, 5)], 2) == [(Piece(0, 8, 2),), (Piece(0, 10, 2),), (Piece(0, 12, 1),)]
    assert calls([Piece(0, 0, 4), Piece(0, 4, 4)], 6) == [(Piece(0, 0, 4), Piece(0, 4, 2)), (Piece(0, 6, 2),)]


def test_a_call_has_no_more_buffers_than_the_system_takes() -> None:
    pieces = [Piece(0, n, 1) for n in range(plan.MAX_BUFFERS + 1)]
    assert [len(call) for call in calls(pieces, 1 << 20)] == [plan.MAX_BUFFERS, 1]


def test_a_cap_shortens_calls_to_pages() -> None:
    assert plan.paced(0, 1 << 20) == 1 << 20
    assert plan.paced(3e6, 1 << 20) == 147456
    assert plan.paced(1e12, 1 << 20) == 1 << 20
    assert plan.paced(1, 1 << 20) == 4096


def test_the_home_of_a_span() -> None:
    assert plan.home(Piece(2, 5, 1), 10, 4) == Piece(2, 4, 4)
    assert plan.home(Piece(2, 9, 1), 10, 4) == Piece(2, 8, 2)


def test_spans_are_joined_that_follow_in_the_file_and_in_the_pool() -> None:
    first, second = Landed(0, 0, 4, 8), Landed(0, 4, 2, 12)
    apart = [Landed(0, 6, 4, 40), Landed(1, 10, 4, 44), Landed(0, 10, 4, 48)]
    assert plan.joined([first, second, *apart]) == [Landed(0, 0, 6, 8), *apart]
    assert plan.joined([second, first]) == [second, first]
    assert plan.joined([first, second, Landed(0, 6, 1, 14)]) == [Landed(0, 0, 7, 8)]
    assert plan.joined([]) == []


def test_where_bytes_are() -> None:
    landed = [Landed(0, 8, 2, 100), Landed(0, 0, 8, 50)]
    assert plan.locate(landed, 6, 9) == [(56, 2), (100, 1)]
    assert plan.locate(landed, 3, 3) == []
    assert plan.locate(landed, 9, 11) is None
    assert plan.locate([], 0, 1) is None
    assert plan.locate([Landed(0, 4, 4, 0)], 0, 8) is None


@given(
    sizes=st.lists(st.integers(0, 100), max_size=5),
    piece=st.integers(1, 16).map(lambda n: 2 * n),
    call=st.integers(1, 40).map(lambda n: 2 * n),
)
def test_every_byte_is_read_once_in_calls_of_the_size(sizes: list[int], piece: int, call: int) -> None:
    files = [File(size, min(size, 3)) for size in sizes]
    seen: list[tuple[int, int]] = []
    for spans in calls(plan.pieces(files, (), piece), call):
        assert sum(span.length for span in spans) <= call
        assert all(one.stop == two.offset and one.file == two.file for one, two in pairwise(spans))
        seen += [(span.file, byte) for span in spans for byte in range(span.offset, span.stop)]
    assert sorted(seen) == [(number, byte) for number, size in enumerate(sizes) for byte in range(size)]


def test_every_call_is_filled_to_its_last_byte() -> None:
    pieces = [Piece(0, 10 * number, 10) for number in range(6)]
    assert [len(call) for call in calls(pieces, 20)] == [2, 2, 2]


def test_a_span_ends_before_its_stop() -> None:
    assert plan.locate([Landed(0, 0, 10, 0)], 10, 12) is None
    assert plan.locate([Landed(0, 0, 10, 0), Landed(0, 10, 10, 50)], 10, 12) == [(50, 2)]
