"""The last cold starts, phase by phase, for those who watch. Pure: the controller tells it what happened and when."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from serverless_llm.cluster.commands import Outcome
from serverless_llm.cluster.state import STARTING, Replica, Sequence, State
from serverless_llm.domain import LoadPhases

KEPT = 24  # starts; what fits on an operator's screen


@dataclass(slots=True)
class Start:
    """One start that became ready. `prefill_s`: of the first request that waited for it; None where nobody did."""

    outcome: Outcome
    ready_at: float
    prefill_s: float | None = None


class StartLog:
    """The last `KEPT` starts; times are the machine's, in seconds."""

    def __init__(self) -> None:
        self._starts: deque[Start] = deque(maxlen=KEPT)

    def ready(self, outcome: Outcome, now: float) -> None:
        self._starts.append(Start(outcome, now))

    def first_token(self, sequence: Sequence, prefill_s: float) -> None:
        """A sequence has its first token; it belongs to the start of its replica if it waited for that."""
        for start in self._starts:
            if sequence.replica is not None and start.outcome.replica == sequence.replica.id:
                if start.prefill_s is None and sequence.arrived <= start.ready_at:
                    start.prefill_s = prefill_s
                return

    def shown(self, state: State, now: float, unix: float) -> list[dict[str, Any]]:
        """As JSON, the latest first; before them the starts that go on. `began`: unix time of the decision."""
        live = [replica for replica in state.replicas.values() if replica.state in STARTING]
        live.sort(key=lambda replica: -replica.decided_at)
        return [_live(replica, now, unix) for replica in live] + [
            _done(start, unix - now) for start in reversed(self._starts)
        ]


def _live(replica: Replica, now: float, unix: float) -> dict[str, Any]:
    return {
        "replica": replica.id,
        "model": replica.model,
        "device": str(replica.device),
        "state": replica.state.value,
        "began": unix + replica.decided_at - now,
        "seconds": now - replica.decided_at,
        "predicted_s": replica.predicted_s,
        "done": replica.progress_done,
        "total": replica.progress_total,
        "source": None,
        "phases": None,
    }


def _done(start: Start, unix_ahead: float) -> dict[str, Any]:
    outcome = start.outcome
    phases = outcome.phases
    return {
        "replica": outcome.replica,
        "model": outcome.model,
        "device": str(outcome.device),
        "state": "ready",
        "began": unix_ahead + start.ready_at - outcome.actual_s,
        "seconds": outcome.actual_s + (start.prefill_s or 0.0),
        "predicted_s": outcome.predicted_s,
        "done": phases.read_bytes,
        "total": phases.read_bytes + phases.dram_bytes,
        "source": phases.source.value,
        "phases": _phases(phases, outcome.actual_s) | {"prefill_s": start.prefill_s},
    }


def _phases(phases: LoadPhases, actual_s: float) -> dict[str, float | None]:
    """Where the seconds up to readiness went: all that was neither reading nor uploading was waiting."""
    waited = max(0.0, actual_s - phases.remote_s - phases.disk_s - phases.upload_s)
    return {"queue_s": waited, "remote_s": phases.remote_s, "disk_s": phases.disk_s, "upload_s": phases.upload_s}
