"""A running generation: its tokens, its blocks, and how many of its tokens have their KV in them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from serverless_llm.domain import BLOCK_TOKENS, FinishReason, ReplicaId, Sampling, SequenceId
from serverless_llm.engine.kv_groups import KvGroups

TokenArray = npt.NDArray[np.int32]


class SequenceStart(NamedTuple):
    """What starts or resumes a sequence. `generated`: tokens that an earlier epoch has already delivered."""

    sequence: SequenceId
    epoch: int
    replica: ReplicaId
    prompt: TokenArray
    generated: TokenArray
    sampling: Sampling


class Emission(NamedTuple):
    """What one step says of one sequence; a stop id is delivered as its last token."""

    sequence: SequenceId
    epoch: int
    tokens: list[int]
    finish: FinishReason | None


class FirstToken(NamedTuple):
    """A sequence's first token of this epoch; `prefill_s` counts from its admission."""

    sequence: SequenceId
    epoch: int
    prefill_s: float


class SequenceState(NamedTuple):
    sequence: SequenceId
    epoch: int
    generated: int  # tokens, those of earlier epochs included
    kv_blocks: int


class Likelihood(NamedTuple):
    """Log probabilities of a drawn token and of the likeliest ones, likeliest first; of equal ones the lower id."""

    logprob: float
    tokens: list[int]
    logprobs: list[float]


class Refusal(NamedTuple):
    """A sequence that is not run, or no longer (`begun`); `missing` and `never`: as of `KvCapacityError`."""

    sequence: SequenceId
    epoch: int
    why: str
    missing: int = 0
    never: bool = False
    begun: bool = False


class StepResult(NamedTuple):
    """`likelihoods`: of the new tokens of sequences that asked for them."""

    tokens: list[Emission]
    first: list[FirstToken]
    likelihoods: dict[SequenceId, list[Likelihood]]
    refused: list[Refusal]


@dataclass(slots=True, eq=False)
class Sequence:
    """One generation in this engine.

    Attributes:
        order: place in the engine's arrival order; the youngest is preempted first.
        tokens: prompt, then generated tokens.
        context: most tokens it may ever hold.
        groups: how its model's layers share blocks.
        blocks: byte offsets of its KV blocks in the arena, column after column; `FREED` for those given back.
        trimmed: columns whose blocks with a window were given back.
        cached: tokens whose KV is in `blocks`, a prefix of `tokens`.
        started: clock when its prefill was first admitted, seconds; None before.
        counts: what penalties count, see `sampler.shaped`; None where nothing is penalised.
    """

    sequence: SequenceId
    epoch: int
    replica: ReplicaId
    order: int
    tokens: list[int]
    prompt_length: int
    context: int
    sampling: Sampling
    groups: KvGroups
    blocks: list[int] = field(default_factory=list)
    cached: int = 0
    trimmed: int = 0
    started: float | None = None
    emitted: bool = False
    counts: dict[int, int] | None = None

    def __post_init__(self) -> None:
        shaping = self.sampling.shaping
        if shaping is not None and shaping.penalises:
            self.counts = dict.fromkeys(self.tokens, 0) if shaping.repetition_penalty != 1 else {}
            for token in self.tokens[self.prompt_length :]:
                self._count(token)

    def append(self, token: int) -> None:
        self.tokens.append(token)
        self._count(token)

    def _count(self, token: int) -> None:
        if self.counts is not None:
            self.counts[token] = self.counts.get(token, 0) + 1

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def room(self) -> int:
        """Tokens whose KV the blocks can hold."""
        return len(self.blocks) // self.groups.total * BLOCK_TOKENS

    @property
    def missing(self) -> int:
        """Tokens to run before the next one can be drawn."""
        return len(self.tokens) - self.cached

    @property
    def decoding(self) -> bool:
        return self.missing == 1 and self.emitted

    def finish(self) -> FinishReason | None:
        """Why it ends with the tokens it has, None where it goes on."""
        if self.generated and self.tokens[-1] in self.sampling.stop_ids:
            return FinishReason.STOP
        if self.generated >= self.sampling.max_tokens or len(self.tokens) >= self.context:
            return FinishReason.LENGTH
        return None
