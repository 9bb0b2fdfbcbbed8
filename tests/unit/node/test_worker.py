"""The worker's loop at the other end of a socket: sequences, and what is told of them."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from serverless_llm import framing, wire
from serverless_llm.errors import ProtocolError
from serverless_llm.loader.pool import Pool
from serverless_llm.node import worker
from tests.serving import until
from tests.unit.node.agent_end import ME, MIB, Agent


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
    assert agent.answer(wire.Step).refused == [(5, 1, "replica 1 is not here", 0, False, False)]
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


def test_preemptions_are_told_by_model_even_of_a_replica_that_left(ready: Agent) -> None:
    ready.run(1, tokens=1500)
    ready.until(lambda: len(ready.said(1)) > 3)
    assert ready.answer(wire.Progress).preemptions == {}
    ready.send(wire.Reserve(0, 9, 1 << 40))
    ready.send(wire.Reserve(0, 9, (1 << 40) - ready.answer(wire.Refused).missing))
    ready.send(wire.Drop(1))
    ready.until(lambda: not ready.all(wire.Progress)[-1].sequences)
    assert ready.all(wire.Progress)[-1].preemptions == {"tiny": 1}


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
    assert ready.answer(wire.Step).refused == [(2, 1, "replica 1 is not here", 0, False, False)]


def test_an_end_that_was_not_told_yet_outlives_its_replica(ready: Agent) -> None:
    """In one frame after another, so that no step comes between."""
    whole = np.zeros(4, np.int32).tobytes()
    run = wire.Run(1, 1, 1, np.arange(5, dtype=np.int32).tobytes(), whole, 0.0, 0, 1.0, 0, 4, [])
    ready.ours.sendall(wire.encode(run, 1, ME, 1) + wire.encode(wire.Drop(1)))
    assert ready.answer(wire.Dropped) == wire.Dropped(1)
    ready.until(lambda: any(one.done for one in ready.all(wire.Step)))
    assert ready.all(wire.Step)[-1].done == [(1, 1, "length", 4)]


def test_memory_is_reserved_or_refused(ready: Agent) -> None:
    ready.send(wire.Reserve(0, 9, MIB))
    assert ready.answer(wire.Reserved) == wire.Reserved(0, 9)
    ready.send(wire.Reserve(0, 10, 1 << 40))
    refused = ready.answer(wire.Refused)
    assert (refused.device, refused.replica) == (0, 10)
    assert refused.missing > 1 << 39


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


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `main` sets for all of its process is as it was afterwards: the next unhandled exception of a thread would
    end this one."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    interval = sys.getswitchinterval()
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("process")
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
