"""Which sequences run in the next batch, and which give up their KV for it. Pure, no torch, no clock.

The older of two sequences (by arrival at this engine) always wins: where KV is short, the youngest is preempted, its
blocks freed, and it runs again from its tokens later. The oldest sequence of the device therefore always gets on,
unless it does not fit beside the weights; then it is given back. So nothing waits for ever.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from serverless_llm.domain import ReplicaId, SequenceId
from serverless_llm.engine.blocks import Memory
from serverless_llm.engine.kv_groups import FREED
from serverless_llm.engine.sequence import Sequence
from serverless_llm.errors import InvariantError


class Chunk(NamedTuple):
    """The next `tokens` tokens of a sequence, from its `cached` on; its blocks hold them."""

    sequence: Sequence
    tokens: int


class Batch(NamedTuple):
    replica: ReplicaId
    chunks: list[Chunk]


class Scheduler:
    """All sequences of one device; `memory` is theirs to allocate from.

    Attributes:
        stranded: sequences that no longer fit beside the weights that are here, for the owner to give back.
        preempted: how often sequences gave way to others, by replica; the owner takes from it.
    """

    def __init__(self, memory: Memory) -> None:
        self.stranded: list[Sequence] = []
        self.preempted: Counter[ReplicaId] = Counter()
        self._memory = memory
        self._of: dict[ReplicaId, list[Sequence]] = {}  # each in arrival order
        self._by_id: dict[SequenceId, Sequence] = {}
        self._turns: list[ReplicaId] = []  # whose turn is next comes first

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._by_id.values())

    def __len__(self) -> int:
        return len(self._by_id)

    def get(self, sequence: SequenceId) -> Sequence | None:
        return self._by_id.get(sequence)

    def of(self, replica: ReplicaId) -> list[Sequence]:
        return list(self._of.get(replica, ()))

    def add(self, sequence: Sequence) -> None:
        if sequence.replica not in self._of:
            self._of[sequence.replica] = []
            self._turns.append(sequence.replica)
        insort(self._of[sequence.replica], sequence, key=lambda other: other.order)
        self._by_id[sequence.sequence] = sequence

    def remove(self, sequence: Sequence) -> None:
        """Forgets a sequence and frees its blocks."""
        self.preempt(sequence)
        del self._by_id[sequence.sequence]
        mates = self._of[sequence.replica]
        mates.remove(sequence)
        if not mates:
            del self._of[sequence.replica]
            self._turns.remove(sequence.replica)

    def preempt(self, sequence: Sequence) -> None:
        """Frees a sequence's blocks; it will run again from its tokens."""
        if sequence.blocks:
            self._memory.free(sequence.replica, [block for block in sequence.blocks if block != FREED])
        sequence.blocks = []
        sequence.cached = sequence.trimmed = 0

    def trim(self, sequence: Sequence) -> None:
        """Gives back the blocks that the sequence's window has passed."""
        groups, passed = sequence.groups, sequence.groups.passed(sequence.cached)
        for column in range(sequence.trimmed, passed):
            mine = slice(column * groups.total + groups.whole, (column + 1) * groups.total)
            self._memory.free(sequence.replica, sequence.blocks[mine])
            sequence.blocks[mine] = [FREED] * groups.sliding
        sequence.trimmed = max(sequence.trimmed, passed)

    def preempt_youngest(self, floors: bool = True) -> bool:
        """Preempts the youngest sequence, with `floors` only of a model above its floor; False where there is none."""
        return self._preempt_youngest_of(o for o in self if not floors or self._memory.above_floor(o.replica))

    def _preempt_youngest_of(self, sequences: Iterable[Sequence]) -> bool:
        victim = max((o for o in sequences if o.blocks), key=lambda other: other.order, default=None)
        if victim is None:
            return False
        self.preempt(victim)
        self.preempted[victim.replica] += 1
        return True

    def next_batch(self, rows: Callable[[ReplicaId], int]) -> Batch | None:
        """The batch of the model whose turn it is; None where nothing can run.

        `rows(replica)`: tokens to aim at in a batch. Every decoding sequence runs; prefill fills the rest, at least
        one row, so that neither starves the other.
        """
        for replica in list(self._turns):
            self._turns.remove(replica)
            self._turns.append(replica)
            chunks = self._compose(replica, rows(replica))
            if chunks:
                return Batch(replica, chunks)
        return None

    def _compose(self, replica: ReplicaId, rows: int) -> list[Chunk]:
        """Goes from oldest to youngest, so that whoever is preempted is not yet part of the batch."""
        mates = self.of(replica)
        left = max(1, rows - sum(sequence.decoding for sequence in mates))
        chunks: list[Chunk] = []
        blocked = False  # an older sequence waits for memory: no younger one is admitted before it
        for sequence in mates:
            waiting = not sequence.blocks
            if waiting and (blocked or left <= 0):
                continue
            wanted = 1 if sequence.decoding else min(sequence.missing, left)
            tokens = self._grow(sequence, wanted) if not waiting or self._admissible(sequence) else 0
            blocked = blocked or (waiting and not tokens)
            if tokens:
                chunks.append(Chunk(sequence, tokens))
                left -= 0 if sequence.decoding else tokens
        return chunks

    def _admissible(self, sequence: Sequence) -> bool:
        """Whether a prefill begun now is likely to end; a sequence with none but younger ones before it may always."""
        mates = sum(bool(other.blocks) for other in self._of[sequence.replica])
        needed = sequence.groups.live(len(sequence.tokens) + 1) + mates * sequence.groups.total
        if self._memory.available(sequence.replica) >= needed:
            return True
        return all(other.order > sequence.order for other in self if other.blocks)

    def _grow(self, sequence: Sequence, tokens: int) -> int:
        """Allocates blocks for up to `tokens` more tokens, preempting younger sequences; returns how many fit."""
        groups = sequence.groups
        needed = groups.columns(sequence.cached + tokens) * groups.total
        while len(sequence.blocks) < needed:
            block = self._memory.allocate(sequence.replica)
            if block is not None:
                sequence.blocks.append(block)
            elif not self._make_room(sequence):
                break
        fit = min(tokens, sequence.room - sequence.cached)
        if not fit and self._memory.capacity(sequence.replica) < groups.live(sequence.cached + tokens):
            self.stranded.append(sequence)
        return fit

    def _make_room(self, sequence: Sequence) -> bool:
        return self._preempt_youngest_of(
            other
            for other in self
            if other.order > sequence.order
            and (other.replica == sequence.replica or self._memory.above_floor(other.replica))
        )

    def check_invariants(self) -> None:
        """Raises InvariantError where tokens, blocks and cached counts disagree."""
        self._memory.check_invariants()
        seen: set[int] = set()
        for sequence in self:
            name = f"sequence {sequence.sequence}"
            if sequence.cached > sequence.room or sequence.missing < 1:
                raise InvariantError(f"{name}: {sequence.cached} tokens cached of {len(sequence.tokens)}")
            if sequence.blocks.count(FREED) != sequence.trimmed * sequence.groups.sliding:
                raise InvariantError(f"{name}: {sequence.trimmed} columns trimmed in {sequence.blocks}")
            held = [block for block in sequence.blocks if block != FREED]
            if seen.intersection(held):
                raise InvariantError(f"{name} shares a block")
            seen.update(held)
