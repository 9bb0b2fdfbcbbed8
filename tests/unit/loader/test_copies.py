"""Copies of any split of a file into spans put every byte where its Dest wants it."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serverless_llm.loader.copies import Copies, Copy
from serverless_llm.loader.dest import Dest
from serverless_llm.loader.header import Header, TensorEntry
from serverless_llm.loader.plan import Landed
from serverless_llm.loader.sharing import Lent, Run

HEAD = 5
HEADER = Header(
    (TensorEntry("a", "U8", (4,), 5, 9), TensorEntry("none", "U8", (0,), 9, 9), TensorEntry("b", "U8", (7,), 9, 16)),
    {},
    HEAD,
)


def test_a_dest_of_no_tensor_is_an_error() -> None:
    with pytest.raises(KeyError):
        Copies([HEADER], [Dest("c", 0, 1, 0)])


@settings(max_examples=50)
@given(cuts=st.sets(st.integers(1, 15)), file=st.integers(0, 1))
def test_every_byte_arrives(cuts: set[int], file: int) -> None:
    other = Header((TensorEntry("c", "U8", (11,), 5, 16),), {}, HEAD)
    headers = [HEADER, other] if file == 0 else [other, HEADER]
    dests = [Dest("b", 1, 7, 20), Dest("a", 0, 2, 0), Dest("a", 2, 4, 40), Dest("a", 1, 3, 10)]
    copies = Copies(headers, dests)
    assert copies.total == 12
    content, arena = bytes(range(100, 116)), bytearray(50)
    edges = [0, *sorted(cuts), 16]
    for start, stop in pairwise(edges):
        for source, target, length in copies.of(Landed(file, start, stop - start, 1000 + start)):
            assert start <= source - 1000 and source - 1000 + length <= stop
            arena[target : target + length] = content[source - 1000 : source - 1000 + length]
    assert arena[20:26] == content[10:16]
    assert arena[0:2] == content[5:7]
    assert arena[40:42] == content[7:9]
    assert arena[10:12] == content[6:8]
    assert arena.count(0) == 50 - 12


def test_what_only_touches_a_span_is_not_copied() -> None:
    copies = Copies([HEADER], [Dest("a", 2, 4, 0), Dest("a", 0, 2, 10), Dest("b", 0, 7, 20)])
    assert list(copies.of(Landed(0, 5, 2, 1000))) == [Copy(1000, 10, 2)]
    assert list(copies.of(Landed(0, 7, 2, 1000))) == [Copy(1000, 0, 2)]


def test_what_is_lent_is_copied_from_where_it_lies() -> None:
    """In another order there, one of them twice; the first stays."""
    tensors = [TensorEntry(name, "U8", (4,), 9 + 4 * number, 13 + 4 * number) for number, name in enumerate("abcd")]
    lent = Lent([50], [Run(0, 13, 17, 1, 30), Run(0, 17, 21, 1, 20), Run(0, 21, 25, 1, 30)], 1)
    dests = [Dest(name, 0, 4, 100 * number) for number, name in enumerate("abcd")]
    copies = Copies([Header(tuple(tensors), {}, 9)], dests, lent)
    assert copies.total == 16
    assert list(copies.of(Landed(0, 0, 25, 1000))) == [Copy(1009, 0, 4)]
    assert list(copies.of(Landed(1, 18, 5, 2000))) == [Copy(2002, 200, 3)]
    assert list(copies.of(Landed(1, 23, 10, 3000))) == [Copy(3000, 203, 1), Copy(3007, 100, 3), Copy(3007, 300, 3)]
