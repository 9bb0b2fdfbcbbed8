"""The short history of traffic: columns of equal length, rates per second, quantiles from bins."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverless_llm.gateway.traffic import GROWTH, LEAST, STEP, STEPS, Traffic

NOW = 1000.0


def test_rates_and_latencies_of_a_step() -> None:
    traffic = Traffic()
    traffic.tokens(3, 0.5, 0.0, NOW)
    traffic.tokens(1, None, 0.02, NOW + 0.1)
    traffic.ended(failed=False, now=NOW + 0.2)
    traffic.ended(failed=True, now=NOW + 0.3)
    shown = traffic.shown(NOW + STEP + 0.5)
    assert shown["age_s"] == pytest.approx(0.5)
    last = {name: column[-1] for name, column in shown.items() if isinstance(column, list)}
    assert (last["tokens_per_s"], last["requests_per_s"], last["errors_per_s"]) == (2.0, 1.0, 0.5)
    assert last["first_token_p50_ms"] == pytest.approx(500, rel=0.1)
    assert last["token_gap_p50_ms"] == pytest.approx(20, rel=0.1)


def test_the_step_that_goes_on_is_not_shown_and_old_ones_are_gone() -> None:
    traffic = Traffic()
    traffic.tokens(1, 0.5, 0.0, NOW)
    assert sum(traffic.shown(NOW)["tokens_per_s"]) == 0.0
    assert traffic.shown(NOW + STEPS * STEP)["tokens_per_s"][0] == 0.5
    assert sum(traffic.shown(NOW + (STEPS + 1) * STEP)["tokens_per_s"]) == 0.0


def test_nothing_is_kept_for_ever() -> None:
    traffic = Traffic()
    for step in range(STEPS * 3):
        traffic.tokens(1, None, 0.01, step * STEP)
    assert len(traffic._steps) == STEPS


def test_columns_are_as_long_whatever_happened() -> None:
    shown = Traffic().shown(NOW)
    assert {len(column) for column in shown.values() if isinstance(column, list)} == {STEPS}
    assert set(shown["first_token_p95_ms"]) == {None}


@given(st.lists(st.floats(LEAST, 100.0), min_size=1, max_size=30), st.sampled_from([("p50", 0.5), ("p95", 0.95)]))
def test_a_quantile_is_right_to_half_a_bin(seconds: list[float], which: tuple[str, float]) -> None:
    name, fraction = which
    traffic = Traffic()
    for one in seconds:
        traffic.tokens(1, one, 0.0, NOW)
    exact = sorted(seconds)[math.ceil(fraction * len(seconds)) - 1]
    found = traffic.shown(NOW + STEP)[f"first_token_{name}_ms"][-1] / 1000
    assert 1 / GROWTH**0.6 <= found / exact <= GROWTH**0.6


def test_a_latency_below_the_first_bin_is_in_it() -> None:
    traffic = Traffic()
    traffic.tokens(1, 0.0, 0.0, NOW)
    assert traffic.shown(NOW + STEP)["first_token_p50_ms"][-1] < 1
