"""One device's engine: many models, one KV arena, one thread. Work in progress: signatures first."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from serverless_llm.domain import ReplicaId, SequenceId
from serverless_llm.engine.config import Entries, ModelConfig
from serverless_llm.engine.sequence import SequenceStart, SequenceState, StepResult
from serverless_llm.loader.dest import Dest


class Engine:
    """Owns a device's memory and runs every sequence on it; all calls come from one thread.

    Attributes:
        numerics_id: engines of equal ids give equal tokens in deterministic mode.
        arena: uint8 [budget], where `Dest` offsets point; fixed for the engine's life.
        steps: batches run so far.
    """

    numerics_id: str
    arena: torch.Tensor
    steps: int

    def __init__(self, device: str = "cpu", budget: int = 1 << 30, weights: str = "view", threads: int = 1) -> None:
        raise NotImplementedError

    def place(self, replica: ReplicaId, model: ModelConfig, entries: Entries, kv_floor: int) -> list[Dest] | None:
        """Makes room for a replica's weights and promises it `kv_floor` bytes of KV.

        Returns where an uploader writes the tensors, or None: `activate` then wants the tensors themselves (view
        mode, and whenever a stored dtype is not the served one, since `activate` converts).

        Raises:
            CheckpointError: the checkpoint is not what its config says.
            CapacityError: it does not fit beside the other replicas.
        """
        raise NotImplementedError

    def activate(self, replica: ReplicaId, tensors: Mapping[str, torch.Tensor] | None = None) -> bool:
        """The replica serves from now on. True: it refers to `tensors` until `drop` (they are views of the pool)."""
        raise NotImplementedError

    def drop(self, replica: ReplicaId) -> list[SequenceState]:
        """Frees a replica, placed or active; returns its sequences, which end without a word."""
        raise NotImplementedError

    def reserve(self, nbytes: int) -> int:
        """Preempts sequences above the floors until `nbytes` are free; returns the bytes still missing, 0 if none."""
        raise NotImplementedError

    def add(self, start: SequenceStart) -> None:
        """Queues a sequence; one that is here with an older epoch is replaced.

        Raises:
            KeyError: the replica is not active here.
            CapacityError: its KV can never fit, or it is longer than the model's context.
        """
        raise NotImplementedError

    def cancel(self, sequence: SequenceId, epoch: int) -> None:
        """Ends a sequence without a word if it is here with this epoch or an older one."""
        raise NotImplementedError

    def step(self) -> StepResult:
        """Runs one batch of one model; models with work take turns."""
        raise NotImplementedError

    @property
    def runnable(self) -> bool:
        raise NotImplementedError

    @property
    def kv_used(self) -> int:
        """Bytes in KV blocks that belong to sequences."""
        raise NotImplementedError

    @property
    def kv_free(self) -> int:
        """Bytes that KV may still take."""
        raise NotImplementedError

    def sequences(self) -> list[SequenceState]:
        raise NotImplementedError

    def warm(self) -> None:
        """Runs one tiny product, so that the maths library initialises before the first request."""
        raise NotImplementedError
