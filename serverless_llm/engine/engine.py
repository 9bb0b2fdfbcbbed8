"""One device's engine: many models, one arena for weights and KV, one thread.

Deterministic mode (float32 on a CPU): a sequence's tokens do not depend on the other sequences, on how its prompt was
cut into steps, or on how often it was preempted or resumed elsewhere, between engines of equal `numerics_id`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from importlib import import_module
from threading import Thread

import torch

from serverless_llm.domain import FinishReason, ReplicaId, Sampling, SequenceId
from serverless_llm.engine.arena import Arena
from serverless_llm.engine.blocks import Memory, Range
from serverless_llm.engine.config import Entries, ForeignConfig, ModelConfig, aligned
from serverless_llm.engine.extents import Extent, Placement, Twins, lent
from serverless_llm.engine.layers import Tensors
from serverless_llm.engine.layout import dests, layout, stored_buffers
from serverless_llm.engine.model import DTYPES, Model
from serverless_llm.engine.runner import AnyModel, run
from serverless_llm.engine.sampler import draw, greedy, likelihood, shaped
from serverless_llm.engine.scheduler import Batch, Scheduler
from serverless_llm.engine.sequence import (
    Emission,
    FirstToken,
    Refusal,
    Sequence,
    SequenceStart,
    SequenceState,
    StepResult,
)
from serverless_llm.errors import CapacityError, KvCapacityError
from serverless_llm.loader.dest import Dest
from serverless_llm.quantities import size

FALLBACK = "serverless_llm.engine.fallback"  # imported where it is needed: it needs an extra
KERNELS = 3  # bumped when the same input may give other bits than before
TAKEN = "weights took the memory of its KV"
STEP_S = 0.2  # seconds a step of prefill should take at most, so that the tokens of other sequences keep flowing
ROWS_LEAST, ROWS_MOST = 32, 512  # tokens of a step; 32 is what `kernels.linear` takes at once
CUDA_ROWS = 2048
FIRST_PACE = 5e10  # multiply-adds per second that a CPU is thought to do before the first step was timed


class Engine:
    """Owns a device's memory and runs every sequence on it; all calls come from one thread.

    Attributes:
        numerics_id: engines of equal ids give equal tokens in deterministic mode.
        arena: uint8 [budget rounded down to 64 KiB], where `Dest` offsets point; fixed for the engine's life.
        steps: batches run so far.
    """

    def __init__(
        self,
        device: str = "cpu",
        budget: int = 1 << 30,
        weights: str = "view",
        threads: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        torch.set_num_threads(threads)
        self.device = torch.device(device)
        self.steps = 0
        self.numerics_id = _numerics_id(self.device, threads)
        self._weights = "copy" if self.device.type == "cuda" else weights
        self._clock = clock
        self._arena = Arena(self.device, budget)
        self.arena = self._arena.bytes
        self._memory = Memory(self.arena.numel())
        self._scheduler = Scheduler(self._memory)
        self._placed: dict[ReplicaId, Placement] = {}
        self._models: dict[ReplicaId, AnyModel] = {}
        self._pace: dict[ReplicaId, float] = {}  # seconds per row of a step
        self._ended: list[Emission] = []  # told by the next step
        self._arrivals = 0

    # --- replicas ---

    def place(
        self, replica: ReplicaId, model: ModelConfig, entries: Entries, kv_floor: int, twins: Twins | None = None
    ) -> list[Dest] | None:
        """Makes room for a replica's weights and promises it `kv_floor` bytes of KV.

        A buffer all of whose tensors have `twins` that are one buffer of an active replica is not brought again: both
        refer to it.

        Returns where an uploader copies the tensors, or None: those of `targets` are written there then, and `activate`
        wants all others (view mode, and whenever a stored dtype is not the served one).

        Raises:
            CheckpointError: the checkpoint is not what its config says.
            CapacityError: it does not fit beside the other replicas.
        """
        model = model.bound(entries)
        if isinstance(model, ForeignConfig):
            Thread(target=import_module, args=(FALLBACK,), daemon=True).start()  # seconds, while the bytes come
        total = model.weight_bytes()
        stored = list(stored_buffers(model, entries, self._weights))
        shapes = model.tensors()
        sizes = {buffer.tensors: aligned(model.buffer_bytes(buffer, shapes)) for buffer in stored}
        active = {other: self._placed[other] for other in self._models}
        extents = lent(model.dtype, sizes, twins or {}, active)
        own = {tensors: size for tensors, size in sizes.items() if tensors not in extents}
        shared = [extent.number for extent in extents.values()]
        pinned = total - sum(sizes.values())
        places = self._find(replica, model, [*own.values()], pinned, kv_floor, shared)
        for tensors, number, place in zip(own, self._memory.extents(replica), places, strict=False):
            extents[tensors] = Extent(number, place, own[tensors])
            self._arena.fill(Range(place, own[tensors]))
        offsets = layout(model, shapes, stored, [extents[tensors].offset for tensors in sizes])
        bound = {
            name: self._arena.tensor(offset, DTYPES[model.dtype], shapes[name]) for name, offset in offsets.items()
        }
        if self._weights == "copy":
            wide = shapes.keys() - offsets.keys()
            bound |= {name: torch.empty(shapes[name], dtype=torch.float32, device=self.device) for name in wide}
        placed = self._placed[replica] = Placement(model, bound, extents)
        whole = len(offsets) == len(shapes)
        if whole and not any(model.needs_conversion(name, entries) for name in shapes):
            return dests(model, shapes, {name: offsets[name] for name in placed.brought()})
        return None

    def shared(self, replica: ReplicaId) -> list[tuple[int, int, ReplicaId]]:
        """The extents that it did not bring, as (number, bytes, whose it was)."""
        return self._placed[replica].shared()

    def _find(
        self, replica: ReplicaId, model: ModelConfig, sizes: list[int], pinned: int, floor: int, shared: list[int]
    ) -> list[int]:
        needed = sum(sizes) + pinned + floor
        if needed > self._memory.free_above_floors:
            free = size(self._memory.free_above_floors)
            raise CapacityError(f"weights and KV need {size(needed)}, {free} are free")
        while True:
            block, layer = model.kv_block_bytes, model.kv_layer_bytes
            places = self._memory.place(replica, sizes, pinned, floor, block, layer, shared)
            if places is not None:
                return places
            # Enough bytes in all: KV above the floors gives way, then any KV that lies where a buffer must.
            if not (self._scheduler.preempt_youngest() or self._scheduler.preempt_youngest(floors=False)):
                raise CapacityError(f"weights of {size(sum(sizes))} find no gap between those of other models")

    def targets(self, replica: ReplicaId) -> dict[str, torch.Tensor]:
        """Where tensors are to be written before `activate`, contiguous and in the served dtype; empty ones, and
        those that another replica has there, aside.
        """
        return {name: tensor for name, tensor in self._placed[replica].brought().items() if tensor.numel()}

    def held(self, replica: ReplicaId) -> dict[str, torch.Tensor]:
        """Its tensors on the device, whoever brought them."""
        return self._placed[replica].tensors

    def activate(self, replica: ReplicaId, views: Mapping[str, torch.Tensor] | None = None) -> bool:
        """The replica serves from now on. True: it refers to `views` until `drop`, for what has no target."""
        config, bound, _ = self._placed[replica]
        others = {name: (views or {})[name] for name in config.tensors() if name not in bound}
        tensors = bound | others
        self._models[replica] = self._bind(config, tensors)
        self._pace[replica] = sum(tensor.numel() for tensor in tensors.values()) / FIRST_PACE
        return bool(others)

    def _bind(self, config: ModelConfig, tensors: Tensors) -> AnyModel:
        if isinstance(config, ForeignConfig):
            bound: AnyModel = import_module(FALLBACK).Foreign(config, tensors, self._arena)
            return bound
        on_cuda = self.device.type == "cuda"
        tiled = config.dtype == "float32" and not on_cuda
        return Model(config, tensors, self._arena, fused=on_cuda, tiled=tiled)

    def drop(self, replica: ReplicaId) -> list[SequenceState]:
        """Frees a replica, placed or active; returns its sequences, which end without a word."""
        sequences = self._scheduler.of(replica)
        states = [_state(sequence) for sequence in sequences]
        for sequence in sequences:
            self._scheduler.remove(sequence)
        self._models.pop(replica, None)
        self._pace.pop(replica, None)
        del self._placed[replica]
        self._memory.remove(replica)
        return states

    def reserve(self, nbytes: int) -> int:
        """Preempts sequences above the floors until `nbytes` are free; returns the bytes still missing, 0 if none."""
        missing = nbytes - self._memory.free_above_floors
        if missing > 0:
            return missing
        while self._memory.free_bytes < nbytes and self._scheduler.preempt_youngest():
            pass
        return max(0, nbytes - self._memory.free_bytes)

    # --- sequences ---

    def add(self, start: SequenceStart) -> None:
        """Queues a sequence; one that is here with an older epoch is replaced, an older one than here is ignored.

        If its tokens already end it (a stop id, enough tokens), the next step says so without a new token.

        Raises:
            KeyError: the replica is not active here.
            KvCapacityError: its KV does not fit beside the weights that are here.
            CapacityError: it is longer than the model's context, or it is no sequence of this model's tokens.
        """
        config = self._models[start.replica].config
        sequence = self._sequence(start, config)
        self._refuse_unfit(sequence, config)
        former = self._scheduler.get(start.sequence)
        if former is not None and former.epoch >= start.epoch:
            return
        if former is not None:
            self._scheduler.remove(former)
        finish = sequence.finish()
        if finish is None:
            self._scheduler.add(sequence)
        else:
            self._ended.append(Emission(start.sequence, start.epoch, [], finish))

    def _sequence(self, start: SequenceStart, config: ModelConfig) -> Sequence:
        self._arrivals += 1
        return Sequence(
            sequence=start.sequence,
            epoch=start.epoch,
            replica=start.replica,
            order=self._arrivals,
            tokens=[*start.prompt.tolist(), *start.generated.tolist()],
            prompt_length=len(start.prompt),
            context=config.context,
            sampling=start.sampling,
            groups=config.kv_groups,
        )

    def _refuse_unfit(self, sequence: Sequence, config: ModelConfig) -> None:
        tokens = sequence.tokens
        if not sequence.prompt_length or sequence.prompt_length > config.context:
            raise CapacityError(f"a prompt has 1 to {config.context} tokens, not {sequence.prompt_length}")
        bias = sequence.sampling.shaping.logit_bias if sequence.sampling.shaping else ()
        used = [*tokens, *(token for token, _ in bias)]
        if min(used) < 0 or max(used) >= config.vocab:
            raise CapacityError(f"token ids are 0 to {config.vocab - 1}")
        capacity = max(0, self._memory.capacity(sequence.replica))
        if sequence.sampling.open_end:
            sequence.context = max(sequence.prompt_length + 1, sequence.groups.longest(capacity, config.context))
        if sequence.finish() is not None:
            return
        most = min(sequence.prompt_length + sequence.sampling.max_tokens, sequence.context)
        needed, block = sequence.groups.live(most), config.kv_block_bytes
        if needed > capacity:
            why = f"{most} tokens need {size(needed * block)} of KV, {size(capacity * block)} are there"
            never = needed > self._memory.most(sequence.replica)
            raise KvCapacityError(why, (needed - capacity) * block, never)

    def cancel(self, sequence: SequenceId, epoch: int) -> None:
        """Ends a sequence without a word if it is here with this epoch or an older one."""
        self._ended = [e for e in self._ended if e.sequence != sequence or e.epoch > epoch]
        found = self._scheduler.get(sequence)
        if found is not None and found.epoch <= epoch:
            self._scheduler.remove(found)

    def step(self) -> StepResult:
        """Runs one batch of one model; models with work take turns."""
        result = StepResult(self._ended, [], {}, [])
        self._ended = []
        batch = self._scheduler.next_batch(self._rows)
        for place in self._memory.fresh:
            self._arena.clear(place)
        self._memory.fresh.clear()
        stranded, self._scheduler.stranded = self._scheduler.stranded, []
        for sequence in stranded:
            self._refuse(sequence, TAKEN, result)
        if batch is not None:
            self._run(batch, result)
        elif not stranded and len(self._scheduler):
            self._unblock(result)
        return result

    def _unblock(self, result: StepResult) -> None:
        """Nothing can run, as the free memory lies in pieces: the oldest goes, so that none waits for ever."""
        oldest = min(self._scheduler, key=lambda sequence: sequence.order)
        if oldest.sampling.open_end and len(oldest.tokens) > oldest.prompt_length:
            self._end(oldest, [], FinishReason.LENGTH, result)
        else:
            self._refuse(oldest, TAKEN, result)

    def _run(self, batch: Batch, result: StepResult) -> None:
        begun = self._clock()
        for sequence, _ in batch.chunks:
            sequence.started = begun if sequence.started is None else sequence.started
        ending = [chunk.sequence for chunk in batch.chunks if chunk.tokens == chunk.sequence.missing]
        logits = run(self._models[batch.replica], batch.chunks, self.device)
        for sequence, tokens in batch.chunks:
            sequence.cached += tokens
            self._scheduler.trim(sequence)
        drawn = _draw(logits, ending)
        self.steps += 1
        ended = self._clock()
        rows = sum(tokens for _, tokens in batch.chunks)
        self._pace[batch.replica] += 0.5 * ((ended - begun) / max(rows, ROWS_LEAST) - self._pace[batch.replica])
        for place, (sequence, token) in enumerate(zip(ending, drawn, strict=True)):
            if sequence.sampling.logprobs is not None and token is not None:
                told = likelihood(logits[place], token, sequence.sampling.logprobs)
                result.likelihoods[sequence.sequence] = [told]
            self._deliver(sequence, token, ended, result)

    def _deliver(self, sequence: Sequence, token: int | None, now: float, result: StepResult) -> None:
        if token is None:
            self._end(sequence, [], FinishReason.NOT_FINITE, result)
            return
        sequence.append(token)
        if len(sequence.tokens) == self._models[sequence.replica].config.rope_switch + 1:
            self._scheduler.preempt(sequence)  # all its keys are to be turned anew
        if not sequence.emitted and sequence.started is not None:
            result.first.append(FirstToken(sequence.sequence, sequence.epoch, now - sequence.started))
            sequence.emitted = True
        finish = sequence.finish()
        goes_on = finish is FinishReason.LENGTH and self._could_go_on(sequence)
        if finish is None or goes_on:
            result.tokens.append(Emission(sequence.sequence, sequence.epoch, [token], None))
        else:
            self._end(sequence, [token], finish, result)
        if goes_on:
            self._refuse(sequence, "weights have the memory of its further KV", result)

    def _could_go_on(self, sequence: Sequence) -> bool:
        """Whether its end is open, and other models' weights are what it ends at."""
        config = self._models[sequence.replica].config
        alone = sequence.groups.longest(self._memory.most(sequence.replica), config.context)
        return sequence.sampling.open_end and len(sequence.tokens) < alone

    def _refuse(self, sequence: Sequence, why: str, result: StepResult) -> None:
        """Whoever sent it may make room, and send it again: what was generated is not lost."""
        self._scheduler.remove(sequence)
        column = sequence.groups.total * self._models[sequence.replica].config.kv_block_bytes
        result.refused.append(Refusal(sequence.sequence, sequence.epoch, why, column, begun=True))

    def _end(self, sequence: Sequence, tokens: list[int], finish: FinishReason, result: StepResult) -> None:
        self._scheduler.remove(sequence)
        result.tokens.append(Emission(sequence.sequence, sequence.epoch, tokens, finish))

    def _rows(self, replica: ReplicaId) -> int:
        if self.device.type == "cuda":
            return CUDA_ROWS
        rows = int(STEP_S / max(self._pace[replica], 1e-9))
        return min(max(rows // ROWS_LEAST * ROWS_LEAST, ROWS_LEAST), ROWS_MOST)

    def rest(self) -> None:
        """Gives memory that nobody has any more back to the system: after a while, for who comes soon may use it."""
        if self._memory.vacated:
            for place in self._memory.vacant():
                self._arena.release(place)
            self._memory.vacated = False

    # --- what others may know ---

    @property
    def restless(self) -> bool:
        """Whether `rest` has something to do."""
        return self._memory.vacated

    @property
    def runnable(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._ended) or len(self._scheduler) > 0

    @property
    def kv_used(self) -> int:
        """Bytes in KV blocks that belong to sequences."""
        return self._memory.used()

    @property
    def kv_free(self) -> int:
        """Bytes that KV may still take."""
        return self._memory.kv_free()

    def take_preempted(self) -> dict[ReplicaId, int]:
        """How often sequences gave their KV to others since this was last asked, by replica."""
        taken = dict(self._scheduler.preempted)
        self._scheduler.preempted.clear()
        return taken

    def sequences(self) -> list[SequenceState]:
        return [_state(sequence) for sequence in self._scheduler]

    def check_invariants(self) -> None:
        """Raises InvariantError, see `Memory` and `Scheduler`."""
        self._scheduler.check_invariants()

    def warm(self) -> None:
        """Runs small products, so that the maths library initialises before the first request."""
        x = torch.zeros(16, 64, device=self.device)
        torch.exp(torch.bmm((x @ x.t())[None], x[None]))


def _draw(logits: torch.Tensor, sequences: list[Sequence]) -> list[int | None]:
    """The next token of each row; None where its logits are not numbers."""
    if not sequences:
        return []
    sound = logits.amax(dim=-1).isfinite().tolist()  # NaN anywhere in a row makes its maximum NaN
    likeliest = logits.argmax(dim=-1).tolist()
    return [
        None if not ok else best if _plain(sequence.sampling) else _drawn(row, sequence)
        for row, sequence, ok, best in zip(logits, sequences, sound, likeliest, strict=True)
    ]


def _plain(sampling: Sampling) -> bool:
    """Whether the likeliest token of the model is the next."""
    return sampling.shaping is None and greedy(sampling)


def _drawn(row: torch.Tensor, sequence: Sequence) -> int:
    sampling = sequence.sampling
    if sampling.shaping is not None:
        row = shaped(row, sampling, sequence.counts or {}, sequence.generated)
    return draw(row, sampling, len(sequence.tokens))


def _state(sequence: Sequence) -> SequenceState:
    held = len(sequence.blocks) - sequence.trimmed * sequence.groups.sliding
    return SequenceState(sequence.sequence, sequence.epoch, sequence.generated, held)


def _numerics_id(device: torch.device, threads: int) -> str:
    if device.type == "cuda":
        return f"torch-{torch.__version__}/{torch.cuda.get_device_name(device)}/plain-{KERNELS}"
    isa = torch.backends.cpu.get_cpu_capability()
    return f"torch-{torch.__version__}/{isa}/threads-{threads}/tiles-{KERNELS}"
