"""The worker's loop at the other end of a socket, with a real engine and a real pool."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest

from serverless_llm import framing, wire
from serverless_llm.cli.make_checkpoint import make_checkpoint
from serverless_llm.engine.sequence import StepResult
from serverless_llm.errors import ProtocolError
from serverless_llm.loader.link import Priority
from serverless_llm.loader.pool import Pool
from serverless_llm.node import worker
from serverless_llm.node.worker import Worker
from tests.serving import until

MIB = 1 << 20
ME = framing.worker_address(3, 0)
M = TypeVar("M", bound=wire.Message)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("worker") / "tiny"
    make_checkpoint("tiny-llama", directory, dtype="float32")
    return directory


class Agent:
    """The agent's end: sends frames, collects answers."""

    def __init__(self, checkpoint: Path, weights: str) -> None:
        self.ours, theirs = socket.socketpair()
        self.ours.settimeout(10)
        self.raw = (checkpoint / "model.safetensors").read_bytes()
        self.config = (checkpoint / "config.json").read_text()
        self.pool = Pool(4 * MIB)
        self.pool.range(self.pool.offset(1), len(self.raw))[:] = self.raw
        self.heard: list[tuple[framing.Header, wire.Message]] = []
        self._splitter = framing.Splitter()
        boot = wire.Boot(0, 5, "cpu", 8 * MIB, weights, self.pool.capacity, 1, 0.0)
        self._worker = Worker(theirs, boot, self.pool.fd)
        self.thread = threading.Thread(target=self._worker.run)
        self.thread.start()

    def send(self, message: wire.Message, source: int = 0, epoch: int = 1) -> None:
        self.ours.sendall(wire.encode(message, source, ME, epoch))

    def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            for frame in self._splitter.feed(self.ours.recv(MIB)):
                self.heard.append((frame.header, wire.decode(frame.header.kind, frame.body)))

    def all(self, kind: type[M]) -> list[M]:
        return [message for _, message in self.heard if isinstance(message, kind)]

    def answer(self, kind: type[M]) -> M:
        """The next message of a kind that was not heard before."""
        known = len(self.all(kind))
        self.until(lambda: len(self.all(kind)) > known)
        return self.all(kind)[known]

    def place(
        self,
        replica: int = 1,
        dtype: str = "auto",
        config: str | None = None,
        ring: bool = False,
        room: bool = True,
        online: bool = True,
        verify: str = "off",
    ) -> None:
        files = [("model.safetensors", len(self.raw))]
        config = config or self.config
        self.send(wire.Place(replica, "tiny", "c", config, dtype, 0, files, ring, room, online, verify))

    def land(self, replica: int = 1) -> None:
        """The bytes in two pieces, the second first."""
        half = len(self.raw) // 2
        start = self.pool.offset(1)
        self.send(wire.Landed(replica, [(0, half, len(self.raw) - half, start + half)], False))
        self.send(wire.Landed(replica, [(0, 0, half, start)], True))

    def run(self, sequence: int, epoch: int = 1, gateway: int = 1, tokens: int = 4, generation: int = 1, **more: bytes
            ) -> None:  # fmt: skip
        prompt = np.arange(5, dtype=np.int32).tobytes()
        run = wire.Run(sequence, epoch, 1, prompt, more.get("generated", b""), 0.0, 0, 1.0, 0, tokens, [])
        self.send(run, gateway, generation)

    def said(self, sequence: int) -> list[int]:
        return [token for frame in self.all(wire.Tokens) for number, _, tokens, _ in frame.entries
                if number == sequence for token in tokens]  # fmt: skip

    def finished(self, sequence: int) -> bool:
        return any(number == sequence and why for frame in self.all(wire.Tokens) for number, _, _, why in frame.entries)

    def close(self) -> None:
        self.ours.close()
        self.thread.join(10)
        assert not self.thread.is_alive()
        self.pool.close()


