"""What the control plane tells those who watch (`GET /admin/events`): events and decisions as JSON objects. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from serverless_llm.cluster import commands, events
from serverless_llm.cluster.state import State

JSON = dict[str, Any]


def of_event(event: events.Event, state: State) -> JSON | None:
    """What has happened; None where it is no news. `state`: before the event."""
    tell = _EVENTS.get(type(event))
    return tell(event, state) if tell else None


def of_command(command: commands.Command) -> JSON | None:
    """What is about to happen; None where it is no news."""
    tell = _COMMANDS.get(type(command))
    return tell(command) if tell else None


def failed(model: str, error: str) -> JSON:
    """A model is left alone for a while, or for ever."""
    return {"event": "model_failed", "model": model, "error": error}


def _deployed(event: events.Deploy, state: State) -> JSON:
    spec, replaces = event.spec, event.spec.name in state.models
    return {"event": "deployed", "model": spec.name, "source": spec.source, "url": spec.url, "replaces": replaces}


def _deleted(event: events.Delete, _: State) -> JSON:
    return {"event": "deleted", "model": event.model}


def _pinned(event: events.Pin, _: State) -> JSON:
    return {"event": "pinned", "model": event.model, "pinned": event.pinned}


def _drained(event: events.Drain, _: State) -> JSON:
    return {"event": "drained", "node": event.node, "drained": event.drained}


def _load_failed(event: events.LoadFailed, state: State) -> JSON | None:
    replica = state.replicas.get(event.replica)
    if replica is None:
        return None
    return {
        "event": "load_failed",
        "model": replica.model,
        "replica": replica.id,
        "device": str(replica.device),
        "error": event.message,
        "permanent": event.permanent,
    }


def _joined(event: events.NodeJoined, _: State) -> JSON:
    return {"event": "agent_joined", "node": event.node.node, "devices": len(event.node.devices)}


def _node_lost(event: events.NodeLost, _: State) -> JSON:
    return {"event": "agent_lost", "node": event.node}


def _worker_up(event: events.WorkerUp, _: State) -> JSON:
    return {"event": "worker_up", "device": str(event.device), "incarnation": event.incarnation}


def _worker_lost(event: events.WorkerLost, _: State) -> JSON:
    return {
        "event": "worker_lost",
        "device": str(event.device),
        "incarnation": event.incarnation,
        "cause": event.cause,
    }


_EVENTS: dict[type, Callable[[Any, State], JSON | None]] = {
    events.Deploy: _deployed,
    events.Delete: _deleted,
    events.Pin: _pinned,
    events.Drain: _drained,
    events.LoadFailed: _load_failed,
    events.NodeJoined: _joined,
    events.NodeLost: _node_lost,
    events.WorkerUp: _worker_up,
    events.WorkerLost: _worker_lost,
}


def _replica(event: str, one: commands.Decided | commands.StartLoad | commands.Outcome | commands.Evicted) -> JSON:
    return {"event": event, "model": one.model, "replica": one.replica, "device": str(one.device)}


def _decided(one: commands.Decided) -> JSON:
    return _replica("load_decided", one) | {"predicted_s": round(one.predicted_s, 4), "victims": list(one.victims)}


def _ready(one: commands.Outcome) -> JSON:
    phases = one.phases
    return _replica("load_ready", one) | {
        "predicted_s": round(one.predicted_s, 4),
        "actual_s": round(one.actual_s, 4),
        "queue_s": round(phases.queue_s, 4),
        "remote_s": round(phases.remote_s, 4),
        "disk_s": round(phases.disk_s, 4),
        "upload_s": round(phases.upload_s, 4),
        "source": phases.source.value,
    }


_COMMANDS: dict[type, Callable[[Any], JSON]] = {
    commands.Decided: _decided,
    commands.StartLoad: lambda one: _replica("load_started", one),
    commands.Outcome: _ready,
    commands.Evicted: lambda one: _replica("evicted", one) | {"reason": one.reason},
    commands.GivenBack: lambda one: {
        "event": "given_back",
        "model": one.model,
        "device": str(one.device),
        "why": one.why,
    },
}
