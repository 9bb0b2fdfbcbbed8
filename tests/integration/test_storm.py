"""Fifteen kills of a small storm; `make soak` runs the large one."""

from __future__ import annotations

import pytest

from bench.soak import Segment, faults, run_segment

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "segment",
    [Segment(seed=1, weights="copy", kills=8, head_kills=1), Segment(2, "view", 7, 1)],
    ids=lambda s: s.weights,
)
def test_no_kill_loses_doubles_changes_or_leaks_anything(segment: Segment) -> None:
    tally = run_segment(segment, "cpu")
    assert faults(tally) == []
    assert sum(tally.kills.values()) == segment.kills
    assert tally.ended > 0
