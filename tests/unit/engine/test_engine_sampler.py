"""Drawing tokens."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from serverless_llm.domain import Sampling
from serverless_llm.engine.sampler import draw, greedy, uniform

LOGITS = torch.tensor([0.0, 2.0, 1.0, 2.0, -3.0])


def drawn(sampling: Sampling, logits: torch.Tensor = LOGITS, count: int = 600) -> dict[int, float]:
    counts = Counter(draw(logits, sampling, position) for position in range(count))
    return {token: number / count for token, number in counts.items()}


def test_uniform_is_a_fixed_function() -> None:
    """The very numbers, so that another platform or a rewrite cannot change what a seed means."""
    assert uniform(0, 0) == 0.8833108082136426  # 0xE220A8397B1DCDAF, SplitMix64's first word from seed 0
    assert uniform(1, 0) == 0.7497482413580301
    assert uniform(0, 1) == 0.43152799704850997
    assert uniform(-1, 7) == 0.7741445495399422


def test_uniform_is_uniform() -> None:
    numbers = [uniform(seed, position) for seed in range(100) for position in range(100)]
    assert all(0 <= number < 1 for number in numbers)
    buckets = Counter(int(number * 10) for number in numbers)
    assert sum((count - 1000) ** 2 / 1000 for count in buckets.values()) < 27.9  # chi-square, 9 degrees, p = 0.001
    assert len(set(numbers)) == len(numbers)


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    assert draw(LOGITS, Sampling(temperature=0), 0) == 1
    assert draw(LOGITS, Sampling(temperature=1, top_k=1, seed=3), 5) == 1
    assert greedy(Sampling(temperature=0))
    assert not greedy(Sampling(temperature=0.1))


def test_temperature_shapes_the_distribution() -> None:
    for temperature in (0.5, 1.0, 2.0):
        expected = torch.softmax(LOGITS / temperature, dim=0)
        for token, share in drawn(Sampling(temperature=temperature, seed=1)).items():
            assert math.isclose(share, float(expected[token]), abs_tol=0.05)


def test_the_smallest_temperatures_are_greedy_and_not_infinite() -> None:
    for temperature in (1e-9, 1e-310, 5e-324):
        assert set(drawn(Sampling(temperature=temperature, seed=1), count=50)) == {1, 3}


def test_top_k_prefers_lower_ids_among_equals() -> None:
    assert set(drawn(Sampling(top_k=2))) == {1, 3}
    assert set(drawn(Sampling(top_k=3))) == {1, 2, 3}
    assert set(drawn(Sampling(top_k=1, top_p=0.5))) == {1}
    assert set(drawn(Sampling(top_k=2), torch.zeros(6))) == {0, 1}
    assert set(drawn(Sampling(top_k=99))) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(("top_p", "kept"), [(0.01, {1}), (0.5, {1, 3}), (0.81, {1, 2, 3}), (1.0, {0, 1, 2, 3, 4})])
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, kept: set[int]) -> None:
    assert set(drawn(Sampling(top_p=top_p))) == kept


def test_top_p_counts_what_top_k_left() -> None:
    assert set(drawn(Sampling(top_k=2, top_p=0.49))) == {1}


def test_extreme_logits() -> None:
    wild = torch.tensor([-torch.inf, 3e38, 0.0])
    assert set(drawn(Sampling(temperature=1e-6), wild, 50)) == {1}
    assert set(drawn(Sampling(temperature=100.0, top_p=0.9), wild, 50)) == {1}


@given(
    st.integers(-(1 << 70), 1 << 70), st.integers(0, 1 << 20), st.floats(0.01, 5), st.integers(0, 8), st.floats(0.01, 1)
)
def test_a_draw_is_a_function_of_seed_and_position(seed: int, position: int, heat: float, k: int, p: float) -> None:
    sampling = Sampling(temperature=heat, top_k=k, top_p=p, seed=seed)
    rows = torch.stack([LOGITS, -LOGITS])
    assert draw(rows[0], sampling, position) == draw(LOGITS.clone(), sampling, position)
    assert 0 <= uniform(seed, position) < 1
