"""Limits of a key: what passes, what waits, and for how long."""

from __future__ import annotations

import pytest

from serverless_llm.errors import RequestError
from serverless_llm.gateway.keys import Key
from serverless_llm.gateway.quotas import Quotas


def limited(**limits: int) -> Key:
    return Key("k", b"", **limits)  # type: ignore[arg-type]


def refusal(quotas: Quotas, key: Key, now: float, choices: int = 1) -> RequestError | None:
    try:
        quotas.enter(key, now).grow(choices)
    except RequestError as error:
        return error
    return None


def test_requests_of_a_minute_pass_at_once_then_one_by_one() -> None:
    quotas, key = Quotas(), limited(requests_per_minute=6)
    assert [refusal(quotas, key, 100.0) for _ in range(6)] == [None] * 6
    error = refusal(quotas, key, 100.0)
    assert error is not None
    assert (error.status, error.code) == (429, "rate_limit_exceeded")
    assert error.retry_after == pytest.approx(10.0)
    assert "6 requests a minute" in error.message
    assert refusal(quotas, key, 109.9) is not None  # what is refused counts for nothing
    assert refusal(quotas, key, 110.1) is None


def test_tokens_are_taken_when_they_are_known() -> None:
    quotas, key = Quotas(), limited(tokens_per_minute=60)
    quotas.enter(key, 0.0).leave(120)
    error = refusal(quotas, key, 0.0)
    assert error is not None
    assert error.retry_after == pytest.approx(61.0)
    assert refusal(quotas, key, 62.0) is None


def test_rest_fills_no_more_than_a_minute() -> None:
    quotas, key = Quotas(), limited(requests_per_minute=1)
    assert refusal(quotas, key, 0.0) is None
    assert refusal(quotas, key, 1e6) is None
    assert refusal(quotas, key, 1e6) is not None


def test_requests_at_a_time() -> None:
    quotas, key = Quotas(), limited(concurrency=2)
    quotas.enter(key, 0.0)
    stay = quotas.enter(key, 0.0)
    error = refusal(quotas, key, 0.0)
    assert error is not None
    assert "2 requests at a time" in error.message
    stay.leave(0)
    assert refusal(quotas, key, 0.0) is None


def test_each_choice_counts_as_a_request_that_runs() -> None:
    quotas, key = Quotas(), limited(concurrency=4)
    first = quotas.enter(key, 0.0)
    first.grow(3)
    second = quotas.enter(key, 0.0)
    with pytest.raises(RequestError, match="4 requests at a time; this one has 2 choices") as caught:
        second.grow(2)
    assert (caught.value.status, caught.value.retry_after) == (429, 1.0)
    with pytest.raises(RequestError) as caught:
        second.grow(5)
    assert caught.value.retry_after is None  # it never fits
    second.leave(0)
    first.leave(0)
    assert refusal(quotas, key, 0.0, choices=4) is None
    assert refusal(quotas, key, 0.0) is not None


def test_a_key_without_limits_and_others_are_not_held() -> None:
    quotas, key = Quotas(), limited(concurrency=1)
    quotas.enter(key, 0.0)
    assert [refusal(quotas, Key("other", b""), 0.0) for _ in range(100)] == [None] * 100


def test_a_key_that_is_read_anew_keeps_what_it_used() -> None:
    quotas = Quotas()
    quotas.enter(limited(concurrency=1), 0.0)
    assert refusal(quotas, limited(concurrency=1), 0.0) is not None
    assert refusal(quotas, limited(concurrency=2), 0.0) is None
