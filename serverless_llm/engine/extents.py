"""Where a replica's buffers lie in the arena, and which of them another replica has there already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from serverless_llm.domain import ReplicaId
from serverless_llm.engine.config import ModelConfig

if TYPE_CHECKING:
    import torch

Tensors = tuple[str, ...]  # of one buffer, in order
Twins = Mapping[ReplicaId, Mapping[str, str]]  # replica -> tensors of another one -> its own ones that are equal


class Extent(NamedTuple):
    """A buffer in the arena, by its number in `Memory`; `lender`: whose it was, None where the replica brought it."""

    number: int
    offset: int
    size: int
    lender: ReplicaId | None = None


class Placement(NamedTuple):
    """A replica whose weights have their place.

    Attributes:
        tensors: on the device; the others are views elsewhere.
        extents: where those of each buffer lie.
    """

    config: ModelConfig
    tensors: dict[str, torch.Tensor]
    extents: dict[Tensors, Extent]

    def brought(self) -> dict[str, torch.Tensor]:
        """The tensors on the device that no other replica had there."""
        lent = {name for tensors, extent in self.extents.items() if extent.lender is not None for name in tensors}
        return {name: tensor for name, tensor in self.tensors.items() if name not in lent}

    def shared(self) -> list[tuple[int, int, ReplicaId]]:
        """The extents that it did not bring, as (number, bytes, whose it was)."""
        return [(one.number, one.size, one.lender) for one in self.extents.values() if one.lender is not None]


def lent(
    dtype: str, buffers: Iterable[Tensors], twins: Twins, placements: Mapping[ReplicaId, Placement]
) -> dict[Tensors, Extent]:
    """Of these buffers in this dtype, those that others have, no extent twice.

    Args:
        placements: of replicas whose bytes are all there.
    """
    left = [*buffers]
    found: dict[Tensors, Extent] = {}
    taken: set[int] = set()
    for lender, names in twins.items():
        other = placements.get(lender)
        for tensors in left if other and other.config.dtype == dtype else ():
            extent = other.extents.get(tuple(names.get(name, "") for name in tensors)) if other else None
            if extent and extent.number not in taken:
                found[tensors] = extent._replace(lender=lender)
                taken.add(extent.number)
        left = [tensors for tensors in left if tensors not in found]
    return found
