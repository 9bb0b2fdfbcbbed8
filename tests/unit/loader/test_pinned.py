"""What is registered with a device, and what it may copy from."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serverless_llm.loader.pinned import Order, Pinned

SLOT, CHUNK, POOL = 4, 16, 40


def pin(book: Pinned) -> None:
    """Does what is due."""
    order = book.due()
    assert order is not None
    book.begin(order)


def test_the_hottest_chunk_is_registered_first_and_cold_ones_never() -> None:
    book = Pinned(POOL, CHUNK)
    assert (book.due(), book.refused) == (None, "")
    for offset, length in ((0, 4), (32, 4), (36, 4)):
        book.crossed(offset, length)
    assert book.due() == Order(32, 8, register=True)
    pin(book)
    assert (book.nbytes, book.due()) == (8, Order(0, 16, register=True))
    pin(book)
    assert (book.nbytes, book.due()) == (24, None)


def test_nothing_is_registered_where_there_is_no_room_for_it_and_all_that_is_stale_is_let_go() -> None:
    book = Pinned(POOL, CHUNK)
    book.crossed(0, 4)
    assert book.due(CHUNK - 1) is None
    assert book.let_go() is None
    order = book.due(CHUNK)
    assert order == Order(0, CHUNK, register=True)
    book.begin(order)
    book.punched(0)
    assert book.due(0) == book.let_go() == Order(0, CHUNK, register=False)


def test_only_registered_bytes_go_straight() -> None:
    book = Pinned(POOL, CHUNK)
    book.crossed(16, 4)
    assert not book.direct(16, 4)
    pin(book)
    direct = [(offset, length) for offset in range(0, POOL, 4) for length in (4, 8) if book.direct(offset, length)]
    assert direct == [(16, 4), (16, 8), (20, 4), (20, 8), (24, 4), (24, 8), (28, 4)]
    book.crossed(0, 4)
    pin(book)
    assert book.direct(12, 8)


def test_a_chunk_whose_memory_went_is_let_go_and_begins_anew() -> None:
    book = Pinned(POOL, CHUNK)
    book.crossed(0, 8)
    pin(book)
    book.punched(20)  # not registered
    assert book.direct(0, 4)
    book.punched(4)
    assert not book.direct(0, 4)
    book.crossed(16, 100)
    assert book.due() == Order(0, 16, register=False)
    pin(book)
    assert (book.nbytes, book.due()) == (0, Order(16, 16, register=True))
    pin(book)
    assert (book.nbytes, book.due()) == (16, None)  # nothing has crossed the first one since
    book.crossed(0, 1)
    assert book.due() == Order(0, 16, register=True)
    pin(book)
    assert book.direct(0, 4)


def test_a_refusal_ends_registrations_and_keeps_what_there_is() -> None:
    book = Pinned(POOL, CHUNK)
    for offset in (0, 0, 16):
        book.crossed(offset, 4)
    pin(book)
    order = book.due()
    assert order is not None
    book.begin(order)
    book.punched(order.offset)
    book.refuse(order, "no more")
    assert (book.refused, book.nbytes, book.due()) == ("no more", 16, None)
    assert book.direct(0, 16)
    assert not book.direct(16, 4)
    book.punched(0)
    assert book.due() == Order(0, 16, register=False)


@given(
    st.lists(
        st.tuples(st.sampled_from(["cross", "punch", "begin"]), st.integers(0, POOL // SLOT - 1)),
        max_size=40,
    )
)
def test_the_device_never_copies_from_memory_that_went(events: list[tuple[str, int]]) -> None:
    book = Pinned(POOL, CHUNK)
    memory = [0] * (POOL // SLOT)  # which memory a slot has, and which the device sees of it
    seen: dict[int, int] = {}
    for what, slot in events:
        if what == "cross":
            book.crossed(slot * SLOT, SLOT)
        elif what == "punch":
            memory[slot] += 1
            book.punched(slot * SLOT)
        elif (order := book.due()) is not None:
            book.begin(order)
            slots = range(order.offset // SLOT, (order.offset + order.length) // SLOT)
            if order.register:
                assert not seen.keys() & set(slots)
                seen |= {one: memory[one] for one in slots}
            else:
                assert seen.keys() >= set(slots)
                seen = {one: at for one, at in seen.items() if one not in slots}
        assert book.nbytes == SLOT * len(seen)
        for one in range(len(memory)):
            assert not book.direct(one * SLOT, SLOT) or seen[one] == memory[one]
