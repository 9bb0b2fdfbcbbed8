"""Sequences that a worker does not run: rests, room that is made for them, and ends."""

from __future__ import annotations

import pytest

from serverless_llm.cluster import commands as c
from serverless_llm.cluster import events as e
from serverless_llm.domain import FinishReason
from tests.unit.cluster.desk import D0, QUIET, Desk, beside, crowd, kinds, serving

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


def test_whoever_is_given_back_is_told_of(desk: Desk) -> None:
    out = desk.machine.handle(e.SequenceRefused(1, 1, "no room"), desk.now)
    assert c.GivenBack(1, "a", D0, "no room") in out


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


def test_what_runs_on_is_tried_again_whether_there_is_room_or_not() -> None:
    """It may end where the memory does: the worker knows."""
    desk = beside()
    desk.ask(2, "idle")
    desk.tell(e.FirstToken(1, 1, 0.1))
    assert desk.tell(e.SequenceRefused(1, 1, "weights came", missing=30, begun=True)) == []
    assert kinds(desk.tick(0.1)) == ["Dispatch"]


def test_what_runs_on_waits_for_who_is_idle() -> None:
    desk = beside()
    desk.ask(2, "idle")
    desk.tell(e.SequenceDone(2, 1, DONE, 3))
    desk.tell(e.FirstToken(1, 1, 0.1))
    assert desk.tell(e.SequenceRefused(1, 1, "weights came", missing=30, begun=True)) == []
    assert kinds(desk.tick(0.26)) == ["Dispatch"]
    desk.tell(e.FirstToken(1, 2, 0.1))
    assert kinds(desk.tell(e.SequenceRefused(1, 2, "weights came", missing=30, begun=True))) == ["Evicted", "Unload"]
    assert kinds(desk.tick(0.2)) == ["Dispatch"]
    desk.tell(e.FirstToken(1, 3, 0.1))
    assert kinds(desk.tell(e.SequenceRefused(1, 3, "weights came", missing=30, begun=True))) == []


def test_what_fits_no_device_is_refused_for_good(desk: Desk) -> None:
    assert desk.tell(e.SequenceRefused(1, 1, "20 tokens need 2 KB", missing=30, never=True)) == [
        c.Reject(
            1, 400, "context_length_exceeded",
            "20 tokens need 2 KB: ask for fewer, or serve with more --device-memory", None, False,
        )
    ]  # fmt: skip


@pytest.mark.parametrize("progress", [0, 5])
def test_tokens_that_only_the_log_knows_are_progress(progress: int) -> None:
    desk = serving()
    for epoch in range(1, 20):
        if "Reject" in kinds(desk.tell(e.SequenceRefused(1, epoch, "no room"))):
            break
        assert kinds(desk.tick(4.0)) == ["Dispatch"]
        desk.tell(e.Resumed(1, epoch + 1, min(epoch, progress)))
    assert epoch == progress + 7


def test_what_is_promised_to_others_of_a_model_is_its_own_to_use() -> None:
    desk = crowd(30, 30)
    desk.ask(2, "a")
    desk.tell(e.SequenceRefused(1, 1, "no room", missing=20))
    desk.tell(e.Unloaded(1))
    desk.tick(0.1)
    out = desk.tell(e.SequenceRefused(2, 1, "weights came", missing=5, begun=True))
    assert out[0] == c.Evicted(2, "y", D0, "memory")


def test_nothing_that_runs_leaves_for_what_runs_on() -> None:
    desk = crowd(1, 30)
    desk.ask(2, "y")
    desk.tick(60.0)
    assert desk.tell(e.SequenceRefused(1, 1, "weights came", missing=30, begun=True)) == []


def test_what_runs_on_and_came_long_ago_gets_the_place_of_what_is_in_steady_use() -> None:
    desk = beside()
    desk.tick(60.0)
    desk.ask(2, "idle")
    desk.tell(e.SequenceDone(2, 1, DONE, 3))
    out = desk.tell(e.SequenceRefused(1, 1, "weights came", missing=30, begun=True))
    assert kinds(out) == ["Evicted", "Unload"]


@pytest.mark.parametrize("event", [e.UnloadModel("a"), e.Delete("a")], ids=str)
def test_nobody_leaves_for_what_goes_on_elsewhere_or_not_at_all(event: e.Event) -> None:
    desk = beside()
    desk.tell(event)
    desk.tell(e.SequenceRefused(1, 1, "weights came", missing=30, begun=True))
    assert 1 in desk.machine.state.replicas
    assert desk.machine.state.replicas[1].state == "ready"


def test_refusals_are_counted_anew_once_it_went_on(desk: Desk) -> None:
    for epoch in range(1, 12):
        assert kinds(desk.tell(e.SequenceRefused(1, epoch, "no room"))) == []
        assert kinds(desk.tick(0.1)) == ["Dispatch"]
        desk.tell(e.Progress(D0, 1, ((1, epoch + 1, epoch, 1),)))
