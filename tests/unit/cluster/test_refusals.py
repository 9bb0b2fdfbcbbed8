"""Sequences that a worker does not run: rests, room that is made for them, and ends."""

from __future__ import annotations

import pytest

from serverless_llm.cluster import commands as c
from serverless_llm.cluster import events as e
from serverless_llm.domain import DeviceSpec, FinishReason, NodeSpec
from tests.unit.cluster.desk import D0, QUIET, STILL, Desk, idle, kinds, serving

DONE = FinishReason.STOP


@pytest.fixture
def desk() -> Desk:
    return serving()


def test_a_refused_sequence_is_tried_again_after_a_rest_and_rejected_in_the_end(desk: Desk) -> None:
    for epoch, rest in enumerate([0.1, 0.2, 0.4, 0.8, 1.6, 3.2], start=1):
        assert desk.tell(e.SequenceRefused(1, epoch, "no such replica")) == []
        assert desk.tick(rest - 0.05) == []
        assert [type(one) for one in desk.tick(0.06)] == [c.Dispatch]
    assert desk.tell(e.SequenceRefused(1, 7, "no such replica")) == [
        c.Reject(1, 503, "overloaded", "the engine refused it 7 times: no such replica", 1.0, True)
    ]


def test_who_has_rested_has_its_old_place_in_the_queue() -> None:
    desk = Desk(QUIET)
    desk.join()
    desk.serve("a", 1, max_concurrency=1)
    desk.ask(2, "a")
    desk.ask(3, "a")
    assert desk.tell(e.SequenceRefused(1, 1, "no room")) == [c.Dispatch(2, 1, 1, D0, 0.0, None)]
    desk.tick(0.1)
    assert desk.tell(e.SequenceDone(2, 1, DONE, 3)) == [c.Dispatch(1, 2, 1, D0, 0.1, None)]


def test_a_resting_sequence_may_leave(desk: Desk) -> None:
    desk.tell(e.SequenceRefused(1, 1, "no room"))
    desk.tell(e.ClientGone(1))
    assert desk.tick(60.0) == []


def test_what_a_worker_took_and_gave_back_untouched_did_not_go_on(desk: Desk) -> None:
    for epoch in range(1, 7):
        assert kinds(desk.tell(e.SequenceRefused(1, epoch, "no room"))) == []
        assert "Dispatch" in kinds(desk.tick(4.0))
        desk.tell(e.Progress(D0, 1, ((1, epoch + 1, 0, 1),)))
    assert kinds(desk.tell(e.SequenceRefused(1, 7, "no room"))) == ["Reject"]


def beside(**spec: object) -> Desk:
    """Sequence 1 runs beside a model of 30 bytes that was idle for longer than it would take to bring back."""
    desk = Desk(STILL)
    desk.join()
    idle(desk, "idle", 9, size=30, **spec)
    desk.tick(5.0)
    desk.serve("a", 1, size=30)
    return desk


def test_idle_models_leave_for_the_kv_of_what_runs() -> None:
    desk = beside()
    assert desk.tell(e.SequenceRefused(1, 1, "no room", missing=30)) == [
        c.Evicted(1, "idle", D0, "memory"),
        c.Unload(1, D0),
    ]
    assert desk.tell(e.Unloaded(1)) == []
    assert kinds(desk.tick(0.1)) == ["Dispatch"]


def test_no_more_models_leave_than_have_to() -> None:
    desk = beside()
    idle(desk, "other", 8, size=10)
    desk.tick(5.0)
    assert kinds(desk.tell(e.SequenceRefused(1, 1, "no room", missing=5))) == ["Evicted", "Unload"]


@pytest.mark.parametrize("spec", [{"min_replicas": 1}, {"pinned": True}], ids=str)
def test_what_may_not_be_taken_stays(spec: dict[str, object]) -> None:
    desk = beside(**spec)
    assert desk.tell(e.SequenceRefused(1, 1, "no room", missing=30)) == []
    assert kinds(desk.tick(0.1)) == ["Dispatch"]


def test_what_would_not_do_stays() -> None:
    desk = beside()
    assert desk.tell(e.SequenceRefused(1, 1, "no room", missing=60)) == []


def test_what_runs_something_stays() -> None:
    desk = beside()
    desk.ask(2, "idle")
    assert desk.tell(e.SequenceRefused(1, 1, "no room", missing=30)) == []


def test_who_was_just_idle_keeps_its_place_for_its_hold() -> None:
    desk = beside()
    desk.ask(2, "idle")
    desk.tell(e.SequenceDone(2, 1, DONE, 3))
    assert desk.tell(e.SequenceRefused(1, 1, "no room", missing=30)) == []
    assert kinds(desk.tick(0.1)) == ["Dispatch"]
    assert "Evicted" in kinds(desk.tell(e.SequenceRefused(1, 2, "no room", missing=30), after=0.2))


def test_who_is_in_steady_use_gives_its_place_to_what_came_long_ago() -> None:
    desk = beside()
    desk.tick(60.0)
    desk.ask(2, "idle")
    desk.tell(e.SequenceDone(2, 1, DONE, 3))
    assert kinds(desk.tell(e.SequenceRefused(1, 1, "no room", missing=30))) == ["Evicted", "Unload"]


def test_what_fits_no_device_is_refused_for_good(desk: Desk) -> None:
    assert desk.tell(e.SequenceRefused(1, 1, "20 tokens need 2 KB", missing=30, never=True)) == [
        c.Reject(
            1, 400, "context_length_exceeded",
            "20 tokens need 2 KB: ask for fewer, or serve with more --device-memory", None, False,
        )
    ]  # fmt: skip


def test_what_fits_a_larger_device_is_not() -> None:
    desk = Desk(QUIET)
    desk.join(NodeSpec("n0", 1000, (DeviceSpec(0, "cpu", 100, "copy"), DeviceSpec(1, "cpu", 200, "copy"))))
    desk.serve("a", 1)
    assert desk.machine.state.replicas[1].device == D0
    assert desk.tell(e.SequenceRefused(1, 1, "no room", missing=30, never=True)) == []


def test_refusals_are_counted_anew_once_it_went_on(desk: Desk) -> None:
    for epoch in range(1, 12):
        assert kinds(desk.tell(e.SequenceRefused(1, epoch, "no room"))) == []
        assert kinds(desk.tick(0.1)) == ["Dispatch"]
        desk.tell(e.Progress(D0, 1, ((1, epoch + 1, epoch, 1),)))
