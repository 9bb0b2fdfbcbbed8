"""What of a checkpoint is kept in the tier, and what passes through a ring."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverless_llm.errors import CapacityError
from serverless_llm.loader import division, plan
from serverless_llm.loader.division import Division
from serverless_llm.loader.header import Header
from serverless_llm.loader.manifest import FileEntry, Manifest
from serverless_llm.loader.plan import Piece
from serverless_llm.loader.residency import Tier

WIDEST = 4  # slots of a ring
SLOT = division.RING // WIDEST


def checkpoint(*slots: int) -> Manifest:
    """Files of so many slots each, of which headers fill the first."""
    files = (FileEntry(f"{count}", Path("/"), count * SLOT, 0, Header((), {}, SLOT)) for count in slots)
    return Manifest(Path("/"), tuple(files), "mine", {}, "{}")


def pieces(source: Manifest) -> list[Piece]:
    return plan.pieces(source.files, (), SLOT)


def fill(tier: Tier, name: str, there: list[Piece], leased: bool = False) -> None:
    tier.reserve(name, there, 0)
    tier.land(name, there)
    if leased:
        tier.lease(name, 1)


def tier(slots: int, own: list[Piece], others: int = 0, leased: bool = False) -> Tier:
    made = Tier(slots, SLOT)
    if own:
        fill(made, "mine", own, leased)
    if others:
        fill(made, "others", [Piece(0, number * SLOT, SLOT) for number in range(others)])
    return made


@pytest.mark.parametrize(
    ("slots", "own", "others", "kept", "width"),
    [
        (20, 0, 0, 20, 0),
        (20, 0, 20, 20, 0),  # all of it fits where others leave
        (20, 3, 17, 20, 0),
        (19, 0, 0, 7, 4),  # half of what the ring leaves
        (18, 0, 0, 7, 4),
        (10, 0, 0, 3, 4),
        (8, 0, 0, 2, 3),  # a ring is at most half of what is not for headers
        (4, 0, 0, 1, 1),
        (2, 0, 0, 1, 1),
        (10, 2, 0, 3, 4),
        (12, 0, 4, 2, 4),
        (12, 0, 12, 1, 4),  # for more than headers nobody leaves
        (19, 2, 0, 8, 4),
        (19, 5, 0, 10, 4),  # the next time half of what is free then
        (19, 7, 0, 11, 4),
        (19, 9, 0, 11, 4),  # as many as the ring has are left for others
        (19, 5, 6, 5, 4),
        (19, 10, 5, 10, 4),  # it has more than half already
        (12, 8, 0, 8, 4),
        (8, 6, 0, 4, 4),  # its last ones make room for the ring
        (8, 8, 0, 4, 4),
        (6, 5, 0, 3, 3),
        (3, 3, 0, 2, 1),
    ],
)
def test_what_is_kept_leaves_room_for_the_ring_and_for_others(
    slots: int, own: int, others: int, kept: int, width: int
) -> None:
    source = checkpoint(20)
    all_of_it = pieces(source)
    made = tier(slots, all_of_it[:own], others)
    wanted = Division(all_of_it[:kept], all_of_it[kept:], width)
    assert division.divide(made, source, all_of_it, ring=True, reading=False) == wanted


def test_what_others_wait_for_takes_no_more_slots() -> None:
    source = checkpoint(20)
    there = pieces(source)
    assert division.divide(tier(19, there[:5]), source, there, ring=True, reading=True) == (there[:5], there[5:], 4)
    assert division.divide(tier(30, there[:5]), source, there, ring=True, reading=True) == (there[:5], there[5:], 4)
    assert division.divide(tier(20, there), source, there, ring=True, reading=True) == (there, [], 0)


def test_what_is_in_use_makes_no_room_for_its_ring() -> None:
    source = checkpoint(20)
    there = pieces(source)
    assert division.divide(tier(6, there[:5], leased=True), source, there, True, False) == (there[:5], there[5:], 1)
    both = checkpoint(6, 5)
    first = [piece for piece in pieces(both) if piece.file == 0]
    found = division.divide(tier(8, first, leased=True), both, pieces(both), True, False)
    assert (found.width, found.kept) == (1, [piece for piece in pieces(both) if piece in first or piece.offset == 0])
    with pytest.raises(CapacityError, match=r"1\.0 GB of DRAM are needed .*, 0 B of 335\.5 MB are available"):
        division.divide(tier(5, there[:5], leased=True), source, there, True, False)


@pytest.mark.parametrize(("slots", "fits"), [(2, False), (3, True)])
def test_a_ring_needs_a_slot_beside_those_of_all_headers(slots: int, fits: bool) -> None:
    source = checkpoint(4, 5)
    there = pieces(source)
    assert division.least(source, there, ring=True) == 3
    if fits:
        assert division.divide(tier(slots, []), source, there, True, False) == (there[:2], there[2:], 1)
        return
    for own in ([], there[:2]):  # headers make no room for a ring
        with pytest.raises(CapacityError):
            division.divide(tier(slots, own), source, there, True, False)


def test_without_a_ring_all_of_it_needs_a_slot() -> None:
    source = checkpoint(1, 1)
    there = pieces(source)
    assert [division.least(source, there, ring) for ring in (True, False)] == [2, 2]
    source = checkpoint(4)
    there = pieces(source)
    assert [division.least(source, there, ring) for ring in (True, False)] == [2, 4]
    with pytest.raises(CapacityError):
        division.divide(tier(3, []), source, there, ring=False, reading=False)
    assert division.divide(tier(4, [], 4), source, there, ring=False, reading=False) == (there, [], 0)


@given(files=st.lists(st.integers(1, 12), min_size=1, max_size=3), slots=st.integers(2, 30), data=st.data())
def test_whatever_is_there_all_of_it_has_a_place(files: list[int], slots: int, data: st.DataObject) -> None:
    """Kept pieces and a ring can be had, headers are kept, and who fits fits whole."""
    source = checkpoint(*files)
    there = pieces(source)
    own = data.draw(st.integers(0, min(slots, len(there))))
    made = tier(slots, there[:own], data.draw(st.integers(0, slots - own)), data.draw(st.booleans()))
    try:
        found = division.divide(made, source, there, ring=True, reading=False)
    except CapacityError:
        assert slots <= len(files) or made.room("mine")[1] <= len(made.homeless("mine", there[: len(files)]))
        return
    made.reserve("mine", found.kept, 1)
    assert len(made.lend("mine", found.width)) == found.width <= WIDEST
    assert [*found.kept, *found.passing] == there
    assert len(found.kept) >= len(files)
    assert bool(found.width) == bool(found.passing) == (slots < len(there))
