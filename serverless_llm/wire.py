"""Messages between processes: the msgpack bodies of the frames in `framing.py`.

In the order of a life: head and agent, sequences, agent and worker, gateway and controller.
A message's kind in a frame's header is its place in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from serverless_llm import framing
from serverless_llm.errors import ProtocolError


class Message(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A body."""


# --- head <-> agent ---


class Device(Message, frozen=True):
    index: int
    kind: str
    budget: int
    weights: str


class WorkerState(Message, frozen=True):
    """One worker in a heartbeat: what it holds. `incarnation` 0: no worker is up. The last two as in `Pinned`."""

    device: int
    incarnation: int
    pid: int
    step: int
    numerics_id: str
    replicas: list[int]
    pinned: int = 0
    unpinned: str = ""


class Hello(Message, frozen=True):
    """An agent's first frame.

    `replicas`: what a former head left here, as (replica, device, model, checkpoint, dtype).
    """

    protocol: int
    node: str
    pid: int
    dram: int
    devices: list[Device]
    workers: list[WorkerState]
    replicas: list[tuple[int, int, str, str, str]]
    resident: list[tuple[str, int]]  # DRAM tier: checkpoint, bytes
    bandwidth: dict[str, float]
    limits: dict[str, float] = {}  # link -> its cap in bytes per second
    shared: list[tuple[int, int, int]] = []  # extents of devices: replica, number, bytes


class Welcome(Message, frozen=True):
    """The head's answer: the node's number in addresses, the head's generation.

    `away`: deployed checkpoints of which only a server had bytes then, and their directories.
    """

    node: int
    generation: int
    away: dict[str, str] = {}


class Heartbeat(Message, frozen=True):
    workers: list[WorkerState]
    resident: list[tuple[str, int]]
    bandwidth: dict[str, float]
    dram_used: int
    link_bytes: dict[str, int]  # link -> bytes moved since the agent's start
    digests: list[str] = []  # checkpoints whose digests are known
    verified: dict[str, int] = {}  # as in `check.Tally`
    own: dict[str, int] = {}  # checkpoint -> bytes that no other here has, as far as their tensors' digests are known
    lent: dict[str, int] = {}  # checkpoint -> bytes that a load would not read now, since others here have them
    away: dict[str, int] = {}  # checkpoint -> bytes that no disk here has, of those that loads read from servers


class StartLoad(Message, frozen=True):
    replica: int
    device: int
    model: str
    source: str
    checkpoint: str
    dtype: str
    kv_floor: int
    online: bool = True
    verify: str = "off"


class Unload(Message, frozen=True):
    replica: int


class Hasten(Message, frozen=True):
    """Head -> agent -> worker: the bytes of this replica's load go before those of loads that nobody waits for."""

    replica: int


class Reserve(Message, frozen=True):
    device: int
    replica: int
    bytes: int


class Reserved(Message, frozen=True):
    device: int
    replica: int


class Refused(Message, frozen=True):
    device: int
    replica: int
    missing: int


class LoadProgress(Message, frozen=True):
    replica: int
    done: int
    total: int


class ReplicaReady(Message, frozen=True):
    """Fields as in `domain.LoadPhases`; `shared`: as in `events.ReplicaReady`."""

    replica: int
    queue_s: float
    disk_s: float
    upload_s: float
    total_s: float
    disk_bytes: int
    cache_bytes: int
    dram_bytes: int
    remote_s: float = 0.0
    remote_bytes: int = 0
    shared: list[tuple[int, int, int]] = []


class LoadFailed(Message, frozen=True):
    replica: int
    message: str
    permanent: bool


class Unloaded(Message, frozen=True):
    replica: int


class WorkerUp(Message, frozen=True):
    device: int
    incarnation: int
    pid: int
    numerics_id: str


class WorkerLost(Message, frozen=True):
    """Fields as in `events.WorkerLost`."""

    device: int
    incarnation: int
    cause: str
    charged: bool = True


class KillWorker(Message, frozen=True):
    device: int
    incarnation: int


class Forget(Message, frozen=True):
    """A checkpoint that no model names any more leaves the DRAM tier."""

    checkpoint: str


class Shutdown(Message, frozen=True):
    """The operator stopped the server: free everything and exit."""


# --- sequences ---

Likelihood = tuple[float, list[int], list[float]]  # logprob of a token; the likeliest tokens and their logprobs


class Shaping(Message, frozen=True):
    """Fields as in `domain.Shaping`."""

    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: list[tuple[int, float]]
    min_tokens: int


