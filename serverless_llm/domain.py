"""Ids, specs and frozen values that every part shares. Sizes are bytes, times are seconds, unless a name says so."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

NodeId = str
ModelName = str
CheckpointId = str  # digest over path, sizes, mtimes and headers of a checkpoint's files
SequenceId = int  # unique per head generation, chosen by the gateway
ReplicaId = int  # unique per state directory, chosen by the machine

BLOCK_TOKENS = 16  # tokens in one KV block; architecture.md, "KV: one layout"
MAX_SOURCE = 4095  # characters of a path, as of Linux
MAX_COUNT = 1 << 31  # of any count that a deploy may ask for; an arbitrary bound that every store and frame can hold


class DeviceId(NamedTuple):
    """One GPU or logical CPU device: its node and its number there."""

    node: NodeId
    number: int

    def __str__(self) -> str:
        return f"{self.node}/{self.number}"


class WorkClass(StrEnum):
    ONLINE = "online"
    OFFLINE = "offline"


class Tier(StrEnum):
    REMOTE = "remote"
    DISK = "disk"
    DRAM = "dram"
    DEVICE = "device"


class FinishReason(StrEnum):
    STOP = "stop"  # a stop id was generated
    LENGTH = "length"  # max_tokens or the context was reached
    NOT_FINITE = "not_finite"  # its model gave NaN or infinite logits


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What an operator deploys under a name.

    Attributes:
        source: absolute path of a Hugging Face directory.
        dtype: `auto` (the checkpoint's), `float32` (deterministic mode) or `bfloat16`.
        keep_alive: seconds a replica stays on its device after its last use; `math.inf` for ever, 0 not at all.
        max_concurrency: sequences in one replica at a time.
        max_queue: sequences beyond those that have a place in a replica, up or to come; a further one is rejected.
        context: most tokens (prompt + generated) of a sequence; None: the checkpoint's own limit.
        pinned: replicas of this model are never evicted.
        verify: `off`, or whether a start compares a `sample` of the checkpoint's blocks, or `full` all of them, with
            what they were at the first load.
        url: that the source was brought from; empty where there is none.
    """

    name: ModelName
    source: str
    dtype: str = "auto"
    keep_alive: float = 300.0
    min_replicas: int = 0
    max_replicas: int = 1
    max_concurrency: int = 64
    max_queue: int = 1024
    context: int | None = None
    pinned: bool = False
    verify: str = "off"
    url: str = ""


@dataclass(frozen=True, slots=True)
class Footprint:
    """What placement must know of a checkpoint served in one dtype.

    Attributes:
        file_bytes: bytes of its safetensors files, headers included: what a load reads and DRAM holds.
        weight_bytes: bytes its weights take on a device in the served dtype.
        kv_block_bytes: bytes of one KV block (`BLOCK_TOKENS` tokens, all layers).
        kv_window_bytes: of these, bytes of layers that see a window, given back once it has passed.
        kv_window_blocks: blocks that such layers hold at most.
        context: most tokens of a sequence.
        remote_bytes: of `file_bytes`, those that only a server had when the checkpoint was deployed; with fewer it is
            the same.
    """

    checkpoint: CheckpointId
    file_bytes: int
    weight_bytes: int
    kv_block_bytes: int
    context: int
    kv_window_bytes: int = 0
    kv_window_blocks: int = 0
    remote_bytes: int = field(default=0, compare=False)

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of KV that a sequence of `tokens` tokens holds."""
        blocks = -(-tokens // BLOCK_TOKENS)
        return blocks * self.kv_block_bytes - max(0, blocks - self.kv_window_blocks) * self.kv_window_bytes


@dataclass(frozen=True, slots=True)
class Shaping:
    """What is done to a row of logits before a token is drawn from it.

    Attributes:
        presence_penalty: off the logit of every generated token.
        frequency_penalty: off the logit of a generated token, for each time it was generated.
        repetition_penalty: divides (negative ones: multiplies) the logits of tokens of the prompt or generated.
        logit_bias: (token, addend), each token once.
        min_tokens: so many tokens are generated before one of the stop ids can be.
    """

    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0

    @property
    def penalises(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn; greedy when `temperature` is 0. Randomness is a function of (seed, position).

    Attributes:
        top_k: likeliest tokens that are drawn from; 0: all.
        open_end: nobody asked for `max_tokens`: it may end sooner, where the device has no memory for more.
        min_p: tokens less likely than so many times the likeliest are not drawn.
        shaping: None where logits are drawn from as the model gives them.
        logprobs: None, or how many of the likeliest tokens are told with the logprob of each drawn one.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int = 16
    stop_ids: tuple[int, ...] = ()
    min_p: float = 0.0
    shaping: Shaping | None = None
    logprobs: int | None = None
    open_end: bool = False


@dataclass(frozen=True, slots=True)
class LoadPhases:
    """Where the seconds of one load went, and the bytes by the tier they came from."""

    queue_s: float = 0.0  # from StartLoad's arrival at the agent to its first read
    disk_s: float = 0.0  # disk -> DRAM
    upload_s: float = 0.0  # DRAM -> device (mapping, in view mode), after the last byte had landed
    total_s: float = 0.0
    disk_bytes: int = 0  # read from storage
    cache_bytes: int = 0  # read from the page cache
    dram_bytes: int = 0  # found in the DRAM tier
    remote_s: float = 0.0  # network -> DRAM, and, at the same time, what a disk had of it; then `disk_s` is 0
    remote_bytes: int = 0  # sent by a server

    @property
    def read_bytes(self) -> int:
        """All that were not in DRAM."""
        return self.remote_bytes + self.disk_bytes + self.cache_bytes

    @property
    def source(self) -> Tier:
        if self.remote_bytes:
            return Tier.REMOTE
        return Tier.DISK if self.disk_bytes + self.cache_bytes else Tier.DRAM


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """One device of a node as its agent states it.

    Attributes:
        kind: `cpu` or `cuda`.
        budget: bytes for weights and KV together, workspace already taken off.
        weights: `view` (weights are counted pins on DRAM) or `copy` (a private arena, as on CUDA).
    """

    number: int
    kind: str
    budget: int
    weights: str


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """One node as its agent states it. `dram` is the pool's capacity in bytes; bandwidths in bytes per second."""

    node: NodeId
    dram: int
    devices: tuple[DeviceSpec, ...]
    bandwidth: dict[str, float] = field(default_factory=dict)  # link ("remote", "disk", "upload") -> learned so far


FOREVER = math.inf
