"""The DRAM tier under any order of loads, leases, aborts and evictions, with an agent that keeps the rules."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serverless_llm.errors import CapacityError
from serverless_llm.loader.plan import Piece
from serverless_llm.loader.residency import Tier

SLOTS = 8
SIZES = {"a": 1, "b": 3, "c": 5, "d": 8, "e": 9}  # pieces; the last can never fit
COSTS = {"a": 1.0, "b": 9.0, "c": 0.5, "d": 3.0, "e": 1.0}  # seconds a byte
BORROWER = 8  # the first of the holders that lease some pieces only
checkpoints = st.sampled_from(sorted(SIZES))


def pieces(checkpoint: str) -> list[Piece]:
    count = SIZES[checkpoint]
    return [Piece(number % 2, number // 2 * 10, 10 - (number == count - 1)) for number in range(count)]


class Residency(RuleBasedStateMachine):
    """`content`: what each slot was last written with; `reading`: pieces of a read under way, and their slots."""

    def __init__(self) -> None:
        super().__init__()
        self.tier = Tier(SLOTS, 10)
        self.now = 0.0
        self.content: dict[int, tuple[str, Piece]] = {}
        self.reading: dict[str, dict[Piece, int]] = {}
        self.views: dict[tuple[str, int], dict[Piece, int]] = {}  # (checkpoint, holder) -> what it may refer to
        self.lent: list[list[int]] = []

    @rule(checkpoint=checkpoints, holder=st.integers(1, 3))
    def load(self, checkpoint: str, holder: int) -> None:
        self.now += 1
        wanted = pieces(checkpoint)
        try:
            reservation = self.tier.reserve(checkpoint, wanted, self.now, COSTS.__getitem__)
        except CapacityError:
            busy = {name for name, holder in self.views if holder < BORROWER} | self.reading.keys() | {checkpoint}
            lent = {(name, piece) for (name, _), slots in self.views.items() if name not in busy for piece in slots}
            assert sum(SIZES[name] for name in busy) + len(lent) + sum(map(len, self.lent)) > SLOTS
            return
        assert list(reservation.slots) == wanted
        for piece in reservation.missing:
            self.reading.setdefault(checkpoint, {})[piece] = reservation.slots[piece]
        self.tier.lease(checkpoint, holder)
        self.views[checkpoint, holder] = reservation.slots

    @rule(data=st.data(), checkpoint=checkpoints, holder=st.integers(BORROWER, BORROWER + 1))
    def borrow(self, data: st.DataObject, checkpoint: str, holder: int) -> None:
        """A replica of another checkpoint refers to some of what has landed."""
        landed = self.tier.landed(checkpoint)
        if landed and (checkpoint, holder) not in self.views:
            some = data.draw(st.sets(st.sampled_from(sorted(landed)), min_size=1))
            self.tier.lease(checkpoint, holder, some)
            self.views[checkpoint, holder] = {piece: landed[piece] for piece in some}

    @rule(checkpoint=checkpoints, holder=st.integers(1, 3))
    def complete(self, checkpoint: str, holder: int) -> None:
        """A replica has all that it will refer to."""
        slots = self.views.get((checkpoint, holder), {})
        if slots and slots.keys() <= self.tier.landed(checkpoint).keys():
            self.tier.lease(checkpoint, holder, slots)

    @precondition(lambda self: self.reading)
    @rule(data=st.data())
    def land(self, data: st.DataObject) -> None:
        checkpoint = data.draw(st.sampled_from(sorted(self.reading)))
        slots = self.reading[checkpoint]
        piece = data.draw(st.sampled_from(sorted(slots)))
        self.content[slots.pop(piece)] = (checkpoint, piece)
        if not slots:
            del self.reading[checkpoint]
        self.tier.land(checkpoint, [piece])

    @precondition(lambda self: self.reading)
    @rule(data=st.data(), discard=st.booleans())
    def abort(self, data: st.DataObject, discard: bool) -> None:
        checkpoint = data.draw(st.sampled_from(sorted(self.reading)))
        del self.reading[checkpoint]
        before = self.tier.landed(checkpoint).keys()
        borrowed = self.tier.borrowed(checkpoint)
        self.tier.abort(checkpoint, discard)
        if discard:
            assert self.tier.landed(checkpoint).keys() <= before & borrowed
        for (name, holder), slots in self.views.items():  # no load reads into them
            assert name != checkpoint or holder < BORROWER or before & slots.keys() <= self.tier.landed(name).keys()

    @rule(data=st.data(), checkpoint=checkpoints)
    def discard(self, data: st.DataObject, checkpoint: str) -> None:
        if checkpoint not in self.reading:
            self.tier.discard(checkpoint, data.draw(st.sets(st.sampled_from(pieces(checkpoint)))))

    @precondition(lambda self: self.views)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.now += 1
        checkpoint, holder = data.draw(st.sampled_from(sorted(self.views)))
        del self.views[checkpoint, holder]
        self.tier.release(checkpoint, holder, self.now)

    @rule(checkpoint=checkpoints)
    def forget(self, checkpoint: str) -> None:
        self.tier.forget(checkpoint)

    @rule(checkpoint=checkpoints, count=st.integers(1, 3))
    def shed(self, checkpoint: str, count: int) -> None:
        """What is in use keeps all of its pieces."""
        used = checkpoint in self.reading or any(name == checkpoint for name, _ in self.views)
        wanted = pieces(checkpoint)
        missing = self.tier.missing(checkpoint, wanted)
        self.tier.shed(checkpoint, wanted[-count:])
        expected = missing if used else [piece for piece in wanted if piece in {*missing, *wanted[-count:]}]
        assert self.tier.missing(checkpoint, wanted) == expected

    @rule(checkpoint=checkpoints, count=st.integers(1, 3))
    def lend(self, checkpoint: str, count: int) -> None:
        """A ring's slots are written with what belongs to no checkpoint."""
        _, room = self.tier.room(checkpoint)
        try:
            self.lent.append(self.tier.lend(checkpoint, count, COSTS.__getitem__))
        except CapacityError:
            assert count > room
            return
        assert count <= room
        for slot in self.lent[-1]:
            self.content.pop(slot, None)

    @precondition(lambda self: self.lent)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        self.tier.give_back(self.lent.pop(data.draw(st.integers(0, len(self.lent) - 1))))

    @rule(wanted=st.integers(0, SLOTS))
    def resize(self, wanted: int) -> None:
        self.tier.wanted = wanted
        if (slot := self.tier.shrink()) is not None:
            self.content.pop(slot, None)  # its memory is gone
        elif self.tier.grow() is not None:
            assert self.tier.shrink() is None

    @invariant()
    def the_books_are_right(self) -> None:
        self.tier.check_invariants()

    @invariant()
    def nothing_in_use_is_given_to_another(self) -> None:
        owners: dict[int, set[Any]] = {}
        for (checkpoint, _), slots in self.views.items():
            for piece, slot in slots.items():
                owners.setdefault(slot, set()).add((checkpoint, piece))
        for checkpoint, slots in self.reading.items():
            for piece, slot in slots.items():
                owners.setdefault(slot, set()).add((checkpoint, piece))
        for number, lent in enumerate(self.lent):
            for slot in lent:
                owners.setdefault(slot, set()).add(number)
        assert all(len(owner) == 1 for owner in owners.values())
        assert not owners.keys() & set(self.tier.free_slots)

    @invariant()
    def what_is_resident_is_what_was_written(self) -> None:
        for checkpoint in SIZES:
            wanted = pieces(checkpoint)
            landed = set(wanted) - set(self.tier.missing(checkpoint, wanted))
            slots = self.tier._residents[checkpoint].slots if landed else {}
            assert all(self.content[slots[piece]] == (checkpoint, piece) for piece in landed)


TestResidency = pytest.mark.slow(Residency.TestCase)
