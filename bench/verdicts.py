"""A line for what was promised and what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from bench.common import interval

SLACK = 0.03  # by which the lower end of a ratio's interval may lie below what is promised


def at_least(what: str, values: Sequence[float], least: float) -> str:
    """Met where the median of per-round ratios and, but for the slack, the interval's lower end are."""
    median, low = statistics.median(values), interval(values)[0] if len(values) > 1 else values[0]
    met = median >= least and low >= least - SLACK
    return f"{what} {median:.2f} (at least {least:.2f}; interval from {low:.2f}): {_judged(met)}"


def at_most(what: str, values: Sequence[float], most: float) -> str:
    """Met where the median is."""
    median = statistics.median(values)
    return f"{what} {median:.4g} (at most {most:g}): {_judged(median <= most)}"


def _judged(met: bool) -> str:
    return "met" if met else "MISSED"