@pytest.fixture(params=["view", "copy"])
def agent(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[Agent]:
    one = Agent(checkpoint, request.param)
    yield one
    one.close()


@pytest.fixture
def ready(agent: Agent) -> Agent:
    agent.place()
    agent.land()
    agent.answer(wire.Placed)
    return agent


def test_a_replica_is_placed_from_pieces_in_any_order(agent: Agent, request: pytest.FixtureRequest) -> None:
    agent.place()
    agent.land()
    placed = agent.answer(wire.Placed)
    assert placed.replica == 1
    assert placed.leased == ("view" in request.node.name)
    agent.until(lambda: not agent.all(wire.Beat)[-1].runnable if agent.all(wire.Beat) else False)


@pytest.mark.parametrize("verify", ["sample", "full"])
def test_copies_are_compared_before_a_replica_serves(agent: Agent, verify: str, request: pytest.FixtureRequest) -> None:
    agent.place(verify=verify)
    agent.land()
    agent.answer(wire.Placed)
    compared = agent.all(wire.Compared)
    if "view" in request.node.name:
        assert compared == []
        return
    (one,) = compared
    assert 0 < one.bytes < len(agent.raw)  # the header is not copied
    assert (one.replica, one.mended, one.differing) == (1, 0, [])
    assert [type(message) for _, message in agent.heard].index(wire.Compared) < [
        type(message) for _, message in agent.heard
    ].index(wire.Placed)


@pytest.mark.parametrize("ring", [False, True])
def test_a_bit_flipped_on_the_device_is_copied_again_if_it_can_be(checkpoint: Path, ring: bool) -> None:
    agent = Agent(checkpoint, "copy")
    arena = agent._worker._engine.arena
    agent.place(ring=ring, verify="full")
    half, start = len(agent.raw) // 2, agent.pool.offset(1)
    agent.send(wire.Landed(1, [(0, 0, half, start)], False))
    until(lambda: bool(arena.any()), "the first copies")
    until(lambda: agent._worker._placing._placements[1].task.done > 0, "their end")
    place = int(arena.nonzero()[0])
    arena[place] ^= 1
    agent.send(wire.Landed(1, [(0, half, len(agent.raw) - half, start + half)], True))
    compared = agent.answer(wire.Compared)
    agent.send(wire.Drop(1))
    agent.answer(wire.Dropped)
    agent.close()
    if ring:
        assert [file for file, _, _ in compared.differing] == [0]
        assert agent.all(wire.Placed) == []
    else:
        assert (compared.mended, compared.differing) == (1, [])
        assert len(agent.all(wire.Placed)) == 1


def test_a_worker_without_work_gives_memory_back(ready: Agent) -> None:
    ready.run(7)
    ready.until(lambda: ready.finished(7))
    engine = ready._worker._engine
    until(lambda: not engine.restless, "the worker to rest")
    ready.send(wire.Drop(1))
    ready.answer(wire.Dropped)
    until(lambda: not engine.restless, "the worker to rest")
    assert not engine.arena.any()


def test_a_sequence_is_told_to_its_gateway_and_its_end_to_the_controller(ready: Agent) -> None:
    ready.run(7, gateway=9, tokens=3)
    step = ready.answer(wire.Step)
    ready.until(lambda: any(one.done for one in ready.all(wire.Step)))
    assert step.first[0][:2] == (7, 1)
    assert ready.all(wire.Step)[-1].done == [(7, 1, "length", 3)]
    assert (step.device, step.incarnation) == (0, 5)
    assert len(ready.said(7)) == 3
    headers = {type(message): header for header, message in ready.heard}
    assert headers[wire.Tokens][2:5] == (ME, 9, 1)
    assert headers[wire.Step].destination == framing.CONTROLLER
    kinds = [type(message) for _, message in ready.heard]
    assert kinds.index(wire.Tokens) < kinds.index(wire.Step)


def test_what_a_sequence_asks_of_sampling_reaches_the_engine(ready: Agent) -> None:
    prompt = np.arange(5, dtype=np.int32).tobytes()
    shaping = wire.Shaping(0.5, 0.5, 1.5, [(9, 100.0)], 3)
    ready.send(wire.Run(1, 1, 1, prompt, b"", 0.0, 0, 1.0, 0, 5, [9], 0.5, shaping, 2), source=1)
    ready.send(wire.Run(2, 1, 1, prompt, b"", 0.0, 0, 1.0, 0, 5, []), source=1)
    ready.until(lambda: ready.finished(1) and ready.finished(2))
    assert (len(ready.said(1)), ready.said(1)[-1]) == (4, 9)
    told = [frame.likelihoods for frame in ready.all(wire.Tokens)]
    assert all(set(one) <= {1} for one in told)
    assert [len(one[1][0][1]) for one in told if one] == [2, 2, 2, 2]


def test_one_frame_a_step_and_gateway(ready: Agent) -> None:
    for sequence, gateway in ((1, 1), (2, 1), (3, 2)):
        ready.run(sequence, gateway=gateway, tokens=40)
    ready.until(lambda: all(ready.finished(sequence) for sequence in (1, 2, 3)))
    frames = [(header.destination, message) for header, message in ready.heard if isinstance(message, wire.Tokens)]
    assert {destination for destination, _ in frames} == {1, 2}
    assert any(len(message.entries) == 2 for _, message in frames if isinstance(message, wire.Tokens))
    assert ready.said(1) == ready.said(2) == ready.said(3)


def test_a_resumed_sequence_says_only_what_is_new(ready: Agent) -> None:
    ready.run(1, tokens=8)
    ready.until(lambda: ready.finished(1))
    whole = ready.said(1)
    ready.run(2, epoch=4, tokens=8, generated=np.array(whole[:5], np.int32).tobytes())
    ready.until(lambda: ready.finished(2))
    assert ready.said(2) == whole[5:]
    ready.until(lambda: bool(ready.all(wire.Step)[-1].done) and ready.all(wire.Step)[-1].done[0][0] == 2)
    assert ready.all(wire.Step)[-1].done == [(2, 4, "length", 8)]


def test_an_unknown_replica_and_an_impossible_sequence_are_refused(agent: Agent) -> None:
    agent.run(5)
    assert agent.answer(wire.Step).refused == [(5, 1, "replica 1 is not here")]
    agent.place()
    agent.land()
    agent.answer(wire.Placed)
    agent.send(wire.Run(6, 1, 1, b"", b"", 0.0, 0, 1.0, 0, 4, []))
    assert agent.answer(wire.Step).refused[0][:2] == (6, 1)


def test_a_cancelled_sequence_is_gone_and_reported_so(ready: Agent) -> None:
    ready.run(1, tokens=1500)
    ready.until(lambda: len(ready.said(1)) > 3)
    ready.send(wire.Cancel([(1, 0)]))  # an older epoch's: not this one
    known = len(ready.said(1))
    ready.until(lambda: len(ready.said(1)) > known + 3)
    ready.send(wire.Cancel([(1, 1)]))
    ready.until(lambda: bool(ready.all(wire.Progress)) and not ready.all(wire.Progress)[-1].sequences)
    ready.until(lambda: not ready.all(wire.Beat)[-1].runnable)
    assert not ready.finished(1)
    assert ready.all(wire.Progress)[-1].kv_used == 0


def test_an_empty_cancel_and_a_newer_head_end_everything(ready: Agent) -> None:
    for sequence in (1, 2):
        ready.run(sequence, tokens=1500)
    ready.until(lambda: len(ready.said(2)) > 3)
    ready.send(wire.Cancel([]))
    ready.until(lambda: bool(ready.all(wire.Progress)) and not ready.all(wire.Progress)[-1].sequences)
    ready.run(3, tokens=1500)
    ready.until(lambda: len(ready.said(3)) > 3)
    ready.run(4, tokens=3, generation=2)
    ready.until(lambda: ready.finished(4))
    ready.until(lambda: not ready.all(wire.Beat)[-1].runnable)
    assert not ready.finished(3)
    assert ready.heard[-1][0].epoch == 2


def test_only_the_newest_epoch_of_a_sequence_runs(ready: Agent) -> None:
    ready.run(1, epoch=2, gateway=1, tokens=1500)
    ready.run(1, epoch=1, gateway=2, tokens=1500)
    ready.until(lambda: len(ready.said(1)) > 3)
    ready.run(1, epoch=3, gateway=3, tokens=6)
    ready.until(lambda: ready.finished(1))
    ready.until(lambda: any(one.done for one in ready.all(wire.Step)))
    assert [done for step in ready.all(wire.Step) for done in step.done] == [(1, 3, "length", 6)]
    assert {header.destination for header, message in ready.heard if isinstance(message, wire.Tokens)} == {1, 3}


def test_a_dropped_replica_takes_its_sequences_along(ready: Agent) -> None:
    ready.run(1, tokens=1500)
    ready.until(lambda: len(ready.said(1)) > 3)
    ready.send(wire.Drop(1))
    assert ready.answer(wire.Dropped) == wire.Dropped(1)
    ready.until(lambda: not ready.all(wire.Progress)[-1].sequences)
    ready.send(wire.Drop(1))
    assert ready.answer(wire.Dropped) == wire.Dropped(1)
    ready.run(2)
    assert ready.answer(wire.Step).refused == [(2, 1, "replica 1 is not here")]


def test_an_end_that_was_not_told_yet_outlives_its_replica(ready: Agent) -> None:
    """In one frame after another, so that no step comes between."""
    whole = np.zeros(4, np.int32).tobytes()
    run = wire.Run(1, 1, 1, np.arange(5, dtype=np.int32).tobytes(), whole, 0.0, 0, 1.0, 0, 4, [])
    ready.ours.sendall(wire.encode(run, 1, ME, 1) + wire.encode(wire.Drop(1)))
    assert ready.answer(wire.Dropped) == wire.Dropped(1)
    ready.until(lambda: any(one.done for one in ready.all(wire.Step)))
    assert ready.all(wire.Step)[-1].done == [(1, 1, "length", 4)]


def test_a_load_can_be_dropped_half_way_and_begun_anew(agent: Agent) -> None:
    agent.place()
    agent.send(wire.Landed(1, [(0, 0, len(agent.raw) // 2, agent.pool.offset(1))], False))
    agent.send(wire.Drop(1))
    agent.answer(wire.Dropped)
    agent.land()  # late news of the dropped load
    agent.place()
    agent.land()
    agent.answer(wire.Placed)
    assert len(agent.all(wire.Placed)) == 1


def test_memory_is_reserved_or_refused(ready: Agent) -> None:
    ready.send(wire.Reserve(0, 9, MIB))
    assert ready.answer(wire.Reserved) == wire.Reserved(0, 9)
    ready.send(wire.Reserve(0, 10, 1 << 40))
    refused = ready.answer(wire.Refused)
    assert (refused.device, refused.replica) == (0, 10)
    assert refused.missing > 1 << 39


@pytest.mark.parametrize("room", [True, False])
def test_what_is_converted_passes_through_no_ring(checkpoint: Path, room: bool) -> None:
    """That is for good where DRAM could never hold all of it."""
    agent = Agent(checkpoint, "copy")
    agent.place(dtype="bfloat16", ring=True, room=room)
    agent.land()
    failed = agent.answer(wire.Failed)
    assert "is stored in another type than bfloat16" in failed.message
    assert failed.permanent is not room
    agent.close()


@pytest.mark.parametrize("agent", ["view"], indirect=True)
def test_a_worker_heeds_what_is_urgent_and_what_memory_went(agent: Agent) -> None:
    agent.place(online=False)
    agent.send(wire.Hasten(7))  # it failed before
    agent.send(wire.Punched(0))
    agent.send(wire.Reserve(0, 9, 0))
    agent.answer(wire.Reserved)
    (placement,) = agent._worker._placing._placements.values()
    before = placement.task.priority
    agent.send(wire.Hasten(1))
    agent.send(wire.Reserve(0, 9, 0))
    agent.answer(wire.Reserved)
    assert (before, placement.task.priority) == (Priority.PREFETCH, Priority.ONLINE)


def test_loads_yield_while_there_is_something_to_compute(ready: Agent) -> None:
    due = []
    step = ready._worker._engine.step

    def noted() -> StepResult:
        due.append(ready._worker._placing._uploader.step_due)
        return step()

    ready._worker._engine.step = noted  # type: ignore[method-assign]
    ready.run(1)
    ready.until(lambda: any(one.done for one in ready.all(wire.Step)))
    ready.send(wire.Reserve(0, 9, 0))
    ready.answer(wire.Reserved)
    until(lambda: not ready._worker._placing._uploader.step_due, "rest")
    assert set(due) == {True}


def test_what_is_pinned_is_told(agent: Agent) -> None:
    agent._worker._placing._uploader._on_pinned(5, "no more")
    assert agent.answer(wire.Pinned) == wire.Pinned(5, "no more")


def test_what_cannot_be_placed_fails_for_good(agent: Agent) -> None:
    agent.place(2, config='{"architectures": ["Unknown"]}')
    failed = agent.answer(wire.Failed)
    assert failed.permanent
    assert "architectures" in failed.message
    agent.place(3, config=agent.config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    agent.land(3)
    failed = agent.answer(wire.Failed)
    assert failed.permanent
    assert "missing from the checkpoint" in failed.message
    agent.place(1)
    agent.land(1)
    assert agent.answer(wire.Placed).replica == 1


def maps() -> int:
    """How often this process maps a pool."""
    return Path("/proc/self/maps").read_text().count("memfd:weights")


def test_a_checkpoint_in_another_dtype_is_converted(agent: Agent) -> None:
    before = maps()
    for replica in (1, 2, 3):
        agent.place(replica, dtype="bfloat16")
        agent.land(replica)
        assert not agent.answer(wire.Placed).leased
    assert maps() <= before + 1  # the one that is kept for the next replica
    agent.run(1, tokens=4)
    agent.until(lambda: agent.finished(1))
    assert len(agent.said(1)) == 4


def test_a_worker_that_breaks_names_the_requests_that_ran(ready: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    died: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", died.append)
    prompt = np.arange(5, dtype=np.int32).tobytes()
    ready.send(wire.Run(1, 1, 1, prompt, b"", 0.0, 0, 1.0, 0, 10_000, [], request_id="request-1"), source=1)
    ready.answer(wire.Tokens)
    ready.send(wire.Shutdown())
    ready.thread.join(10)
    assert isinstance(died[0].exc_value, ProtocolError)
    assert died[0].exc_value.__notes__ == ["requests that ran here: request-1"]


def test_the_process_reads_its_boot_first_and_ends_with_its_agent() -> None:
    pool = Pool(MIB)
    ours, theirs = socket.socketpair()
    ours.sendall(wire.encode(wire.Boot(0, 1, "cpu", MIB, "view", MIB, 1, 0.0)))
    ours.shutdown(socket.SHUT_WR)
    assert worker.main(theirs, pool.fd) == 0
    assert framing.unpack(ours.recv(MIB)).kind == wire.KIND[wire.Booted]
    ours.close()
    ours, theirs = socket.socketpair()
    ours.sendall(wire.encode(wire.Beat(0, False, 0.0)))
    with pytest.raises(ProtocolError, match="Beat instead of Boot"):
        worker.main(theirs, pool.fd)
    ours.close()
    with pytest.raises(SystemExit):
        worker.main(theirs, pool.fd)
    theirs.close()
    pool.close()
