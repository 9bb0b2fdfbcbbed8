"""Ranges are as long as a server's answers want them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverless_llm.loader import ranges
from serverless_llm.loader.ranges import Ranges

MOST = 8 << 20


def learned(rate: float, latency: float, answers: int = 30) -> Ranges:
    """After answers of connections that move `rate` bytes per second."""
    found = Ranges(MOST)
    for _ in range(answers):
        found.observe(found.nbytes, latency, found.nbytes / rate)
    return found


def test_a_range_comes_in_a_moment() -> None:
    assert Ranges(MOST).nbytes == ranges.FIRST
    assert learned(7.5e6, 0.01).nbytes == int(7.5e6 * ranges.MOMENT) // 4096 * 4096
    assert learned(1e9, 0.0).nbytes == MOST
    assert learned(1.0, 0.0).nbytes == ranges.LEAST
    assert learned(1e9, 1.0).nbytes == MOST
    assert Ranges(4096).nbytes == 4096


@given(rate=st.floats(1e4, 1e9), latency=st.floats(0, 10))
def test_no_connection_waits_more_than_it_moves_unless_long(rate: float, latency: float) -> None:
    found = learned(rate, latency)
    wanted = min(max(ranges.MOMENT, ranges.LATENT * latency), ranges.PATIENT)
    assert found.nbytes % 4096 == 0
    assert found.nbytes in (MOST, ranges.LEAST) or found.nbytes / rate == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize("short", [3000, 64 << 10])
def test_a_short_answer_that_comes_at_once_changes_little(short: int) -> None:
    slow = 78e3  # a sixteenth of 10 Mb/s
    first = Ranges(MOST)
    first.observe(short, 0.05, 50e-6)
    assert first.nbytes == ranges.FIRST
    for _ in range(30):
        first.observe(first.nbytes, 0.05, first.nbytes / slow)
    before = first.nbytes
    for _ in range(4):
        first.observe(short, 0.05, 50e-6)
        assert first.nbytes <= 2 * before
        first.observe(first.nbytes, 0.05, first.nbytes / slow)
    first.observe(first.nbytes, 0.05, first.nbytes / slow)
    assert first.nbytes <= 1.5 * before


def test_a_range_is_at_most_twice_as_long_as_one_that_came() -> None:
    found = Ranges(MOST)
    found.observe(1 << 20, 0.0, 10.0)
    slowed = found.nbytes
    assert slowed < 128 << 10
    found.observe(slowed, 0.0, 1e-6)
    assert found.nbytes <= 2 * slowed
