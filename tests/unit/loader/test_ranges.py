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
def test_no_connection_waits_more_than_it_moves(rate: float, latency: float) -> None:
    found = learned(rate, latency)
    moving = found.nbytes / rate
    assert found.nbytes == MOST or found.nbytes == ranges.LEAST or moving >= 0.9 * ranges.LATENT * latency
    assert found.nbytes % 4096 == 0


def test_the_first_answer_counts_whole_and_the_next_in_part() -> None:
    found = Ranges(MOST)
    found.observe(1 << 20, 0.0, 1.0)
    first = found.nbytes
    assert first == int((1 << 20) * ranges.MOMENT) // 4096 * 4096
    found.observe(1 << 20, 0.0, 0.5)
    assert found.nbytes / first == pytest.approx(1 + ranges.WEIGHT, rel=0.01)
