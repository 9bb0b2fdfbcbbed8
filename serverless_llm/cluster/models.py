"""What operators do to models: deploy, delete, load, unload, pin."""

from __future__ import annotations

from dataclasses import replace

from serverless_llm.cluster.events import Delete, Deploy, Load, Pin, UnloadModel
from serverless_llm.cluster.failures import end_pause, forgive
from serverless_llm.cluster.replicas import send_off
from serverless_llm.cluster.sequences import reject_not_found, reject_outdated
from serverless_llm.cluster.starts import impossible
from serverless_llm.cluster.state import STARTING, Model
from serverless_llm.cluster.turn import Turn
from serverless_llm.cluster.victims import drain
from serverless_llm.domain import ModelName


def deploy(turn: Turn, event: Deploy) -> None:
    """A new name, or a new spec. Other weights or another context make a new revision.

    Who runs ends on the old one, who waits is told: its prompt was tokenised for what is no longer served.
    """
    name = event.spec.name
    model = turn.state.models.get(name)
    if model is None:
        model = turn.state.models[name] = Model(event.spec, event.footprint, _revision(turn))
    elif (model.footprint, model.spec.dtype) != (event.footprint, event.spec.dtype):
        for sequence in [*model.waiting, *model.unready.values()]:
            reject_outdated(turn, sequence)
        _retire(turn, model, "rollover")
        model.revision = _revision(turn)
    if model.spec.keep_alive != event.spec.keep_alive:  # else what the last request wished stays
        for replica in model.present():
            replica.keep_alive = event.spec.keep_alive
    model.spec, model.footprint = event.spec, event.footprint
    forgive(turn, model)
    model.error = impossible(turn, model)
    for replica in model.present()[event.spec.max_replicas :]:
        send_off(turn, replica, "unload")
    turn.touch(name)
    turn.room = True


def delete(turn: Turn, event: Delete) -> None:
    """Running sequences end, waiting ones are told."""
    model = turn.state.models.get(event.model)
    if model is None:
        return
    drain(turn, event.model, ())
    del turn.state.models[event.model]
    for sequence in [*model.waiting, *model.unready.values()]:
        reject_not_found(turn, sequence)
    _retire(turn, model, "delete")
    turn.state.hungry.pop(event.model, None)
    for kind in ("cool", "hungry"):
        turn.disarm(kind, event.model)
    turn.room = True


def load(turn: Turn, event: Load) -> None:
    """A new try, whatever became of the last one."""
    model = turn.state.models.get(event.model)
    if model is not None and not model.present():
        end_pause(turn, model)
        model.requested_at = turn.now
        turn.touch(event.model)


def unload_model(turn: Turn, event: UnloadModel) -> None:
    """Also ends loads that nobody waits for."""
    model = turn.state.models.get(event.model)
    if model is None:
        return
    model.requested_at = None
    for replica in model.present():
        if not (model.demand and replica.state in STARTING):
            send_off(turn, replica, "unload")


def pin(turn: Turn, event: Pin) -> None:
    model = turn.state.models.get(event.model)
    if model is not None:
        model.spec = replace(model.spec, pinned=event.pinned)
        turn.touch(event.model)
        turn.room = True


def cooled(turn: Turn, name: ModelName) -> None:
    turn.touch(name)


def _revision(turn: Turn) -> int:
    turn.state.next_revision += 1
    return turn.state.next_revision


def _retire(turn: Turn, model: Model, reason: str) -> None:
    for replica in model.present():
        send_off(turn, replica, reason)
