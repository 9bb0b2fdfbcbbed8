"""What operators do: deploy, redeploy, delete, load, unload, pin."""

from __future__ import annotations

import pytest

from serverless_llm.cluster import commands as c
from serverless_llm.cluster import events as e
from serverless_llm.cluster.policy import Policy
from serverless_llm.cluster.transitions import ReplicaState
from serverless_llm.domain import FinishReason
from tests.unit.cluster.desk import D0, D1, QUIET, Desk, deploy, kinds, node, serving

DONE = FinishReason.STOP
OUTDATED = "the model was deployed anew before the request had ended"


def outdated(sequence: int) -> c.Reject:
    return c.Reject(sequence, 503, "model_loading", OUTDATED, 1.0, True)


@pytest.fixture
def desk() -> Desk:
    return serving()


def test_a_deploy_loads_nothing_unless_replicas_are_wanted() -> None:
    desk = Desk()
    desk.join()
    assert desk.tell(deploy("a")) == []
    assert kinds(desk.tell(deploy("b", min_replicas=1))) == ["Decided", "Reserve"]


def test_min_replicas_come_as_soon_as_there_is_room() -> None:
    desk = Desk()
    desk.tell(deploy("a", min_replicas=2, max_replicas=2))
    assert kinds(desk.join(node(devices=1))) == ["Decided", "Reserve"]
    assert kinds(desk.join(node("n1"))) == ["Decided", "Reserve"]


def test_a_changed_checkpoint_rolls_over(desk: Desk) -> None:
    assert desk.tell(deploy("a", checkpoint="sha-new")) == []
    desk.ask(2, "a")
    done = desk.tell(e.SequenceDone(1, 1, DONE, 3))
    assert kinds(done) == ["Evicted", "Unload", "Decided"]
    assert done[0] == c.Evicted(1, "a", D0, "rollover")
    assert desk.tell(e.Unloaded(1)) == [c.Reserve(D0, 2, 90)]
    assert desk.tell(e.Reserved(D0, 2)) == [c.StartLoad(2, D0, "a", "/a", "sha-new", "auto", 10)]


def test_the_next_start_is_verified_as_the_spec_says(desk: Desk) -> None:
    """Who runs stays: its bytes were compared as was asked for when it came."""
    assert desk.tell(deploy("a", verify="full")) == []
    desk.tell(e.SequenceDone(1, 1, DONE, 3))
    desk.tell(e.UnloadModel("a"))
    desk.tell(e.Unloaded(1))
    desk.ask(2, "a")
    (order,) = desk.tell(e.Reserved(D0, 2))
    assert order == c.StartLoad(2, D0, "a", "/a", "sha-a", "auto", 10, verify="full")


@pytest.mark.parametrize("change", [{"dtype": "float32"}, {"context": 512}, {"checkpoint": "sha-2"}])
def test_what_rolls_over_unloads_the_idle(desk: Desk, change: dict[str, object]) -> None:
    desk.tell(e.SequenceDone(1, 1, DONE, 3))
    assert desk.tell(deploy("a", **change)) == [c.Evicted(1, "a", D0, "rollover"), c.Unload(1, D0)]  # type: ignore[arg-type]


def test_the_same_again_changes_nothing(desk: Desk) -> None:
    assert desk.tell(deploy("a")) == []
    assert desk.machine.state.replicas[1].state is ReplicaState.READY


def test_new_limits_need_no_new_load(desk: Desk) -> None:
    assert desk.tell(deploy("a", max_concurrency=1, keep_alive=1.0)) == []
    assert desk.ask(2, "a") == []


def test_bytes_that_came_from_a_server_meanwhile_need_no_new_load() -> None:
    desk = Desk(QUIET)
    desk.join(node())
    desk.tell(deploy("a", min_replicas=1, remote_bytes=80))
    desk.bring_up(1)
    assert desk.tell(deploy("a", min_replicas=1)) == []


def test_fewer_replicas_send_the_newest_off() -> None:
    desk = Desk(QUIET)
    desk.join(node(devices=2))
    desk.tell(deploy("a", min_replicas=2, max_replicas=2))
    desk.bring_up(1)
    desk.bring_up(2, D1)
    assert desk.tell(deploy("a")) == [c.Evicted(2, "a", D1, "unload"), c.Unload(2, D1)]