class Run(Message, frozen=True):
    """Gateway -> worker: start or resume a sequence from its tokens (int32, little endian); see `domain.Sampling`."""

    sequence: int
    epoch: int
    replica: int
    prompt: bytes
    generated: bytes
    temperature: float
    top_k: int
    top_p: float
    seed: int
    max_tokens: int
    stop_ids: list[int]
    min_p: float = 0.0
    shaping: Shaping | None = None
    logprobs: int | None = None
    request_id: str = ""  # for logs
    open_end: bool = False


class Cancel(Message, frozen=True):
    """Stop these sequences, whatever their epoch up to the given one: (sequence, epoch)."""

    sequences: list[tuple[int, int]]


class Tokens(Message, frozen=True):
    """Worker -> gateway, one frame a step: (sequence, epoch, new tokens, finish reason or "").

    `likelihoods`: one for each new token, of the sequences that asked for them.
    """

    entries: list[tuple[int, int, list[int], str]]
    likelihoods: Mapping[int, Sequence[Likelihood]] = {}


class Step(Message, frozen=True):
    """Worker -> controller, only when there is something: terminal and first-token news of a step.

    `first`: (sequence, epoch, prefill seconds); `done`: (sequence, epoch, finish reason, generated tokens);
    `refused`: (sequence, epoch, why, missing bytes, never, begun), sequences that it does not run: see
    `SequenceRefused`.
    """

    device: int
    incarnation: int
    first: list[tuple[int, int, float]]
    done: list[tuple[int, int, str, int]]
    refused: list[tuple[int, int, str, int, bool, bool]]


class Progress(Message, frozen=True):
    """Worker -> controller, at most every 100 ms: all its sequences, as (sequence, epoch, tokens, KV blocks).

    `preemptions`: by model, how often sequences gave their KV to others since the worker's start.
    """

    device: int
    incarnation: int
    sequences: list[tuple[int, int, int, int]]
    kv_used: int
    kv_free: int
    preemptions: dict[str, int]


# --- agent <-> worker ---


class Boot(Message, frozen=True):
    """Agent -> worker, with the pool's descriptor beside it."""

    device: int
    incarnation: int
    kind: str
    budget: int
    weights: str
    pool_bytes: int
    threads: int
    upload_rate: float  # bytes per second, 0: no cap


class Booted(Message, frozen=True):
    pid: int
    numerics_id: str


class Place(Message, frozen=True):
    """Agent -> worker: make room for a replica; its pieces follow. `files`: bytes of each in load order.

    `ring`: the pieces' slots are used again as soon as the worker has copied them, which it tells by `Copied`.
    `room`: an otherwise empty DRAM tier would hold all of them at once. `online`: somebody waits for it.
    `verify`: `off`, `sample` or `full`, for what the worker copies; `sample`: which, as `start` of `digest.sampled`.
    """

    replica: int
    model: str
    checkpoint: str
    config: str  # config.json
    dtype: str
    kv_floor: int
    files: list[int]
    ring: bool = False
    room: bool = True
    online: bool = True
    verify: str = "off"
    sample: int = 0
    lenders: list[int] = []  # bytes of other checkpoints' files, numbered on from these, that have a part of it
    runs: list[tuple[int, int, int, int, int]] = []  # that part, as in `sharing.Run`
    total: int = 0  # bytes that land where there is such a part
    twins: list[tuple[int, int, int, int]] = []  # replicas there with equal tensors, as of `sharing.twins`


class Landed(Message, frozen=True):
    """Agent -> worker: bytes are in the pool: (file, offset in the file, bytes, offset in the pool).

    To a device that views the pool, what follows in both is told as one, over many slots; to others slot by slot.
    """

    replica: int
    pieces: list[tuple[int, int, int, int]]
    last: bool


class Copied(Message, frozen=True):
    """Worker -> agent: so many bytes of what `Landed` told of, in that order, are read from the pool no more."""

    replica: int
    bytes: int


class Punched(Message, frozen=True):
    """Agent -> worker: the slot at this offset of the pool lost its memory; what `Landed` tells of later has new."""

    offset: int


class Pinned(Message, frozen=True):
    """Worker -> agent: so many bytes of the pool are registered with its device; why no more can be, or ""."""

    bytes: int
    refused: str


class Compared(Message, frozen=True):
    """Worker -> agent, before `Placed`: what the device holds of a replica was compared with what was sent there.

    `mended`: blocks that differed until they were copied again; `differing`: (file, offset in the file, bytes) of what
    differs for good: no `Placed` follows.
    """

    replica: int
    bytes: int
    mended: int
    differing: list[tuple[int, int, int]]


class Placed(Message, frozen=True):
    """Worker -> agent: the replica serves. `leased`: its tensors are views into the pool until it is dropped.

    `shared`: as in `ReplicaReady`.
    """

    replica: int
    upload_s: float
    leased: bool
    shared: list[tuple[int, int, int]] = []


class Drop(Message, frozen=True):
    replica: int


