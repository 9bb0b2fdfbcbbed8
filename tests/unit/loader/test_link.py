"""What a link learns."""

from __future__ import annotations

import pytest

from serverless_llm.loader.link import MINIMUM, Link, byte_s


def test_the_first_transfer_is_believed_and_later_ones_weighed() -> None:
    link = Link()
    link.observe(100 << 20, 1.0)
    assert link.bandwidth == 100 << 20
    link.observe(200 << 20, 1.0)
    assert link.bandwidth == pytest.approx(130 << 20)
    assert link.bytes == 300 << 20


def test_short_or_timeless_transfers_only_count() -> None:
    link = Link()
    link.observe(MINIMUM - 1, 1.0)
    link.observe(MINIMUM, 0.0)
    assert link.bandwidth == 0
    assert link.bytes == 2 * MINIMUM - 1


def test_bandwidth_is_bytes_over_seconds_of_all_but_short_transfers() -> None:
    link = Link()
    link.observe(MINIMUM - 1, 1.0)
    assert link.bandwidth == 0.0
    link.observe(MINIMUM, 4.0)
    assert link.bandwidth == MINIMUM / 4


def test_a_byte_comes_back_over_the_link_that_takes_longer() -> None:
    assert byte_s(0.0, network=1e6, disk=1e9) == 1e-9
    assert byte_s(1.0, network=1e6, disk=1e9) == 1e-6
    assert byte_s(0.25, network=1e6, disk=1e9) == 0.25e-6
    assert byte_s(0.25, network=1e9, disk=1e6) == 0.75e-6