def test_who_waits_for_an_old_revision_is_told_at_its_end() -> None:
    desk = Desk(QUIET)
    desk.tell(deploy("a"))
    desk.tell(e.RequestArrived(1, "a", "sha-a"))
    desk.ask(2, "a")
    assert desk.tell(deploy("a", keep_alive=1.0)) == []
    assert desk.tell(deploy("a", checkpoint="sha-new")) == [outdated(2), outdated(1)]
    assert desk.tell(e.PromptReady(1, 10, 10)) == []


def test_who_arrives_for_an_overtaken_checkpoint_is_told_at_once(desk: Desk) -> None:
    desk.tell(deploy("a", checkpoint="sha-new"))
    assert desk.tell(e.RequestArrived(2, "a", "sha-a")) == [outdated(2)]
    assert 2 not in desk.machine.state.sequences


def test_a_load_of_an_old_revision_serves_nobody() -> None:
    desk = Desk(QUIET)
    desk.join()
    desk.tell(deploy("a"))
    desk.ask(1, "a")
    desk.tell(e.Reserved(D0, 1))
    assert desk.tell(deploy("a", checkpoint="sha-new")) == [
        outdated(1),
        c.Evicted(1, "a", D0, "rollover"),
        c.Unload(1, D0),
    ]
    assert desk.machine.state.sequences == {}


@pytest.mark.parametrize("deleted", [False, True])
@pytest.mark.parametrize(
    "lost", [e.WorkerLost(D0, 1, "killed"), e.NodeLost("n0"), e.SequenceRefused(1, 1, "no room"), e.WorkerUp(D0, 2)]
)
def test_who_loses_its_worker_does_not_go_on_with_other_weights(desk: Desk, deleted: bool, lost: e.Event) -> None:
    if deleted:
        desk.tell(e.Delete("a"))
    assert desk.tell(deploy("a", checkpoint="sha-new")) == []
    assert desk.tell(lost)[0] == outdated(1)
    assert desk.machine.state.sequences == {}


def test_a_suspect_of_an_old_revision_is_not_tried(desk: Desk) -> None:
    desk.tell(e.WorkerLost(D0, 1, "killed"))
    desk.tell(e.WorkerUp(D0, 2))
    desk.bring_up(2)
    desk.tell(deploy("a", checkpoint="sha-new"))
    assert desk.tell(e.WorkerLost(D0, 2, "killed")) == [outdated(1)]
    assert desk.machine.state.suspects == {}


def test_who_runs_when_only_limits_change_goes_on_elsewhere(desk: Desk) -> None:
    desk.tell(deploy("a", max_concurrency=1, keep_alive=1.0))
    assert desk.tell(e.WorkerLost(D0, 1, "killed")) == []
    assert kinds(desk.tell(e.WorkerUp(D0, 2))) == ["Decided", "Reserve"]


def test_delete_tells_who_waits_and_lets_who_runs_end(desk: Desk) -> None:
    desk.tell(e.RequestArrived(2, "a", "sha-a"))
    reject = c.Reject(2, 404, "model_not_found", "the model 'a' does not exist", None, False)
    assert desk.tell(e.Delete("a")) == [reject]
    assert desk.tell(e.Delete("a")) == []
    assert kinds(desk.tell(e.RequestArrived(3, "a", "sha-a"))) == ["Reject"]
    assert desk.tell(e.SequenceDone(1, 1, DONE, 3)) == [c.Evicted(1, "a", D0, "delete"), c.Unload(1, D0)]
    desk.tell(e.Unloaded(1))
    assert desk.machine.state.replicas == {}


def test_a_deleted_model_leaves_no_deadline(desk: Desk) -> None:
    desk.tell(deploy("b"))
    desk.ask(2, "b")
    assert ("hungry", "b") in desk.machine.state.timers
    desk.tell(e.Delete("b"))
    assert ("hungry", "b") not in desk.machine.state.timers


def test_a_deleted_models_lost_sequence_is_told(desk: Desk) -> None:
    desk.tell(e.Delete("a"))
    reject = c.Reject(1, 404, "model_not_found", "the model 'a' does not exist", None, False)
    assert desk.tell(e.WorkerLost(D0, 1, "killed")) == [reject]


def test_a_refused_or_suspected_sequence_of_a_deleted_model_is_told(desk: Desk) -> None:
    desk.tell(e.Delete("a"))
    (reject,) = desk.tell(e.SequenceRefused(1, 1, "no room"))[:1]
    assert isinstance(reject, c.Reject)
    assert reject.code == "model_not_found"