class Dropped(Message, frozen=True):
    """Worker -> agent: no tensor of this replica refers to the pool any more."""

    replica: int


class Failed(Message, frozen=True):
    """Worker -> agent: this replica cannot be placed; instead of `Booted`: this worker cannot come up."""

    replica: int
    message: str
    permanent: bool


class Beat(Message, frozen=True):
    """Worker -> agent every second and whenever asked: the number of the last step, and whether work is runnable."""

    step: int
    runnable: bool
    predicted_s: float  # the next step


# --- gateway <-> controller ---


class Arrive(Message, frozen=True):
    """A request is here, its prompt not yet tokenised, for `checkpoint`: so that a load begins at once."""

    sequence: int
    model: str
    checkpoint: str
    work_class: str
    keep_alive: float | None
    request_id: str


class Prompted(Message, frozen=True):
    """`max_tokens`: 1 where it was not asked for."""

    sequence: int
    prompt_tokens: int
    max_tokens: int


class Gone(Message, frozen=True):
    """Client away, hold ended, or the gateway has its terminal answer: stop these."""

    sequences: list[int]
    cause: str


class Attach(Message, frozen=True):
    """Controller -> gateway: send `Run` for this sequence to `destination`. `cold`: phases in ms, empty when warm."""

    sequence: int
    epoch: int
    replica: int
    destination: int
    device: str
    queue_ms: float
    cold: dict[str, float]


class GivenBack(Message, frozen=True):
    """Controller -> gateway: the sequence has no worker and waits."""

    sequence: int


class Rejected(Message, frozen=True):
    """Controller -> gateway: the terminal answer of a sequence that will not run (on). status: HTTP."""

    sequence: int
    status: int
    code: str
    message: str
    retry_after: float | None
    retry: bool


class ModelInfo(Message, frozen=True):
    """One deployed model as the surface shows it. `state`: unloaded, loading, loaded or failed."""

    name: str
    source: str
    checkpoint: str
    dtype: str
    context: int
    created: int
    state: str
    tier: str
    progress: float
    error: str
    devices: list[str]
    bytes: int
    keep_alive: float
    pinned: bool
    until: float | None  # unix time of its expiry
    estimate_s: float | None  # of a start for those who wait; None where nobody does
    waiting: int
    running: int
    min_replicas: int = 0
    verify: str = "off"
    remote_bytes: int = 0  # of `bytes`, those that only a server has
    url: str = ""  # that `source` was brought from; empty where there is none
    max_replicas: int = 1
    max_concurrency: int = 64
    max_queue: int = 1024


class Catalog(Message, frozen=True):
    """Controller -> gateways: all deployed models, after every change. `problems`: why devices are not up."""

    models: list[ModelInfo]
    ready: bool
    problems: list[str] = []


class Ask(Message, frozen=True):
    """Gateway -> controller: an admin verb; `body` is JSON."""

    id: int
    verb: str
    name: str
    body: bytes


class Answer(Message, frozen=True):
    id: int
    status: int
    body: bytes  # JSON
    retry_after: float | None = None  # of an error: seconds; None: a retry is useless


class News(Message, frozen=True):
    """Controller -> gateways: something that operators who watch are told; a JSON object."""

    body: bytes


KINDS: tuple[type[Message], ...] = (
    Hello, Welcome, Heartbeat, StartLoad, Unload, Reserve, Reserved, Refused, LoadProgress, ReplicaReady,
    LoadFailed, Unloaded, WorkerUp, WorkerLost, KillWorker, Forget, Shutdown,
    Run, Cancel, Tokens, Step, Progress,
    Boot, Booted, Place, Landed, Placed, Drop, Dropped, Failed, Beat,
    Arrive, Prompted, Gone, Attach, Rejected, Catalog, Ask, Answer, News,
    Copied, Hasten, Punched, Pinned, Compared,
)  # fmt: skip
KIND: dict[type[Message], int] = {kind: number for number, kind in enumerate(KINDS, start=1)}

_ENCODER = msgspec.msgpack.Encoder()
_DECODERS = {number: msgspec.msgpack.Decoder(kind) for kind, number in KIND.items()}


def encode(message: Message, source: int = 0, destination: int = 0, epoch: int = 0) -> bytes:
    """The frame or frames of one message, ready to be written."""
    return framing.pack(KIND[type(message)], _ENCODER.encode(message), source, destination, epoch)


def decode(kind: int, body: bytes | memoryview) -> Message:
    """The message of one whole body.

    Raises:
        ProtocolError: unknown kind, or a body that is not that kind's.
    """
    decoder = _DECODERS.get(kind)
    if decoder is None:
        raise ProtocolError(f"unknown kind of frame {kind}")
    try:
        return decoder.decode(body)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"bad {KINDS[kind - 1].__name__} frame: {error}") from error
