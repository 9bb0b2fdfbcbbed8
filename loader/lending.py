"""What replicas borrow in the DRAM tier: tensors of other checkpoints that are equal to their own."""

from __future__ import annotations

from collections.abc import Sequence

from serverless_llm.domain import CheckpointId, ReplicaId
from serverless_llm.loader import plan, sharing
from serverless_llm.loader.plan import Landed
from serverless_llm.loader.residency import Tier
from serverless_llm.loader.sharing import Known, Loan


class Lending:
    """Leases of what is lent, on the thread that owns the tier. A loan holds as long as the tier does not change."""

    def __init__(self, tier: Tier) -> None:
        self._tier = tier
        self._lenders: dict[ReplicaId, list[CheckpointId]] = {}

    def find(self, borrower: Known, lenders: Sequence[Known]) -> Loan | None:
        """What a load of `borrower` would not read."""
        slot_bytes = self._tier.slot_bytes
        homeless = self._tier.homeless(borrower.checkpoint, plan.pieces(borrower.files, (), slot_bytes))
        if not homeless:
            return None
        landed = {known.checkpoint: self._tier.lendable(known.checkpoint) for known in lenders}
        return sharing.loan(borrower, lenders, landed, homeless, slot_bytes)

    def lent_bytes(self, checkpoints: Sequence[Known]) -> dict[CheckpointId, int]:
        """Of each one, what a load of it would not read, at most; those of which that is nothing are left out."""
        slot_bytes = self._tier.slot_bytes
        landed = {known.checkpoint: self._tier.lendable(known.checkpoint) for known in checkpoints}
        homeless = {
            known.checkpoint: self._tier.homeless(known.checkpoint, plan.pieces(known.files, (), slot_bytes))
            for known in checkpoints
        }
        return sharing.lent_bytes(checkpoints, landed, homeless, slot_bytes)

    def borrow(self, loan: Loan, holder: ReplicaId) -> list[Landed]:
        """Leases it to `holder`; where it is in the pool."""
        held = loan.held()
        for checkpoint, pieces in held.items():
            self._tier.lease(checkpoint, holder, pieces)
        self._lenders[holder] = list(held)
        slots = {checkpoint: self._tier.landed(checkpoint) for checkpoint in held}
        return [
            Landed(
                span.lender,
                span.offset,
                span.length,
                slots[span.checkpoint][span.home] * self._tier.slot_bytes + span.offset - span.home.offset,
            )
            for span in loan.spans
        ]

    def repay(self, holder: ReplicaId, now: float) -> None:
        """`holder` refers to nothing that was lent to it any more. Idempotent."""
        for checkpoint in self._lenders.pop(holder, ()):
            self._tier.release(checkpoint, holder, now)