def test_a_name_deployed_again_does_not_get_the_old_replicas(desk: Desk) -> None:
    desk.tell(e.Delete("a"))
    desk.tell(deploy("a"))
    desk.ask(2, "a")
    assert kinds(desk.tell(e.SequenceDone(1, 1, DONE, 3))) == ["Evicted", "Unload", "Decided"]


def test_a_model_deleted_while_others_make_way_for_it_lets_them_serve(desk: Desk) -> None:
    desk.tell(deploy("b"))
    desk.ask(2, "b")
    desk.tick(2.0)
    assert desk.machine.state.replicas[1].draining_for == "b"
    assert desk.ask(3, "a") == []
    assert kinds(desk.tell(e.Delete("b"))) == ["Reject", "Dispatch"]


def test_load_starts_a_replica_that_nobody_waits_for_and_that_goes_on() -> None:
    desk = Desk(Policy(silent_after=1e9, load_floor_s=1e9))
    desk.join()
    desk.tell(deploy("a"))
    assert desk.tell(e.Load("nope")) == []
    assert kinds(desk.tell(e.Load("a"))) == ["Decided", "Reserve"]
    assert desk.tell(e.Load("a")) == []
    assert desk.machine.state.models["a"].requested_at is None
    desk.tell(e.Reserved(D0, 1))
    assert desk.tick(100.0) == []


def test_load_waits_for_room_like_a_request(desk: Desk) -> None:
    desk.tell(deploy("b"))
    assert desk.tell(e.Load("b")) == []
    desk.tell(e.SequenceDone(1, 1, DONE, 3))
    assert kinds(desk.tick(0.25)) == ["Decided", "Evicted", "Unload"]
    assert desk.machine.state.models["b"].requested_at is None


def test_unload_takes_a_wish_to_load_back(desk: Desk) -> None:
    desk.tell(deploy("b"))
    desk.tell(e.Load("b"))
    desk.tell(e.UnloadModel("b"))
    desk.tell(e.SequenceDone(1, 1, DONE, 3))
    assert desk.tick(10.0) == []


def test_unload_waits_for_who_runs(desk: Desk) -> None:
    assert desk.tell(e.UnloadModel("nope")) == []
    assert desk.tell(e.UnloadModel("a")) == []
    assert desk.tell(e.SequenceDone(1, 1, DONE, 3)) == [c.Evicted(1, "a", D0, "unload"), c.Unload(1, D0)]


def test_unload_ends_a_load_that_nobody_waits_for_only() -> None:
    desk = Desk(QUIET)
    desk.join()
    desk.tell(deploy("a"))
    desk.tell(e.Load("a"))
    desk.tell(e.RequestArrived(1, "a", "sha-a"))
    assert desk.tell(e.UnloadModel("a")) == []
    desk.tell(e.ClientGone(1))
    assert kinds(desk.tell(e.UnloadModel("a"))) == ["Evicted", "Unload"]


def test_a_pinned_model_is_never_evicted(desk: Desk) -> None:
    desk.tell(deploy("b"))
    desk.tell(e.Pin("a", True))
    desk.tell(e.Pin("nope", True))
    desk.tell(e.SequenceDone(1, 1, DONE, 3))
    desk.ask(2, "b")
    assert desk.tick(100.0) == []
    assert kinds(desk.tell(e.Pin("a", False))) == ["Decided", "Evicted", "Unload"]


def test_a_replica_that_is_to_leave_takes_no_new_request(desk: Desk) -> None:
    desk.tell(e.UnloadModel("a"))
    assert desk.ask(2, "a") == []


def test_a_wish_for_what_fits_nowhere_is_forgotten(desk: Desk) -> None:
    desk.tell(deploy("big", size=95))
    assert desk.tell(e.Load("big")) == []
    assert desk.machine.state.models["big"].requested_at is None


@pytest.mark.parametrize("held", [{"pinned": True}, {"min_replicas": 1}])
def test_a_deploy_that_lets_go_of_its_memory_gives_it_to_who_waits(held: dict[str, object]) -> None:
    desk = Desk(QUIET)
    desk.join()
    desk.serve("a", 1)
    desk.tell(deploy("a", **held))  # type: ignore[arg-type]
    desk.tell(e.SequenceDone(1, 1, DONE, 3))
    desk.tell(deploy("b"))
    assert desk.ask(2, "b") == []
    assert desk.tick(20.0) == []
    assert kinds(desk.tell(deploy("a"))) == ["Decided", "Evicted", "Unload"]
