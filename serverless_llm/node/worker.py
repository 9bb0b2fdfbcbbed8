"""The worker: the one process that owns a device, and every replica on it. Forked by the forkserver.

One thread runs the loop: take what the agent's socket holds without waiting, run one step, write what came of it.
With nothing to do it sleeps in poll. Bytes are mapped or copied in the uploader's thread, which wakes the loop.

A `Cancel` without sequences ends all of them, and so does a `Run` of a newer head generation.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

from serverless_llm import framing, wire
from serverless_llm.domain import Sampling, Shaping
from serverless_llm.engine.engine import Engine
from serverless_llm.engine.sequence import Emission, Refusal, SequenceStart, StepResult
from serverless_llm.errors import CapacityError, KvCapacityError, ProtocolError
from serverless_llm.node import rehearsal
from serverless_llm.node.placing import Placing

PROGRESS = 0.1  # seconds between reports of all sequences
BEAT = 1.0  # seconds between signs of life of a worker that has work
RECEIVE = 256 * 1024  # bytes of one recv
REST_MS = 200  # without anything to do, after which memory goes back to the system
SMOOTHING = 0.2  # weight of the newest step in the prediction of the next
SWITCH_INTERVAL = 5e-4  # seconds; a copy thread that comes back from the kernel waits no longer for the GIL


@dataclass(slots=True)
class Owner:
    """Whose a sequence is: its epoch, its gateway, and its tokens so far."""

    epoch: int
    gateway: int
    generated: int
    request_id: str


class Worker:
    """The loop around one engine. `run` returns when the agent is gone."""

    def __init__(self, link: socket.socket, boot: wire.Boot, pool: int) -> None:
        device = "cpu" if boot.kind == "cpu" else f"cuda:{boot.device}"
        self._engine = Engine(device, boot.budget, boot.weights, boot.threads)
        self._boot = boot
        self._link = link
        self._splitter = framing.Splitter()
        self._placing = Placing(self._engine, boot, pool)
        self._owners: dict[int, Owner] = {}
        self._refused: list[Refusal] = []
        self._preemptions: Counter[str] = Counter()  # by model
        self._address = 0
        self._generation = 0
        self._progress_due = 0.0
        self._progress_empty = True  # nothing is left to report
        self._beat_due = 0.0
        self._predicted = 0.0  # seconds of the next step
        self._poll = select.poll()
        self._poll.register(link, select.POLLIN)
        self._poll.register(self._placing.wakeup, select.POLLIN)

    def run(self) -> None:
        try:
            self._send(wire.Booted(os.getpid(), self._engine.numerics_id))
            while self._take():
                if self._engine.runnable:
                    self._step()
                self._report(time.monotonic())
        except (BrokenPipeError, ConnectionResetError):
            return  # the agent was gone before all was said
        except Exception as error:
            running = ", ".join(owner.request_id for owner in self._owners.values())
            error.add_note(f"requests that ran here: {running or 'none'}")
            raise
        finally:
            self._placing.close()
            self._link.close()

    # --- the agent's socket ---

    @property
    def _busy(self) -> bool:
        return self._engine.runnable or self._placing.busy

    def _take(self) -> bool:
        """Handles what is there; waits for it when there is nothing else to do. False: the agent is gone."""
        self._placing.yield_to_steps(self._engine.runnable)
        ready = self._poll.poll(self._patience())
        if not (ready or self._engine.runnable):
            self._engine.rest()
        for descriptor, _ in ready:
            if descriptor == self._placing.wakeup:
                for answer in self._placing.finished():
                    self._send(answer)
                continue
            data = self._link.recv(RECEIVE)
            if not data:
                return False
            for frame in self._splitter.feed(data):
                self._handle(frame)
            self._beat_due = 0.0
        return True

    def _patience(self) -> int | None:
        """Milliseconds to wait for something to do."""
        if self._engine.runnable:
            return 0
        if self._engine.restless:
            return REST_MS
        return int(1000 * BEAT) if self._busy or self._owners else None

    def _handle(self, frame: framing.Frame) -> None:
        message = wire.decode(frame.header.kind, frame.body)
        match message:
            case wire.Run():
                self._start(frame.header, message)
            case wire.Cancel(sequences):
                self._cancel(sequences)
            case wire.Reserve(device, replica, nbytes):
                missing = self._engine.reserve(nbytes)
                answer = wire.Refused(device, replica, missing) if missing else wire.Reserved(device, replica)
                self._address, self._generation = frame.header.destination, frame.header.epoch
                self._send(answer, framing.CONTROLLER)
            case wire.Place():
                self._answer(self._placing.place(message))
            case wire.Hasten(replica):
                self._placing.hasten(replica)
            case wire.Punched(offset):
                self._placing.punched(offset)
            case wire.Landed(replica, pieces, last):
                self._answer(self._placing.landed(replica, pieces, last))
            case wire.Drop(replica):
                self._count_preemptions()
                for sequence in self._placing.drop(replica):
                    del self._owners[sequence]
                self._send(wire.Dropped(replica))
            case _:
                raise ProtocolError(f"{type(message).__name__} is not for workers")

    def _answer(self, answer: wire.Message | None) -> None:
        if answer is not None:
            self._send(answer)

    def _send(self, message: wire.Message, destination: int = 0) -> None:
        self._link.sendall(wire.encode(message, self._address, destination, self._generation))

    # --- sequences ---

    def _start(self, header: framing.Header, run: wire.Run) -> None:
        if header.epoch > self._generation:
            self._cancel([])
        self._address, self._generation = header.destination, header.epoch
        owner = self._owners.get(run.sequence)
        if owner is not None and owner.epoch >= run.epoch:
            return
        prompt, generated = np.frombuffer(run.prompt, np.int32), np.frombuffer(run.generated, np.int32)
        try:
            self._engine.add(SequenceStart(run.sequence, run.epoch, run.replica, prompt, generated, _sampling(run)))
        except KvCapacityError as error:
            self._refused.append(Refusal(run.sequence, run.epoch, str(error), error.missing, error.never))
            return
        except (KeyError, CapacityError) as error:
            why = str(error) if isinstance(error, CapacityError) else f"replica {run.replica} is not here"
            self._refused.append(Refusal(run.sequence, run.epoch, why))
            return
        self._owners[run.sequence] = Owner(run.epoch, header.source, len(generated), run.request_id)
        self._progress_empty = False  # it is reported, or its end is

    def _cancel(self, sequences: list[tuple[int, int]]) -> None:
        """The next report confirms it: until then the machine thinks that a step may be under way with them."""
        self._progress_empty = False
        for sequence, epoch in sequences or [(sequence, owner.epoch) for sequence, owner in self._owners.items()]:
            self._engine.cancel(sequence, epoch)
            owner = self._owners.get(sequence)
            if owner is not None and owner.epoch <= epoch:
                del self._owners[sequence]

    def _step(self) -> None:
        self._placing.yield_to_steps(True)
        began = time.monotonic()
        result = self._engine.step()
        took = time.monotonic() - began
        self._predicted += SMOOTHING * (took - self._predicted)
        self._publish(result)

    def _publish(self, result: StepResult) -> None:
        """Tokens first, so that a gateway logs a sequence's last ones before the machine lets it go."""
        entries: dict[int, list[tuple[int, int, list[int], str]]] = defaultdict(list)
        done, likely = [], result.likelihoods
        for emission in result.tokens:
            owner = self._owners[emission.sequence]
            entries[owner.gateway].append((emission.sequence, emission.epoch, emission.tokens, emission.finish or ""))
            owner.generated += len(emission.tokens)
            if emission.finish:
                done.append(self._done(emission, owner))
        for gateway, group in entries.items():
            told = {entry[0]: likely[entry[0]] for entry in group if entry[0] in likely} if likely else {}
            self._send(wire.Tokens(group, told), gateway)
        for refusal in result.refused:
            del self._owners[refusal.sequence]
            self._refused.append(refusal)
        if result.first or done:
            first = [(one.sequence, one.epoch, one.prefill_s) for one in result.first]
            self._tell(wire.Step(self._boot.device, self._boot.incarnation, first, done, []))

    def _done(self, emission: Emission, owner: Owner) -> tuple[int, int, str, int]:
        del self._owners[emission.sequence]
        assert emission.finish is not None
        return emission.sequence, emission.epoch, emission.finish.value, owner.generated

    def _tell(self, message: wire.Message) -> None:
        self._send(message, framing.CONTROLLER)

    # --- reports ---

    def _report(self, now: float) -> None:
        if self._refused:
            self._tell(wire.Step(self._boot.device, self._boot.incarnation, [], [], [*self._refused]))
            self._refused = []
        sequences = bool(self._owners)
        if (sequences and now >= self._progress_due) or (not sequences and not self._progress_empty):
            self._progress(now)
        if now >= self._beat_due or not (self._busy or sequences):
            self._send(wire.Beat(self._engine.steps, self._busy or sequences, self._predicted))
            self._beat_due = now + BEAT

    def _progress(self, now: float) -> None:
        states = [(one.sequence, one.epoch, one.generated, one.kv_blocks) for one in self._engine.sequences()]
        kv = self._engine.kv_used, self._engine.kv_free
        self._count_preemptions()
        self._tell(wire.Progress(self._boot.device, self._boot.incarnation, states, *kv, self._preemptions))
        self._progress_due, self._progress_empty = now + PROGRESS, not states

    def _count_preemptions(self) -> None:
        """While their replicas' models are known."""
        for replica, count in self._engine.take_preempted().items():
            self._preemptions[self._placing.model(replica)] += count


