"""The cap, by a clock that jumps."""

from __future__ import annotations

import time

from serverless_llm.loader.pacer import Pacer


def test_bytes_wait_for_those_before_them() -> None:
    now = 10.0
    pacer = Pacer(100.0, lambda: now)
    assert pacer.delay(50) == 0.5
    assert pacer.delay(100) == 1.5
    now = 20.0
    assert pacer.delay(100) == 1.0


def test_the_link_is_free_at_first_whatever_the_clock_says() -> None:
    assert Pacer(100.0, lambda: 0.0).delay(50) == 0.5


def test_no_cap_no_wait() -> None:
    pacer = Pacer(0.0)
    assert pacer.delay(1 << 40) == 0
    pacer.wait(1 << 40)


def test_a_wait_takes_its_time() -> None:
    begun = time.monotonic()
    Pacer(1000.0).wait(5)
    assert time.monotonic() - begun >= 0.004


def test_stop_ends_waits() -> None:
    pacer = Pacer(1.0)
    pacer.stop()
    pacer.wait(1_000_000)
