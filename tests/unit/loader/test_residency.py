"""The tier's rules one by one; the state machine is in tests/properties/test_residency.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from serverless_llm.errors import CapacityError, InvariantError
from serverless_llm.loader.plan import Piece
from serverless_llm.loader.residency import Tier


def pieces(count: int, length: int = 10) -> list[Piece]:
    return [Piece(0, 10 * number, length) for number in range(count)]


def filled(tier: Tier, checkpoint: str, count: int, now: float) -> None:
    tier.reserve(checkpoint, pieces(count), now)
    tier.land(checkpoint, pieces(count))
    tier.check_invariants()


def test_slots_are_given_low_first_and_found_again() -> None:
    tier = Tier(4, 10)
    reservation = tier.reserve("a", pieces(3), 0)
    assert list(reservation.slots.values()) == [0, 1, 2]
    assert reservation.missing == pieces(3)
    tier.land("a", pieces(2))
    assert tier.missing("a", pieces(3)) == pieces(3)[2:]
    assert tier.residents() == [("a", 20)]
    tier.land("a", pieces(3)[2:])
    again = tier.reserve("a", pieces(3), 1)
    assert again == (reservation.slots, [], 0)
    assert (tier.used_bytes, tier.free_slots) == (30, (3,))


def test_who_was_released_last_stays_longest() -> None:
    tier = Tier(6, 10)
    filled(tier, "a", 3, now=1)
    filled(tier, "b", 3, now=2)
    tier.lease("a", 1)
    tier.release("a", 1, now=5)
    tier.release("b", 1, now=6)  # it held nothing
    filled(tier, "c", 3, now=7)
    assert [name for name, _ in tier.residents()] == ["a", "c"]


def test_as_many_go_as_must() -> None:
    tier = Tier(6, 10)
    for name in "cab":
        filled(tier, name, 2, now=1)
    assert tier.reserve("d", pieces(5), 9).evicted == 5
    assert tier.residents() == [("c", 10)]


def test_the_least_recent_goes_first_and_only_its_tail() -> None:
    tier = Tier(6, 10)
    filled(tier, "old", 3, now=1)
    filled(tier, "new", 3, now=2)
    assert tier.reserve("c", pieces(2), 3).evicted == 2
    assert tier.missing("old", pieces(3)) == pieces(3)[1:]
    assert not tier.missing("new", pieces(3))
    tier.check_invariants()


def test_leased_and_unfinished_ones_stay() -> None:
    tier = Tier(4, 10)
    filled(tier, "leased", 2, now=1)
    tier.lease("leased", 7)
    tier.reserve("reading", pieces(1), 2)
    told = "20 B of DRAM are needed for the weights, 10 B of 40 B are available; serve has --dram"
    with pytest.raises(CapacityError, match=told):
        tier.reserve("c", pieces(2), 3)
    assert tier.residents() == [("leased", 20)]
    assert tier.holders("leased") == {7}
    assert tier.holders("c") == frozenset()
    tier.release("leased", 7, 4)
    tier.release("leased", 7, 4)
    tier.release("nobody", 7, 4)
    tier.reserve("c", pieces(2), 5)
    tier.check_invariants()


def test_a_reload_does_not_evict_itself() -> None:
    tier = Tier(3, 10)
    filled(tier, "a", 2, now=1)
    with pytest.raises(CapacityError):
        tier.reserve("a", pieces(4), 2)
    assert tier.residents() == [("a", 20)]


def test_what_is_read_again_is_given_to_nobody_though_all_leave() -> None:
    tier = Tier(3, 10)
    filled(tier, "a", 2, now=0)
    tier.lease("a", 1)
    tier.discard("a", pieces(1))
    tier.read("a")
    tier.release("a", 1, now=1)
    assert tier.free_slots == (2,)
    with pytest.raises(CapacityError):
        tier.reserve("b", pieces(2), 2)
    tier.land("a", pieces(1))
    tier.check_invariants()
    assert tier.reserve("b", pieces(2), 3).evicted == 1


def test_abort_keeps_what_landed() -> None:
    tier = Tier(3, 10)
    tier.reserve("a", pieces(3), 0)
    tier.land("a", pieces(1))
    tier.abort("a")
    tier.check_invariants()
    assert tier.residents() == [("a", 10)]
    assert tier.reserve("a", pieces(3), 1).missing == pieces(3)[1:]


def test_abort_waits_for_the_last_lease() -> None:
    tier = Tier(3, 10)
    tier.lease("a", 1)
    tier.reserve("a", pieces(3), 0)
    tier.land("a", pieces(1))
    tier.abort("a", discard=True)
    assert tier.used_bytes == 30
    tier.release("a", 1, 1)
    tier.check_invariants()
    assert tier.free_slots == (0, 1, 2)
    assert tier.residents() == []


def test_abort_trusts_what_others_borrowed() -> None:
    tier = Tier(4, 10)
    assert (tier.borrowed("a"), tier.lendable("a")) == (set(), set())
    filled(tier, "a", 2, now=0)
    assert tier.lendable("a") == {*pieces(2)}
    tier.lease("a", 9, pieces(3)[1:])  # the last has not landed
    tier.lease("a", 1)
    assert tier.borrowed("a") == {*pieces(3)[1:]}
    tier.reserve("a", pieces(4), 1)
    assert tier.lendable("a") == set()
    tier.abort("a", discard=True)
    assert tier.lendable("a") == {pieces(2)[1]}
    assert tier.reserve("a", pieces(4), 2).missing == [pieces(1)[0], *pieces(4)[2:]]
    tier.abort("a", discard=True)
    tier.release("a", 9, 3)
    tier.release("a", 1, 3)
    assert tier.residents() == [("a", 10)]


def test_who_needs_only_some_pieces_keeps_no_others() -> None:
    tier = Tier(4, 10)
    filled(tier, "a", 3, now=0)
    tier.lease("a", 1)
    tier.forget("a")
    assert tier.free_slots == (3,)
    tier.lease("a", 1, pieces(2))
    tier.check_invariants()
    assert tier.residents() == [("a", 20)]
    assert len(tier.free_slots) == 2


def test_forget_waits_for_leases_and_reads_and_is_taken_back() -> None:
    tier = Tier(2, 10)
    tier.forget("nobody")
    filled(tier, "a", 2, now=0)
    tier.forget("a")
    assert tier.residents() == []
    tier.lease("b", 1)
    filled(tier, "b", 2, now=0)
    tier.forget("b")
    tier.reserve("b", pieces(2), 1)
    tier.release("b", 1, 2)
    assert tier.residents() == [("b", 20)]
    tier.forget("b")
    tier.reserve("c", pieces(2), 3)
    tier.forget("c")
    assert tier.used_bytes == 20
    tier.land("c", pieces(2))
    assert tier.used_bytes == 0
    tier.check_invariants()


def test_as_many_free_slots_as_wanted_are_ready_and_they_are_given_out_first() -> None:
    tier = Tier(6, 10)
    assert (tier.grow(), tier.shrink()) == (None, None)
    tier.wanted = 2
    filled(tier, "a", 3, now=0)
    assert [tier.grow() for _ in range(3)] == [3, 4, None]
    tier.forget("a")
    assert {tier.shrink() for _ in range(4)} == {2, 3, 4, None}
    tier.check_invariants()
    tier.reserve("b", pieces(2), 1)
    assert tier.free_slots == (2, 3, 4, 5)
    tier.abort("b")
    assert list(tier.reserve("c", pieces(6), 2).slots.values()) == [0, 1, 2, 3, 4, 5]
    assert tier.grow() is None


def test_lent_slots_belong_to_nobody_until_they_are_back() -> None:
    tier = Tier(6, 10)
    filled(tier, "old", 2, now=1)
    filled(tier, "own", 2, now=2)
    assert (tier.room("own"), tier.room("new")) == ((2, 4), (2, 6))
    assert tier.homeless("own", pieces(3)) == pieces(3)[2:]
    assert tier.homeless("new", pieces(1)) == pieces(1)
    lent = tier.lend("own", 3)
    tier.check_invariants()
    assert len(lent) == tier.lent == 3
    assert tier.residents() == [("old", 10), ("own", 20)]
    assert tier.used_bytes == 60
    with pytest.raises(CapacityError, match="20 B of DRAM are needed for the weights, 10 B of 60 B are available"):
        tier.lend("own", 2)
    tier.give_back(lent)
    assert tier.lent == 0
    tier.check_invariants()
    assert tier.free_slots == tuple(lent)


FAULTS: list[tuple[Callable[[Tier], object], str]] = [
    (lambda tier: tier._bare.append(0), "two owners"),
    (lambda tier: tier._ready.append(1), "two owners"),
    (lambda tier: tier._lent.add(0), "two owners"),
    (lambda tier: tier._residents["a"].landed.add(Piece(9, 9, 9)), "without a slot"),
    (lambda tier: tier._residents["a"].landed.clear(), "slots without bytes"),
]


@pytest.mark.parametrize(("spoil", "why"), FAULTS)
def test_invariants_see_each_fault(spoil: Callable[[Tier], object], why: str) -> None:
    tier = Tier(2, 10)
    filled(tier, "a", 1, now=0)
    spoil(tier)
    with pytest.raises(InvariantError, match=why):
        tier.check_invariants()


def test_who_refers_to_some_pieces_keeps_those_alone() -> None:
    tier = Tier(4, 10)
    filled(tier, "a", 3, now=0)
    tier.lease("a", 9, pieces(3)[1:2])
    slots = tier.landed("a")
    assert slots == {piece: number for number, piece in enumerate(pieces(3))}
    assert tier.room("b") == (1, 3)
    assert tier.reserve("b", pieces(3), now=1).evicted == 2
    assert tier.landed("a") == {pieces(3)[1]: slots[pieces(3)[1]]}
    tier.check_invariants()
    tier.abort("b")
    with pytest.raises(CapacityError):
        tier.reserve("c", pieces(4), now=2)
    tier.release("a", 9, now=3)
    assert tier.residents() == [("a", 10)]
    assert tier.reserve("c", pieces(4), now=4).evicted == 1


def test_what_is_forgotten_leaves_but_for_what_others_refer_to() -> None:
    tier = Tier(4, 10)
    filled(tier, "a", 3, now=0)
    tier.lease("a", 9, pieces(3)[:1])
    tier.forget("a")
    assert tier.residents() == [("a", 10)]
    assert len(tier.free_slots) == 3
    tier.check_invariants()
    tier.release("a", 9, now=1)
    assert tier.residents() == []
    assert tier.landed("a") == {}
