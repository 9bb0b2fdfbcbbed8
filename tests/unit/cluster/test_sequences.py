"""Requests: arrival, queue, dispatch, end."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serverless_llm.cluster import commands as c
from serverless_llm.cluster import events as e
from serverless_llm.domain import DeviceSpec, FinishReason, NodeSpec
from tests.unit.cluster.desk import D0, D1, PHASES, QUIET, STILL, Desk, deploy, idle, kinds, node, serving

DONE = FinishReason.STOP


@pytest.fixture
def desk() -> Desk:
    return serving()


def test_a_cold_request_starts_a_load_before_its_prompt_is_known() -> None:
    desk = Desk()
    desk.join()
    desk.tell(deploy("a"))
    decided, reserve = desk.tell(e.RequestArrived(1, "a", "sha-a"))
    assert isinstance(decided, c.Decided)
    assert (decided.replica, decided.device, decided.victims) == (1, D0, ())
    assert reserve == c.Reserve(D0, 1, 90)
    assert desk.tell(e.PromptReady(1, 10, 10)) == []
    assert desk.tell(e.Reserved(D0, 1)) == [c.StartLoad(1, D0, "a", "/a", "sha-a", "auto", 10)]
    outcome, dispatch = desk.tell(e.ReplicaReady(1, PHASES), after=2.0)
    assert outcome == c.Outcome(1, "a", D0, decided.predicted_s, 2.0, PHASES)
    assert dispatch == c.Dispatch(1, 1, 1, D0, 2.0, PHASES)


def test_a_warm_request_is_dispatched_at_once_and_has_no_load_to_tell_of(desk: Desk) -> None:
    assert desk.tell(e.RequestArrived(2, "a", "sha-a"), after=1.0) == []
    assert desk.tell(e.PromptReady(2, 10, 10), after=0.5) == [c.Dispatch(2, 1, 1, D0, 0.5, None)]


def test_a_load_that_ends_before_the_prompt_is_ready_waits_for_it() -> None:
    desk = Desk()
    desk.join()
    desk.tell(deploy("a"))
    desk.tell(e.RequestArrived(1, "a", "sha-a"))
    desk.bring_up(1)
    assert desk.tell(e.PromptReady(1, 10, 10)) == [c.Dispatch(1, 1, 1, D0, 0.0, None)]


def test_a_model_nobody_deployed_is_not_found(desk: Desk) -> None:
    (reject,) = desk.tell(e.RequestArrived(2, "nope", "sha-nope"))
    assert reject == c.Reject(2, 404, "model_not_found", "the model 'nope' does not exist", None, False)


def test_a_request_may_fill_the_context_to_its_last_token() -> None:
    desk = Desk(QUIET)
    desk.join()
    desk.serve("a", 1, context=20)
    desk.tell(e.RequestArrived(2, "a", "sha-a"))
    (reject,) = desk.tell(e.PromptReady(2, 10, 11))
    assert isinstance(reject, c.Reject)
    assert reject.message == "21 tokens (prompt and max_tokens) are more than the 20 of the context"


def test_a_first_token_is_one_token(desk: Desk) -> None:
    desk.tell(e.FirstToken(1, 1, 0.1))
    assert desk.machine.state.sequences[1].generated == 1


def test_what_a_worker_says_of_a_sequence_that_no_worker_has_is_ignored() -> None:
    desk = Desk()
    desk.tell(deploy("a"))
    desk.ask(1, "a")
    assert desk.tell(e.SequenceDone(1, 1, DONE, 3)) == []
    assert list(desk.machine.state.sequences) == [1]


def test_who_rests_while_its_replica_leaves_waits_on(desk: Desk) -> None:
    desk.tell(e.SequenceRefused(1, 1, "no such replica"))
    desk.tell(e.WorkerLost(D0, 1, "killed"))
    desk.tick(0.1)
    assert desk.machine.state.models["a"].demand == 1


def test_who_runs_may_be_refused_too(desk: Desk) -> None:
    """Its worker dropped the replica, and then took the prompt that was on its way."""
    desk.tell(e.FirstToken(1, 1, 0.1))
    assert desk.tell(e.SequenceRefused(1, 1, "no such replica")) == []
    assert kinds(desk.tick(0.1)) == ["Dispatch"]


def test_a_mention_is_good_for_thirty_seconds_from_then(desk: Desk) -> None:
    desk.tell(e.Progress(D0, 1, ((1, 1, 3, 1),)), after=0.5)
    assert desk.tick(29.5) == []
    assert desk.tick(0.5)[0] == c.Cancel(D0, 1, 1)


def test_an_arrival_told_twice_counts_once(desk: Desk) -> None:
    assert desk.tell(e.RequestArrived(1, "a", "sha-a")) == []
    assert desk.tell(e.PromptReady(1, 10, 10)) == []
    assert desk.tell(e.PromptReady(99, 10, 10)) == []


def test_the_queue_is_bounded_and_says_when_to_come_back() -> None:
    desk = Desk()
    desk.tell(deploy("a", max_queue=4, max_concurrency=2))
    for sequence in range(6):  # the first two have places in the replica to come
        desk.ask(sequence, "a")
    assert desk.tell(e.RequestArrived(6, "a", "sha-a")) == [
        c.Reject(6, 503, "overloaded", "a is busy, and its queue is full (max_queue 4)", 3.0, True)
    ]


def test_who_has_a_place_does_not_wait_for_one() -> None:
    """Though its prompt is still being tokenised."""
    desk = Desk()
    desk.join()
    idle(desk, "a", 1, max_queue=0, max_concurrency=3)
    for sequence in (2, 3, 4):
        assert desk.tell(e.RequestArrived(sequence, "a", "sha-a")) == []
    assert kinds(desk.tell(e.RequestArrived(5, "a", "sha-a"))) == ["Reject"]
    for sequence in (2, 3, 4):
        assert kinds(desk.tell(e.PromptReady(sequence, 10, 10))) == ["Dispatch"]
    assert kinds(desk.tell(e.RequestArrived(6, "a", "sha-a"))) == ["Reject"]
    desk.tell(e.SequenceDone(2, 1, FinishReason.STOP, 3))
    assert desk.tell(e.RequestArrived(7, "a", "sha-a")) == []


def test_where_none_may_wait_another_replica_starts_before_one_is_refused() -> None:
    desk = Desk(replace(STILL, abandon_after=1.0))
    desk.join(node(devices=2))
    idle(desk, "a", 1, max_queue=0, max_concurrency=2, max_replicas=2)
    assert kinds(desk.ask(2, "a")) == ["Dispatch"]
    assert kinds(desk.ask(3, "a")) == ["Decided", "Reserve", "Dispatch"]
    assert desk.tick(2.0) == []  # nobody waits for it, and yet it is wanted
    for sequence in (4, 5):
        assert desk.ask(sequence, "a") == []
    assert kinds(desk.ask(6, "a")) == ["Reject"]
    assert kinds(desk.bring_up(2, D1)) == ["Outcome", "Dispatch", "Dispatch"]


def test_where_none_may_wait_a_start_that_nobody_needs_any_more_is_given_up() -> None:
    desk = Desk(replace(STILL, abandon_after=1.0))
    desk.join(node(devices=2))
    desk.tell(deploy("a", max_queue=0, max_concurrency=1, max_replicas=2))
    desk.ask(1, "a")
    assert kinds(desk.bring_up(1)) == ["Outcome", "Dispatch", "Decided", "Reserve"]
    desk.tell(e.SequenceDone(1, 1, DONE, 3))
    assert c.Evicted(2, "a", D1, "abandoned") in desk.tick(2.0)


def test_where_some_may_wait_another_replica_is_not_wanted_for_nobody() -> None:
    desk = Desk(replace(STILL, abandon_after=1.0))
    desk.join(node(devices=2))
    desk.serve("a", 1, max_concurrency=1, max_replicas=2)
    assert "Reserve" in kinds(desk.ask(2, "a"))
    desk.tell(e.ClientGone(2))
    assert c.Evicted(2, "a", D1, "abandoned") in desk.tick(2.0)


def test_a_replica_that_takes_nothing_new_has_no_places() -> None:
    desk = Desk(QUIET)
    desk.join(node(devices=2))
    idle(desk, "a", 1, max_queue=0, max_concurrency=4)
    model = desk.machine.state.models["a"]
    desk.ask(2, "a")
    assert model.places() == 3
    desk.machine.state.replicas[1].draining_for = "b"
    assert model.places() == 4  # of the one that comes in its stead
    for sequence in (3, 4, 5, 6):
        assert desk.tell(e.RequestArrived(sequence, "a", "sha-a")) == []
    assert kinds(desk.tell(e.RequestArrived(7, "a", "sha-a"))) == ["Reject"]


def test_retry_after_knows_of_the_start_under_way() -> None:
    desk = Desk()
    desk.join(node(devices=1))
    desk.tell(e.Heartbeat("n0", ((D0, 1, ()),), (), (("disk", 10.0),)))
    desk.tell(deploy("a", max_queue=0, max_concurrency=1))
    desk.ask(1, "a")
    (reject,) = desk.tell(e.RequestArrived(2, "a", "sha-a"))
    assert isinstance(reject, c.Reject)
    assert reject.retry_after == 10.0  # 80 bytes at 10 per second, and a round of the queue


def test_without_any_device_requests_wait() -> None:
    desk = Desk()
    desk.tell(deploy("a"))
    assert desk.ask(1, "a") == []
    assert [type(one) for one in desk.join()] == [c.Decided, c.Reserve]


def test_sequences_are_dispatched_in_order_of_arrival_within_the_concurrency() -> None:
    desk = Desk()
    desk.join()
    desk.tell(deploy("a", max_concurrency=2))
    for sequence in (1, 2, 3):
        desk.tell(e.RequestArrived(sequence, "a", "sha-a"))
    for sequence in (3, 2, 1):
        desk.tell(e.PromptReady(sequence, 10, 10))
    dispatched = [one.sequence for one in desk.bring_up(1) if isinstance(one, c.Dispatch)]
    assert dispatched == [1, 2]
    assert desk.tell(e.SequenceDone(2, 1, DONE, 10)) == [c.Dispatch(3, 1, 1, D0, 0.0, None)]


def test_the_replica_with_the_fewest_sequences_is_chosen() -> None:
    desk = Desk()
    desk.join(node(devices=2))
    desk.tell(deploy("a", max_replicas=2, min_replicas=2, max_concurrency=4))
    desk.bring_up(1, D0)
    desk.bring_up(2, D1)
    places = [one.device for number in range(4) for one in desk.ask(number, "a") if isinstance(one, c.Dispatch)]
    assert places == [D0, D1, D0, D1]


@pytest.mark.parametrize(
    ("prompt", "most", "says"),
    [
        (1000, 25, "1025 tokens (prompt and max_tokens) are more than the 1024 of the context"),
        (
            300,
            21,
            "the KV of 321 tokens (prompt and max_tokens) takes 210 B; beside the weights at most 20 B are available: "
            "ask for fewer, or serve with more --device-memory",
        ),
    ],
)
def test_a_request_whose_kv_can_never_fit_is_refused(desk: Desk, prompt: int, most: int, says: str) -> None:
    desk.tell(e.RequestArrived(2, "a", "sha-a"))
    assert desk.tell(e.PromptReady(2, prompt, most)) == [c.Reject(2, 400, "context_length_exceeded", says, None, False)]


def test_beside_weights_that_no_known_device_holds_there_is_no_room() -> None:
    desk = Desk(QUIET)
    unknown = DeviceSpec(1, "cpu", 0, "copy")
    desk.join(NodeSpec("n0", 1000, (DeviceSpec(0, "cpu", 100, "copy"), unknown)))
    desk.tell(deploy("a", size=150))
    (reject,) = desk.ask(1, "a")
    assert isinstance(reject, c.Reject)
    assert reject.message == (
        "the KV of 20 tokens (prompt and max_tokens) takes 20 B; beside the weights at most 0 B are available: "
        "ask for fewer, or serve with more --device-memory"
    )


def test_a_client_that_leaves_ends_its_sequence_wherever_it_is(desk: Desk) -> None:
    desk.tell(deploy("b"))
    assert desk.tell(e.ClientGone(1)) == [c.Cancel(D0, 1, 1)]
    assert desk.tell(e.ClientGone(1)) == []
    desk.tell(e.RequestArrived(2, "b", "sha-b"))
    assert desk.tell(e.ClientGone(2)) == []
    desk.ask(3, "b")
    assert desk.tell(e.ClientGone(3)) == []
    assert desk.machine.state.sequences == {}


def test_what_a_worker_says_of_an_older_epoch_is_ignored(desk: Desk) -> None:
    desk.tell(e.WorkerLost(D0, 1, "killed"))
    assert desk.tell(e.SequenceDone(1, 1, DONE, 10)) == []
    assert desk.tell(e.FirstToken(1, 1, 0.1)) == []
    assert desk.tell(e.SequenceRefused(1, 1, "why")) == []
    assert 1 in desk.machine.state.sequences


def test_the_end_of_an_older_epoch_does_not_end_a_newer_one(desk: Desk) -> None:
    desk.tell(e.SequenceRefused(1, 1, "no room"))
    desk.tick(0.1)
    assert desk.tell(e.SequenceDone(1, 1, DONE, 10)) == []
    assert desk.machine.state.sequences[1].epoch == 2
    desk.tell(e.SequenceDone(1, 2, DONE, 10))
    assert desk.machine.state.sequences == {}


def test_lost_sequences_come_back_in_their_old_order_with_a_new_epoch() -> None:
    desk = Desk()
    desk.join()
    desk.tell(deploy("a", max_concurrency=2))
    for sequence in (1, 2, 3):
        desk.ask(sequence, "a")
    desk.bring_up(1)
    desk.tell(e.FirstToken(1, 1, 0.1))
    desk.tell(e.WorkerLost(D0, 1, "killed"))
    desk.tell(e.WorkerUp(D0, 2))
    out = desk.bring_up(2)
    assert [(one.sequence, one.epoch) for one in out if isinstance(one, c.Dispatch)] == [(1, 2), (2, 2)]


def test_a_sequence_nobody_speaks_of_is_taken_back() -> None:
    desk = Desk()
    desk.join()
    desk.serve("a", 1)
    for _ in range(29):
        desk.beat(1, after=1.0)
    assert desk.beat(1, after=1.0) == [c.Cancel(D0, 1, 1), c.Dispatch(1, 2, 1, D0, 30.0, None)]


def test_news_of_a_sequence_puts_its_deadline_off() -> None:
    desk = Desk()
    desk.join()
    desk.serve("a", 1)
    for second in range(57):
        if second == 28:
            desk.tell(e.FirstToken(1, 1, 0.1))
        assert desk.beat(1, after=1.0) == []
    assert c.Cancel(D0, 1, 1) in desk.beat(1, after=1.0)


def test_a_worker_that_leaves_a_sequence_out_for_two_seconds_does_not_have_it(desk: Desk) -> None:
    assert desk.tell(e.Progress(D0, 1, ()), after=1.0) == []
    assert desk.tell(e.Progress(D0, 1, ((1, 1, 3, 1),)), after=1.9) == []
    assert desk.tell(e.Progress(D0, 1, ()), after=1.0) == []
    again = desk.tell(e.Progress(D0, 1, ()), after=2.0)
    assert again == [c.Cancel(D0, 1, 1), c.Dispatch(1, 2, 1, D0, 5.9, None)]


def test_a_dispatch_that_does_not_arrive_is_made_again_after_ten_seconds(desk: Desk) -> None:
    for _ in range(10):
        assert desk.tell(e.Progress(D0, 1, ()), after=1.0) == []
    assert desk.tell(e.Progress(D0, 1, ()), after=1.0)[0] == c.Cancel(D0, 1, 1)


def test_a_worker_that_runs_what_it_should_not_is_told_to_stop(desk: Desk) -> None:
    desk.tell(e.SequenceRefused(1, 1, "no room"))
    out = desk.tell(e.Progress(D0, 1, ((1, 1, 3, 1), (77, 4, 3, 1), (1, 2, 0, 0))))
    assert out == [c.Cancel(D0, 1, 1), c.Cancel(D0, 77, 4)]
    assert desk.tell(e.Progress(D0, 9, ((77, 4, 3, 1),))) == []
    assert desk.tell(e.Progress(D1, 1, ((77, 4, 3, 1),))) == []


def test_a_clock_that_steps_back_stands_still(desk: Desk) -> None:
    desk.tick(1.0)
    desk.tell(e.RequestArrived(2, "a", "sha-a"), after=-5.0)
    assert desk.machine.state.sequences[2].arrived == 1.0
