"""Where work goes and what leaves for it: arithmetic on frozen values."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverless_llm.domain import DeviceId, DeviceSpec, Footprint
from serverless_llm.placement import choose, estimate, evict, fit, scale
from serverless_llm.placement.evict import Candidate

FOOTPRINT = Footprint("sha", file_bytes=1000, weight_bytes=900, kv_block_bytes=10, context=64)


def test_the_floor_holds_one_sequence_of_the_context() -> None:
    assert fit.kv_floor(FOOTPRINT, budget=10_000, tokens=2048, share=0.1) == 40
    assert fit.kv_floor(FOOTPRINT, budget=10_000, tokens=17, share=0.1) == 20


def test_the_floor_takes_no_more_than_its_share_but_at_least_a_block() -> None:
    assert fit.kv_floor(FOOTPRINT, budget=399, tokens=2048, share=0.1) == 30
    assert fit.kv_floor(FOOTPRINT, budget=50, tokens=2048, share=0.1) == 10


@given(st.integers(1, 10_000), st.sampled_from([0.0, 0.1, 0.3]))
def test_the_least_device_holds_a_replica_and_no_smaller_one_does(weights: int, share: float) -> None:
    footprint = Footprint("sha", weights, weights, kv_block_bytes=10, context=64)

    def holds(budget: int) -> bool:
        floor = fit.kv_floor(footprint, budget, 2048, share)
        return fit.holds_weights(footprint, DeviceSpec(0, "cpu", budget, "copy"), 0, floor)

    least = fit.least_budget(footprint, 2048, share)
    assert holds(least)
    assert not any(holds(budget) for budget in range(weights, least))


@pytest.mark.parametrize(
    ("weights", "budget", "dram", "holds"),
    [("copy", 940, 0, True), ("copy", 939, 9999, False), ("view", 940, 1000, True), ("view", 940, 999, False)],
)
def test_weights_and_floor_must_fit_and_in_view_mode_the_files_too(
    weights: str, budget: int, dram: int, holds: bool
) -> None:
    assert fit.holds_weights(FOOTPRINT, DeviceSpec(0, "cpu", budget, weights), dram, floor=40) is holds


def test_a_sequence_fits_beside_the_weights_alone() -> None:
    assert fit.holds_sequence(FOOTPRINT, budget=920, tokens=32)
    assert not fit.holds_sequence(FOOTPRINT, budget=920, tokens=33)


def test_layers_with_a_window_take_no_more_than_it() -> None:
    """Of ten bytes of a block six are of layers that hold three blocks at most."""
    windowed = replace(FOOTPRINT, kv_window_bytes=6, kv_window_blocks=3)
    assert [windowed.kv_bytes(16 * blocks) for blocks in range(6)] == [0, 10, 20, 30, 34, 38]
    assert fit.holds_sequence(windowed, budget=934, tokens=64)
    assert not fit.holds_sequence(windowed, budget=933, tokens=64)
    assert fit.kv_floor(windowed, budget=10_000, tokens=2048, share=0.1) == 34


LINKS = estimate.Links(remote=50.0, disk=100.0, upload=1000.0, overhead_s=0.5)


@pytest.mark.parametrize(
    ("start", "seconds"),
    [
        (estimate.Start(queued=0, missing=0, upload=0), 0.5),
        (estimate.Start(queued=300, missing=0, upload=500), 1.0),  # nothing to read: no queue
        (estimate.Start(queued=300, missing=200, upload=500), 5.5),
        (estimate.Start(queued=0, missing=10, upload=2000), 2.5),  # the upload is the slower link
        (estimate.Start(0, 0, 500, remote_queued=300, remote_missing=0), 1.0),  # nothing to ask a server for
        (estimate.Start(0, 0, 500, remote_queued=300, remote_missing=200), 10.5),
        (estimate.Start(100, 100, 500, remote_queued=0, remote_missing=50), 2.5),  # the disk is the slower link
        (estimate.Start(300, 0, 500, remote_queued=0, remote_missing=50), 1.5),
    ],
)
def test_a_start_takes_its_slowest_link_and_the_overhead(start: estimate.Start, seconds: float) -> None:
    assert estimate.startup_s(start, LINKS) == pytest.approx(seconds)


def test_reuse_halves_at_half_time() -> None:
    assert estimate.reuse(0.0, 60.0) == 1.0
    assert estimate.reuse(60.0, 60.0) == 0.5


def test_learning_starts_with_the_first_sample() -> None:
    assert estimate.learn(None, 4.0, 0.3) == 4.0
    assert estimate.learn(4.0, 14.0, 0.3) == 7.0


def test_victims_are_cheap_to_bring_back_and_long_idle() -> None:
    fresh, stale, dear = Candidate((1,), 10, 1.0, 1.0), Candidate((2,), 10, 1.0, 9.0), Candidate((3,), 10, 99.0, 9.0)
    assert evict.victims([fresh, stale, dear], 10) == (stale,)
    assert evict.victims([fresh, stale, dear], 11) == (stale, fresh)


def test_equal_victims_go_by_id() -> None:
    assert evict.victims([Candidate((2,), 10, 1.0, 1.0), Candidate((1,), 10, 1.0, 1.0)], 5) == (
        Candidate((1,), 10, 1.0, 1.0),
    )


def test_a_victim_that_a_larger_one_makes_needless_stays() -> None:
    small, large = Candidate((1,), 10, 1.0, 9.0), Candidate((2,), 90, 5.0, 9.0)
    assert evict.victims([small, large], 80) == (large,)


def test_no_room_even_without_all() -> None:
    assert evict.victims([Candidate((1,), 10, 1.0, 1.0)], 11) is None
    assert evict.victims([], 0) == ()


SIZES = st.lists(st.tuples(st.integers(1, 50), st.floats(0, 9), st.floats(0, 9)), max_size=8)


@given(SIZES, st.integers(-5, 200))
def test_victims_suffice_and_each_is_needed(sizes: list[tuple[int, float, float]], needed: int) -> None:
    candidates = [Candidate((number,), *values) for number, values in enumerate(sizes)]
    chosen = evict.victims(candidates, needed)
    if chosen is None:
        assert sum(candidate.bytes for candidate in candidates) < needed
        return
    freed = sum(candidate.bytes for candidate in chosen)
    assert freed >= needed
    assert all(freed - candidate.bytes < needed for candidate in chosen)


def test_holds_are_as_long_as_bringing_back_takes() -> None:
    assert [evict.hold_s(seconds, 0.25, 10.0) for seconds in (0.1, 3.0, 60.0)] == [0.25, 3.0, 10.0]


def test_patience_doubles_with_every_switch_up_to_its_cap() -> None:
    assert [evict.patience_s(0.1, 2.0, 16.0, switches) for switches in (0, 1, 2, 9)] == [2.0, 4.0, 8.0, 16.0]
    assert evict.patience_s(5.0, 2.0, 16.0, 1) == 10.0


def test_the_least_sum_wins_then_the_device_id() -> None:
    a = choose.Option(DeviceId("n0", 0), 3.0, 0.0, ())
    b = choose.Option(DeviceId("n0", 1), 1.0, 1.0, (7,))
    c = choose.Option(DeviceId("n1", 0), 2.0, 0.0, ())
    assert choose.best([c, a, b]) == b
    assert choose.best([]) is None


def test_of_places_that_cost_about_as_much_the_least_crowded_wins() -> None:
    busy = choose.Option(DeviceId("n0", 0), 1.0, 0.0, (), crowd=(1, 1))
    full = choose.Option(DeviceId("n0", 1), 1.0, 0.0, (), crowd=(0, 2))
    roomy = choose.Option(DeviceId("n1", 0), 1.25 * choose.CLOSE, 0.0, (), crowd=(0, 1))
    assert choose.best([busy, full, roomy]) == full
    near = replace(roomy, startup_s=choose.CLOSE)
    assert choose.best([busy, near, full]) == near


CROWD = st.tuples(st.integers(0, 2), st.integers(0, 2))
OPTION = st.builds(
    choose.Option,
    st.builds(DeviceId, st.sampled_from(["n0", "n1"]), st.integers(0, 9)),
    st.sampled_from([0.0, 1.0, 1.04, 1.09, 3.0]),
    st.sampled_from([0.0, 0.01, 1.0]),
    st.sampled_from([(), (7,)]),
    CROWD,
)


@given(st.lists(OPTION, min_size=1, unique_by=lambda option: option.device))
def test_a_crowd_costs_little_time_and_sends_nobody_away(options: list[choose.Option]) -> None:
    best = choose.best(options)
    least = min(options, key=lambda option: (option.cost_s, option.device))
    assert best is not None
    if least.victims:
        assert best == least
    else:
        assert not best.victims
        assert best.cost_s <= choose.CLOSE * least.cost_s
        assert not [
            one
            for one in options
            if not one.victims and one.cost_s <= choose.CLOSE * least.cost_s and one.crowd < best.crowd
        ]


@pytest.mark.parametrize(
    ("demand", "want"),
    [
        (scale.Demand(0, False, 0, 0, 0, 0, 1, 0), scale.Want.NOTHING),
        (scale.Demand(1, False, 0, 0, 0, 0, 1, 0), scale.Want.FIRST),
        (scale.Demand(0, True, 0, 0, 0, 0, 1, 0), scale.Want.FIRST),
        (scale.Demand(0, False, 0, 0, 0, 1, 1, 0), scale.Want.MORE),
        (scale.Demand(0, False, 1, 4, 1, 2, 2, 0), scale.Want.MORE),  # min_replicas does not wait for the first
        (scale.Demand(9, False, 1, 0, 1, 0, 4, 0), scale.Want.NOTHING),  # waiters of one model share one load
        (scale.Demand(4, False, 1, 4, 0, 0, 4, 0), scale.Want.NOTHING),
        (scale.Demand(5, False, 1, 4, 0, 0, 4, 0), scale.Want.MORE),
        (scale.Demand(5, False, 4, 4, 0, 0, 4, 0), scale.Want.NOTHING),
        (scale.Demand(0, False, 1, 1, 0, 0, 4, 1), scale.Want.NOTHING),
        (scale.Demand(0, False, 1, 0, 0, 0, 4, 1), scale.Want.MORE),  # before one comes who may not wait
        (scale.Demand(0, False, 1, 0, 1, 0, 4, 1), scale.Want.NOTHING),
        (scale.Demand(0, False, 0, 0, 0, 0, 4, 1), scale.Want.NOTHING),  # nobody has asked yet
    ],
)
def test_one_more_replica(demand: scale.Demand, want: scale.Want) -> None:
    assert scale.wanted(demand) is want


def test_a_replica_just_used_is_no_cheap_victim() -> None:
    used, dear = Candidate((1,), 10, 1.0, 0.0), Candidate((2,), 10, 3.0, 1.0)
    assert evict.victims([used, dear], 10) == (dear,)
