"""Every invariant notices what it is there for, and says its name."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace

import pytest

from serverless_llm.cluster import events as e
from serverless_llm.cluster.invariants import check_invariants
from serverless_llm.cluster.ledger import extent
from serverless_llm.cluster.state import State
from serverless_llm.cluster.transitions import ReplicaState, SequenceState
from serverless_llm.errors import InvariantError
from tests.unit.cluster.desk import D0, Desk, deploy, node


@pytest.fixture
def state() -> State:
    """Replica 1 serves `a` to sequence 1; 2 and 3 wait for `b`, 4 for its prompt; replica 2 of `v` is a view."""
    desk = Desk()
    desk.join()
    desk.serve("a", 1)
    desk.tell(deploy("b"))
    desk.ask(2, "b")
    desk.ask(3, "b")
    desk.tell(e.RequestArrived(4, "b", "sha-b"))
    desk.join(node("n1", weights="view"))
    desk.tell(e.Delete("b"))
    desk.tell(deploy("b", size=95))
    desk.tell(deploy("v"))
    desk.ask(5, "v")
    desk.tell(deploy("w"))
    for sequence in (6, 7):
        desk.ask(sequence, "w")
    desk.tell(e.RequestArrived(8, "w", "sha-w"))
    return desk.machine.state


def drain_and_stay(state: State) -> None:
    state.drained.add("n1")
    for device in state.nodes["n1"].devices.values():
        device.drained = True


def drain_half(state: State) -> None:
    state.drained.add("n0")


def serve_nobody(state: State) -> None:
    state.replicas[1].running.clear()


def own_twice(state: State) -> None:
    state.replicas[2].running[1] = state.sequences[1]


def queue_out_of_order(state: State) -> None:
    state.models["w"].waiting.reverse()


def queue_a_stranger(state: State) -> None:
    del state.sequences[6]


def queue_what_runs(state: State) -> None:
    state.sequences[8].state = SequenceState.RUNNING


def forget_a_waiter(state: State) -> None:
    state.models["w"].waiting.pop()


def disown(state: State) -> None:
    state.sequences[1].replica = state.replicas[2]


def queue_a_double(state: State) -> None:
    waiting = state.models["w"].waiting
    waiting[0] = copy(waiting[0])


def tokenise_a_double(state: State) -> None:
    unready = state.models["w"].unready
    unready[8] = copy(unready[8])


def swap_who_waits_for_who_runs(state: State) -> None:
    state.models["w"].unready = {1: state.sequences[1]}


def run_while_loading(state: State) -> None:
    state.replicas[1].state = ReplicaState.LOADING


def serve_without_worker(state: State) -> None:
    state.devices[D0].incarnation = 0


def lose_a_grant(state: State) -> None:
    state.devices[D0].actual.remove(1)


def share_unseen(state: State) -> None:
    state.replicas[1].shared = (extent(7, 20),)


def disagree_on_an_extent(state: State) -> None:
    ledger, replica = state.devices[D0].actual, state.replicas[1]
    replica.shared = (extent(7, 20),)
    ledger.remove(1)
    for key, size in replica.charges:
        ledger.add(key, size - 1)


def lose_a_pin(state: State) -> None:
    state.nodes["n1"].planned_dram.remove("sha-v")


def overcommit(state: State) -> None:
    state.devices[D0].planned.capacity = 50


def miscount(state: State) -> None:
    state.nodes["n0"].actual_dram.used = 5


def hide_a_replica(state: State) -> None:
    del state.replicas[2]


def misfile_a_replica(state: State) -> None:
    state.models["w"].replicas[1] = state.replicas[1]


def exceed_the_most(state: State) -> None:
    model = state.models["a"]
    model.spec = replace(model.spec, max_replicas=0)


def double_up_on_a_device(state: State) -> None:
    model = state.models["a"]
    model.spec = replace(model.spec, max_replicas=2)
    model.replicas[99] = state.replicas[1]


def feed_the_dead(state: State) -> None:
    state.hungry["gone"] = None


def never_expire_a_load(state: State) -> None:
    state.timers.disarm(("replica", 2))


def never_miss_a_sequence(state: State) -> None:
    state.timers.disarm(("mention", 1))


def own_what_waits(state: State) -> None:
    state.models["w"].unready[1] = state.sequences[1]


def rest_for_ever(state: State) -> None:
    state.timers.arm(("rest", 6), 1.0)


def kill_without_end(state: State) -> None:
    state.devices[D0].killing = True


def never_miss_a_node(state: State) -> None:
    state.timers.disarm(("silent", "n0"))


def disturb_a_trial(state: State) -> None:
    state.devices[D0].trial = ("sequence", 99)


def run_a_suspect(state: State) -> None:
    state.suspects[1] = state.sequences[1]


def forget_who_lacks_room(state: State) -> None:
    state.sequences[6].kv_bytes = 5


def promise(state: State, replica: int, sequence: int, size: int) -> None:
    one = state.replicas[replica]
    one.promises[sequence] = size
    state.devices[one.device].planned.add(*one.promised)


def promise_a_stranger(state: State) -> None:
    promise(state, 1, 99, 0)


def promise_another_size(state: State) -> None:
    promise(state, 1, 1, 5)


def promise_what_runs_elsewhere(state: State) -> None:
    promise(state, 3, 1, 0)  # 2 leaves


@pytest.mark.parametrize(
    ("name", "break_it"),
    [
        ("one owner", serve_nobody),
        ("one owner", own_twice),
        ("one owner", disown),
        ("one queue", queue_a_double),
        ("one queue", tokenise_a_double),
        ("one queue", swap_who_waits_for_who_runs),
        ("one queue", queue_out_of_order),
        ("one queue", queue_a_stranger),
        ("one owner", queue_what_runs),
        ("one queue", forget_a_waiter),
        ("one queue", own_what_waits),
        ("one queue", forget_who_lacks_room),
        ("busy are ready", run_while_loading),
        ("busy are ready", serve_without_worker),
        ("ledgers equal residencies", lose_a_grant),
        ("ledgers equal residencies", lose_a_pin),
        ("ledgers equal residencies", share_unseen),
        ("ledgers equal residencies", disagree_on_an_extent),
        ("ledgers within budget", overcommit),
        ("ledgers within budget", miscount),
        ("indexes agree", hide_a_replica),
        ("indexes agree", misfile_a_replica),
        ("indexes agree", exceed_the_most),
        ("indexes agree", double_up_on_a_device),
        ("indexes agree", feed_the_dead),
        ("drained are left", drain_and_stay),
        ("drained are left", drain_half),
        ("commands have deadlines", never_expire_a_load),
        ("commands have deadlines", never_miss_a_sequence),
        ("commands have deadlines", rest_for_ever),
        ("commands have deadlines", kill_without_end),
        ("commands have deadlines", never_miss_a_node),
        ("promises are kept", promise_a_stranger),
        ("promises are kept", promise_another_size),
        ("promises are kept", promise_what_runs_elsewhere),
        ("trials are alone", disturb_a_trial),
        ("trials are alone", run_a_suspect),
    ],
)
def test_a_broken_invariant_says_its_name(state: State, name: str, break_it: Callable[[State], None]) -> None:
    check_invariants(state)
    break_it(state)
    with pytest.raises(InvariantError, match=rf"^{name}: "):
        check_invariants(state)
