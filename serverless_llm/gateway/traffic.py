"""What the last minutes brought, in steps of two seconds: tokens, requests, latencies. For the dashboard's charts.

Prometheus keeps histories; this is for an operator without one. Memory and the cost of a token are bounded: latencies
are counted in logarithmic bins, of which a quantile is right to about a tenth.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

STEP = 2.0  # seconds
STEPS = 150  # five minutes
LEAST = 1e-4  # seconds, the lowest bin
GROWTH = 1.2  # from one bin to the next
_SCALE = 1 / math.log(GROWTH)

Bins = Counter[int]


@dataclass(slots=True)
class Step:
    """One step of the history. `first`, `gaps`: how many latencies fell into which bin."""

    number: int
    tokens: int = 0
    requests: int = 0
    errors: int = 0
    first: Bins = field(default_factory=Counter)
    gaps: Bins = field(default_factory=Counter)


class Traffic:
    """The last `STEPS` steps of one gateway; `now` is monotonic, in seconds."""

    def __init__(self) -> None:
        self._steps: deque[Step] = deque(maxlen=STEPS)

    def tokens(self, count: int, first_s: float | None, gap_s: float, now: float) -> None:
        """A sequence got `count` tokens: its first ones `first_s` after its arrival, or others after `gap_s`."""
        step = self._step(now)
        step.tokens += count
        if first_s is None:
            step.gaps[_bin(gap_s)] += 1
        else:
            step.first[_bin(first_s)] += 1

    def ended(self, failed: bool, now: float) -> None:
        step = self._step(now)
        step.requests += 1
        step.errors += failed

    def _step(self, now: float) -> Step:
        number = int(now / STEP)
        if not self._steps or self._steps[-1].number != number:
            self._steps.append(Step(number))
        return self._steps[-1]

    def shown(self, now: float | None = None) -> dict[str, Any]:
        """The complete steps before now as columns, the oldest first. Rates are per second, latencies milliseconds."""
        now = time.monotonic() if now is None else now
        end = int(now / STEP)
        steps = {step.number: step for step in self._steps}
        found = [steps.get(number) or Step(number) for number in range(end - STEPS, end)]
        return {
            "step_s": STEP,
            "age_s": now - end * STEP,
            "tokens_per_s": [step.tokens / STEP for step in found],
            "requests_per_s": [step.requests / STEP for step in found],
            "errors_per_s": [step.errors / STEP for step in found],
            "first_token_p50_ms": [quantile_ms(step.first, 0.5) for step in found],
            "first_token_p95_ms": [quantile_ms(step.first, 0.95) for step in found],
            "token_gap_p50_ms": [quantile_ms(step.gaps, 0.5) for step in found],
        }


def _bin(seconds: float) -> int:
    return int(math.log(seconds / LEAST) * _SCALE) if seconds > LEAST else 0


def quantile_ms(bins: Bins, fraction: float) -> float | None:
    """The middle of the bin that holds this fraction of the latencies, in milliseconds; None of none."""
    rank = fraction * bins.total()
    for number in sorted(bins):
        rank -= bins[number]
        if rank <= 0:
            return float(f"{1000 * LEAST * GROWTH ** (number + 0.5):.3g}")
    return None
