"""The tier's rules one by one; the state machine is in tests/properties/test_residency.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from serverless_llm.errors import CapacityError, InvariantError
from serverless_llm.loader.link import byte_s
from serverless_llm.loader.plan import Piece
from serverless_llm.loader.residency import HALF_S, Tier, Uses, value

COSTS = st.floats(1e-11, 1e-3)
TIMES = st.lists(st.floats(0, 10 * HALF_S), min_size=1, max_size=9)


def pieces(count: int, length: int = 10) -> list[Piece]:
    return [Piece(0, 10 * number, length) for number in range(count)]


def filled(tier: Tier, checkpoint: str, count: int, now: float) -> None:
    tier.reserve(checkpoint, pieces(count), now)
    tier.land(checkpoint, pieces(count))
    tier.check_invariants()


def use(tier: Tier, checkpoint: str, count: int, now: float) -> None:
    """A replica comes, and leaves at once."""
    filled(tier, checkpoint, count, now)
    tier.lease(checkpoint, 1)
    tier.release(checkpoint, 1, now)


def make_room(tier: Tier, count: int, now: float, costs: dict[str, float], lent: bool = False) -> None:
    """For pieces of another checkpoint, or for its ring."""
    if lent:
        tier.lend("new", count, costs.__getitem__)
    else:
        tier.reserve("new", pieces(count), now, costs.__getitem__)
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


@given(a=TIMES, b=TIMES, a_cost=COSTS, b_cost=COSTS, later=st.floats(0, HALF_S), lent=st.booleans())
def test_of_two_idle_ones_the_one_of_less_value_leaves_first(
    a: list[float], b: list[float], a_cost: float, b_cost: float, later: float, lent: bool
) -> None:
    """Seconds to bring a byte back x uses, each of which counts half as much after every `HALF_S`."""
    tier, now = Tier(4, 10), max(*a, *b) + later
    for when, name in sorted([*((when, "a") for when in a), *((when, "b") for when in b)]):
        use(tier, name, 2, when)
    costs = {"a": a_cost, "b": b_cost}
    worth = {
        name: costs[name] * sum(2 ** ((when - now) / HALF_S) for when in times) for name, times in (("a", a), ("b", b))
    }
    less, more = sorted(worth, key=worth.__getitem__)
    assume(worth[more] > worth[less] * (1 + 1e-6))
    make_room(tier, 1, now, costs, lent)
    assert dict(tier.residents()) == {less: 10, more: 20}


@given(
    uses=st.integers(2, 100),
    later=st.floats(0, 60),
    network=st.floats(1e5, 1e9),
    faster=st.floats(1, 1000),
    lent=st.booleans(),
)
def test_what_only_a_server_has_and_is_used_often_outlives_what_a_disk_has_and_was_used_once_later(
    uses: int, later: float, network: float, faster: float, lent: bool
) -> None:
    tier, disk = Tier(4, 10), network * faster
    for second in range(uses):
        use(tier, "far", 2, second)
    use(tier, "near", 2, uses + later)
    costs = {"far": byte_s(1.0, network, disk), "near": byte_s(0.0, network, disk)}
    make_room(tier, 2, uses + later, costs, lent)
    assert [name for name, _ in tier.residents()] == ["far"]


@given(states=st.lists(st.sampled_from(["idle", "leased", "borrowed", "reading"]), max_size=6), data=st.data())
def test_nothing_in_use_leaves_however_little_it_is_worth(states: list[str], data: st.DataObject) -> None:
    tier, costs, stays, loose = Tier(12, 10), dict[str, float](), dict[str, list[Piece]](), 12
    for number, state in enumerate(states):
        name, costs[str(number)] = str(number), data.draw(COSTS)
        use(tier, name, 1 if state == "reading" else 2, data.draw(st.floats(0, HALF_S)))
        if state == "reading":
            tier.reserve(name, pieces(2), HALF_S)
        elif state != "idle":
            tier.lease(name, 9, pieces(1) if state == "borrowed" else None)
        stays[name] = pieces({"idle": 0, "leased": 2}.get(state, 1))
        loose -= {"idle": 0, "borrowed": 1}.get(state, 2)
    before = {name: tier.landed(name) for name in stays}
    needed = data.draw(st.integers(1, 12))
    if needed > loose:
        with pytest.raises(CapacityError):
            make_room(tier, needed, HALF_S, costs)
        assert {name: tier.landed(name) for name in stays} == before
    else:
        make_room(tier, needed, HALF_S, costs)
    for name, kept in stays.items():
        assert all(tier.landed(name)[piece] == before[name][piece] for piece in kept)


def test_equal_values_leave_by_last_use() -> None:
    for first, second in ("ab", "ba"):
        tier = Tier(4, 10)
        use(tier, first, 2, 0.0)
        use(tier, first, 2, 0.0)
        use(tier, second, 2, HALF_S)
        make_room(tier, 2, HALF_S, {"a": 2.0, "b": 2.0})
        assert [name for name, _ in tier.residents()] == [second]


def test_a_value_is_the_logarithm_of_cost_times_uses_at_the_time_0() -> None:
    assert value(Uses(4.0, 0.0), 0.5) == 1.0
    assert value(Uses(4.0, 2 * HALF_S), 0.25) == 2.0


def test_uses_halve_with_time_and_what_was_used_until_now_has_one_at_least() -> None:
    assert Uses(4.0, HALF_S).until(2 * HALF_S, 1) == Uses(3.0, 2 * HALF_S)
    assert Uses(4.0, HALF_S).until(3 * HALF_S, 0) == Uses(1.0, 3 * HALF_S)
    assert Uses(4.0, HALF_S).until(9 * HALF_S, 0) == Uses(1.0, 9 * HALF_S)


def test_uses_outlast_an_eviction_but_not_that_a_checkpoint_is_forgotten() -> None:
    for forgotten in (False, True):
        tier = Tier(4, 10)
        for now in range(9):
            use(tier, "often", 2, now)
        tier.reserve("all", pieces(4), 10)
        tier.abort("all")
        assert tier.residents() == []
        if forgotten:
            tier.forget("often")
        use(tier, "often", 2, 11)
        use(tier, "twice", 2, 12)
        use(tier, "twice", 2, 13)
        tier.reserve("new", pieces(2), 14)
        assert [name for name, _ in tier.residents()] == ["twice" if forgotten else "often"]


def test_who_holds_what_is_forgotten_leaves_no_trace() -> None:
    tier = Tier(4, 10)
    tier.lease("a", 1)
    filled(tier, "a", 2, now=0)
    tier.forget("a")
    tier.release("a", 1, now=1)
    assert tier._uses == {}


def test_what_finds_no_room_was_not_used() -> None:
    tier = Tier(4, 10)
    use(tier, "a", 2, 0)
    for now in range(9):
        with pytest.raises(CapacityError):
            tier.reserve("a", pieces(5), now)
    use(tier, "b", 2, 9)
    tier.reserve("new", pieces(2), 10)
    assert [name for name, _ in tier.residents()] == ["b"]


def test_the_end_of_a_use_is_not_another_one() -> None:
    tier = Tier(4, 10)
    filled(tier, "twice", 2, now=0)
    filled(tier, "twice", 2, now=1)
    use(tier, "once", 2, 2)
    tier.reserve("new", pieces(2), 3)
    assert [name for name, _ in tier.residents()] == ["twice"]
