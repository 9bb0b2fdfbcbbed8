"""What a replica takes from a device, and what can ever fit there."""

from __future__ import annotations

from serverless_llm.domain import DeviceSpec, Footprint


def kv_floor(footprint: Footprint, budget: int, tokens: int, share: float) -> int:
    """Bytes of KV that a replica keeps whatever its neighbours do: whole blocks, at least one.

    Enough for one sequence of `tokens` tokens (or of the whole context, if that is less), but no more than `share` of
    the device's budget, so that floors never crowd out the weights of other models.
    """
    block = footprint.kv_block_bytes
    most = int(budget * share) // block * block
    return max(block, min(footprint.kv_bytes(min(footprint.context, tokens)), most))


def least_budget(footprint: Footprint, tokens: int, share: float) -> int:
    """Bytes of the smallest device that could hold a replica with its floor, which grows with the device."""
    budget = footprint.weight_bytes
    while (needed := footprint.weight_bytes + kv_floor(footprint, budget, tokens, share)) > budget:
        budget = needed
    return budget


def holds_weights(footprint: Footprint, device: DeviceSpec, dram: int, floor: int) -> bool:
    """Whether an empty device could hold a replica; in view mode its node's DRAM must hold the files too."""
    fits = footprint.weight_bytes + floor <= device.budget
    return fits and (device.weights != "view" or footprint.file_bytes <= dram)


def holds_sequence(footprint: Footprint, budget: int, tokens: int) -> bool:
    """Whether a device that holds nothing but this model could hold the KV of `tokens` tokens."""
    return footprint.kv_bytes(tokens) <= budget - footprint.weight_bytes