def _sampling(run: wire.Run) -> Sampling:
    shaping = None
    if run.shaping is not None:
        one = run.shaping
        penalties = one.presence_penalty, one.frequency_penalty, one.repetition_penalty
        shaping = Shaping(*penalties, tuple(one.logit_bias), one.min_tokens)
    return Sampling(
        temperature=run.temperature,
        top_k=run.top_k,
        top_p=run.top_p,
        seed=run.seed,
        max_tokens=run.max_tokens,
        stop_ids=tuple(run.stop_ids),
        min_p=run.min_p,
        shaping=shaping,
        logprobs=run.logprobs,
        open_end=run.open_end,
    )


def main(link: socket.socket, pool: int) -> int:
    """A worker's whole life in its forked process; returns the exit status."""
    sys.setswitchinterval(SWITCH_INTERVAL)
    threading.excepthook = _thread_died
    header = framing.unpack(_exactly(link, framing.HEADER.size))
    boot = wire.decode(header.kind, _exactly(link, header.length))
    if not isinstance(boot, wire.Boot):
        raise ProtocolError(f"{type(boot).__name__} instead of Boot")
    try:
        worker = Worker(link, boot, pool)
    except Exception as error:
        why = f"{type(error).__name__}: {error}".partition("\n")[0]
        link.sendall(wire.encode(wire.Failed(0, why, permanent=False)))
        raise
    worker.run()
    return 0


def _thread_died(failure: threading.ExceptHookArgs) -> None:
    """Without its uploader a worker would wait for ever."""
    sys.excepthook(failure.exc_type, failure.exc_value or failure.exc_type(), failure.exc_traceback)
    sys.stderr.flush()
    os._exit(1)


def _exactly(link: socket.socket, count: int) -> bytes:
    data = link.recv(count, socket.MSG_WAITALL)
    if len(data) < count:
        sys.exit("the agent was gone before this worker was up")
    return data


def rehearse() -> None:
    """In the forkserver: what every worker would otherwise do first."""
    rehearsal.rehearse()
