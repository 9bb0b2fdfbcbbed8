"""What is known of how long a start takes, and of what a replica needs."""

from __future__ import annotations

from typing import NamedTuple

from serverless_llm.cluster.state import STARTING, Device, Model, Node, Replica
from serverless_llm.cluster.turn import Turn
from serverless_llm.domain import CheckpointId, Footprint
from serverless_llm.placement import fit
from serverless_llm.placement.estimate import Links, Start, startup_s


def floor(turn: Turn, model: Model, device: Device) -> int:
    policy = turn.policy
    return fit.kv_floor(model.footprint, device.spec.budget, policy.kv_floor_tokens, policy.kv_floor_share)


def predicted_s(turn: Turn, model: Model, device: Device) -> float:
    """Seconds that a start takes on `device`."""
    node, footprint = turn.state.nodes[device.id.node], model.footprint
    remaining = _remaining(node, footprint.checkpoint, model.demand > 0)
    known = node.held(footprint.checkpoint, model.spec.verify)
    own = remaining.pop(footprint.checkpoint, _missing(node, footprint, known))
    disk, remote = (sum(column) for column in zip((0, 0), *remaining.values(), strict=True))
    begin = Start(disk, own.disk, 0 if device.view else footprint.weight_bytes, remote, own.remote)
    return startup_s(begin, _links(turn, node))


def bring_back_s(turn: Turn, replica: Replica) -> float:
    """Seconds to load it again where it is. Its bytes stay in DRAM when it leaves: view mode has them there."""
    device = turn.device(replica.device)
    node = turn.state.nodes[device.id.node]
    held = replica.footprint.file_bytes if device.view else node.held(replica.checkpoint, replica.verify)
    missing = _missing(node, replica.footprint, held)
    upload = 0 if device.view else replica.footprint.weight_bytes
    return startup_s(Start(0, missing.disk, upload, 0, missing.remote), _links(turn, node))


def _links(turn: Turn, node: Node) -> Links:
    known, policy = node.bandwidth, turn.policy
    return Links(
        known.get("remote", policy.remote_bps),
        known.get("disk", policy.disk_bps),
        known.get("upload", policy.upload_bps),
        node.overhead_s,
    )


class Missing(NamedTuple):
    """Bytes that a load still reads, by the link that they cross."""

    disk: int
    remote: int


def _missing(node: Node, footprint: Footprint, held: int) -> Missing:
    """`held`: bytes that are not read; what came to DRAM was written to a disk, too, before what did not."""
    left = max(0, footprint.file_bytes - held)
    remote = min(left, node.remote(footprint))
    return Missing(left - remote, remote)


def _remaining(node: Node, own: CheckpointId, online: bool) -> dict[CheckpointId, Missing]:
    """Bytes that starts on this node still read, by checkpoint: replicas of one checkpoint share its reading. An
    `online` start, of `own`, waits for no others that are not."""
    remaining: dict[CheckpointId, Missing] = {}
    residents = (replica for device in node.devices.values() for replica in device.replicas.values())
    for replica in residents:
        if replica.state in STARTING and (replica.online or not online or replica.checkpoint == own):
            held = max(replica.progress_done, node.held(replica.checkpoint, replica.verify))
            left = _missing(node, replica.footprint, held)
            remaining[replica.checkpoint] = min(left, remaining.get(replica.checkpoint, left))
    return remaining
