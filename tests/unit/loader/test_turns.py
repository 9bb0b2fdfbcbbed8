"""Whose part is next."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from serverless_llm.loader.link import Priority
from serverless_llm.loader.plan import Landed
from serverless_llm.loader.turns import Turns


@dataclass(eq=False)
class Waiting:
    priority: Priority = Priority.PREFETCH


def test_the_better_priority_goes_first_then_what_came_first() -> None:
    turns: Turns[Waiting] = Turns()
    first, second, urgent = Waiting(), Waiting(), Waiting(Priority.ONLINE)
    for task, offset in ((first, 0), (second, 0), (first, 8), (urgent, 0)):
        turns.put(task, Landed(0, offset, 8, 100 + offset))
    taken = [turns.take(8) for _ in range(4)]
    assert taken == [
        (one, Landed(0, at, 8, 100 + at)) for one, at in ((urgent, 0), (first, 0), (second, 0), (first, 8))
    ]
    assert not turns


def test_a_part_gives_way_to_what_became_urgent_and_goes_on_in_its_place() -> None:
    turns: Turns[Waiting] = Turns()
    first, second = Waiting(), Waiting()
    turns.put(first, Landed(1, 4, 10, 64))
    turns.put(second, Landed(0, 0, 3, 0))
    assert turns.take(4) == (first, Landed(1, 4, 4, 64))
    second.priority = Priority.ONLINE
    assert turns.take(4) == (second, Landed(0, 0, 3, 0))
    assert [turns.take(4) for _ in range(2)] == [(first, Landed(1, 8, 4, 68)), (first, Landed(1, 12, 2, 72))]


def test_who_waits_no_more_has_no_turn() -> None:
    turns: Turns[Waiting] = Turns()
    first, second = Waiting(), Waiting()
    for task in (first, second):
        turns.put(task, Landed(0, 0, 1, 0))
    turns.drop(first)
    turns.drop(first)
    assert turns.take(1) == (second, Landed(0, 0, 1, 0))
    assert not turns


@given(
    lengths=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 20), st.booleans()), max_size=12),
    longest=st.lists(st.integers(1, 9), min_size=1),
)
def test_every_byte_has_one_turn_and_a_task_s_bytes_stay_in_order(
    lengths: list[tuple[int, int, bool]], longest: list[int]
) -> None:
    turns: Turns[Waiting] = Turns()
    tasks = [Waiting(priority) for priority in (Priority.ONLINE, Priority.PREFETCH, Priority.PREFETCH)]
    put: dict[Waiting, list[int]] = {task: [] for task in tasks}
    at = 0
    whole = {}
    for number, length, uncut in lengths:
        turns.put(tasks[number], Landed(0, at, length, 7 * at), uncut)
        if uncut:
            whole[at] = length
        put[tasks[number]] += range(at, at + length)
        at += 100
    got: dict[Waiting, list[int]] = {task: [] for task in tasks}
    while turns:
        most = longest.pop() if len(longest) > 1 else longest[0]
        task, part = turns.take(most)
        assert part.length == whole.get(part.offset, part.length)
        assert part.length <= most or part.offset in whole
        got[task] += range(part.offset, part.offset + part.length)
    assert got == put
