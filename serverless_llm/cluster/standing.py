"""Which replicas may not be taken, and which nobody wants."""

from __future__ import annotations

from serverless_llm.cluster.state import STARTING, Model, Replica


def protected(model: Model, replica: Replica) -> bool:
    """Pinned, or one of the oldest that make up the model's `min_replicas`."""
    floor = model.present()[: model.spec.min_replicas]
    return model.spec.pinned or any(replica is kept for kept in floor)


def abandoned(model: Model, replica: Replica) -> bool:
    """On its way, and whoever wanted it is gone."""
    spare = model.spare() and any(other.running for other in model.present())
    wanted = model.demand or replica.solicited or protected(model, replica) or spare
    return replica.state in STARTING and not wanted
