"""A model whose loads fail is left alone for a while, twice as long each time; who waited is told why."""

from __future__ import annotations

import math

from serverless_llm.cluster.sequences import reject
from serverless_llm.cluster.state import Model
from serverless_llm.cluster.turn import Turn


def fail(turn: Turn, model: Model, message: str, permanent: bool) -> None:
    """A load failed. `permanent`: nothing but an operator's load or a new deploy can help."""
    model.failures += 1
    pause = _backoff(turn.policy.cooldown_s, turn.policy.cooldown_cap_s, model.failures)
    _cool(turn, model, message, math.inf if permanent else pause)


def convict(turn: Turn, model: Model, deaths: int) -> None:
    """Its load, alone on a device, ended the engine process once more."""
    model.convictions += 1
    pause = _backoff(turn.policy.guilty_cooldown_s, turn.policy.guilty_cooldown_cap_s, model.convictions)
    _cool(turn, model, f"loading {model.spec.name} ended the engine process {deaths} times", pause)


def forgive(turn: Turn, model: Model) -> None:
    """A load succeeded, or the model was deployed anew."""
    model.error = ""
    model.failures = model.convictions = model.expiries = model.load_deaths = 0
    end_pause(turn, model)


def end_pause(turn: Turn, model: Model) -> None:
    """It may be loaded now; the pause after another failure is still twice as long."""
    model.cool_until = 0.0
    turn.disarm("cool", model.spec.name)


def reject_waiters(turn: Turn, model: Model, message: str, retry_after: float | None) -> None:
    """503 for all that wait; `retry_after` None: a retry is useless."""
    model.requested_at = None
    for sequence in [*model.waiting, *model.unready.values()]:
        reject(turn, sequence, 503, "model_load_failed", message, retry_after, retry=retry_after is not None)


def retry_after(turn: Turn, model: Model) -> float | None:
    """Seconds until a request may load the model again, None: none ever may."""
    left = model.cool_until - turn.now
    return None if math.isinf(left) else max(turn.policy.retry_floor_s, left)


def _cool(turn: Turn, model: Model, message: str, pause: float) -> None:
    model.error, model.cool_until, model.expiries = message, turn.now + pause, 0
    if not math.isinf(pause):
        turn.arm("cool", model.spec.name, pause)
    turn.touch(model.spec.name)


def _backoff(base: float, cap: float, times: int) -> float:
    return min(cap, base * 2.0 ** min(times - 1, 62))
