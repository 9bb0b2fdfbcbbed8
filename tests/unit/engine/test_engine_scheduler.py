"""Who runs next, and who gives way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serverless_llm.domain import Sampling
from serverless_llm.engine.blocks import SLAB_STEP, Memory
from serverless_llm.engine.kv_groups import FREED, KvGroups, Place, group
from serverless_llm.engine.scheduler import Batch, Chunk, Scheduler
from serverless_llm.engine.sequence import Sequence
from serverless_llm.errors import InvariantError

BLOCK = SLAB_STEP // 4  # bytes; four blocks in a slab


def scheduler(slabs: int = 16, floors: tuple[int, ...] = (0, 0)) -> Scheduler:
    memory = Memory(slabs * SLAB_STEP)
    for replica, floor in enumerate(floors, start=1):
        memory.place(replica, [], 0, floor, BLOCK, BLOCK)
    return Scheduler(memory)


def sequence(order: int, tokens: int, replica: int = 1, windows: tuple[int, ...] = (0,)) -> Sequence:
    sampling = Sampling(max_tokens=1000)
    return Sequence(order, 0, replica, order, [1] * tokens, tokens, 100_000, sampling, group(windows))


def run(schedule: Scheduler, rows: int = 64) -> dict[int, int]:
    """One step as the engine would do it: sequence -> tokens of its chunk."""
    batch = schedule.next_batch(lambda _: rows)
    schedule.check_invariants()
    for chunk in batch.chunks if batch else ():
        one = chunk.sequence
        one.cached += chunk.tokens
        schedule.trim(one)
        if not one.missing:
            one.tokens.append(1)
            one.emitted = True
    return {chunk.sequence.order: chunk.tokens for chunk in batch.chunks} if batch else {}


def test_a_prompt_is_cut_into_chunks_beside_decoding() -> None:
    schedule = scheduler()
    schedule.add(sequence(1, 10))
    assert run(schedule) == {1: 10}
    schedule.add(sequence(2, 100))
    assert run(schedule) == {1: 1, 2: 63}
    assert run(schedule) == {1: 1, 2: 37}
    assert run(schedule) == {1: 1, 2: 1}


def test_models_take_turns() -> None:
    schedule = scheduler()
    for order, replica in ((1, 1), (2, 2), (3, 1)):
        schedule.add(sequence(order, 5, replica))
    assert [run(schedule) for _ in range(4)] == [{1: 5, 3: 5}, {2: 5}, {1: 1, 3: 1}, {2: 1}]


def test_nothing_to_run() -> None:
    schedule = scheduler()
    assert schedule.next_batch(lambda _: 64) is None
    one = sequence(1, 5)
    schedule.add(one)
    schedule.remove(one)
    assert schedule.next_batch(lambda _: 64) is None
    assert len(schedule) == 0


def test_the_youngest_gives_way() -> None:
    schedule = scheduler(slabs=2)  # eight blocks: 128 tokens
    for order, tokens in ((1, 60), (2, 30)):
        schedule.add(sequence(order, tokens))
    assert run(schedule, 512) == {1: 60, 2: 30}
    for _ in range(5):
        assert run(schedule, 512) == {1: 1, 2: 1}
    older, younger = schedule
    while younger.blocks:
        run(schedule, 512)
    assert older.decoding
    assert younger.cached == 0
    assert len(younger.tokens) > 40
    assert schedule.preempted == {1: 1}
    schedule.remove(younger)
    schedule.preempt(older)  # all its keys are to be turned anew
    assert schedule.preempted == {1: 1}  # neither gave way to another


def test_a_preempted_sequence_waits_until_it_is_likely_to_end_its_prefill() -> None:
    schedule = scheduler(slabs=2)
    first, second = sequence(1, 100), sequence(2, 40)
    schedule.add(first)
    schedule.add(second)
    assert run(schedule, 512) == {1: 100}
    assert run(schedule, 512) == {1: 1}
    schedule.remove(first)
    assert run(schedule, 512) == {2: 40}


def test_no_one_overtakes_a_waiting_mate() -> None:
    schedule = scheduler(slabs=2)
    for order, tokens in ((1, 60), (2, 80), (3, 10)):
        schedule.add(sequence(order, tokens))
    assert run(schedule, 512) == {1: 60}


def test_another_models_elastic_kv_gives_way_but_not_its_floor() -> None:
    schedule = scheduler(slabs=4, floors=(0, SLAB_STEP))
    schedule.add(sequence(1, 16 * 4 * 3 - 16))
    for order in (2, 3):
        schedule.add(sequence(order, 40, replica=2))
    assert run(schedule, 512) == {1: 176}
    assert run(schedule, 512) == {2: 40}
    for _ in range(16):
        run(schedule, 512)
    oldest, guarded, _ = schedule
    assert oldest.blocks
    assert guarded.blocks


def test_a_sequence_that_fits_no_more_is_stranded() -> None:
    memory = Memory(4 * SLAB_STEP)
    memory.place(1, [], 0, 0, BLOCK, BLOCK)
    schedule = Scheduler(memory)
    schedule.add(sequence(1, 200))
    memory.place(2, [], 3 * SLAB_STEP, 0, BLOCK, BLOCK)
    assert run(schedule, 512) == {1: 64}
    assert run(schedule, 512) == {}
    assert [one.order for one in schedule.stranded] == [1]


def test_preempting_for_a_reservation_spares_floors() -> None:
    schedule = scheduler(slabs=4, floors=(SLAB_STEP, 0))
    for order, replica in ((1, 1), (2, 2), (3, 1)):
        schedule.add(sequence(order, 20, replica))
    run(schedule)
    run(schedule)
    assert schedule.preempt_youngest()
    assert [bool(one.blocks) for one in schedule] == [True, False, True]
    assert not schedule.preempt_youngest()
    assert schedule.preempt_youngest(floors=False)
    assert [bool(one.blocks) for one in schedule] == [True, False, False]


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 120), st.integers(1, 60), st.integers(1, 2)), min_size=1, max_size=12),
    st.integers(16, 200),
    st.sampled_from([(0, 0), (2 * SLAB_STEP, 0), (SLAB_STEP, SLAB_STEP)]),
)
def test_everything_ends(work: list[tuple[int, int, int]], rows: int, floors: tuple[int, ...]) -> None:
    """However little KV there is, as long as the largest fits alone, every sequence ends in bounded time."""
    schedule = scheduler(slabs=5, floors=floors)
    for order, (tokens, _, replica) in enumerate(work):
        schedule.add(sequence(order, tokens, replica))
    steps = 0
    while len(schedule):
        assert run(schedule, rows)
        assert not schedule.stranded
        for one in list(schedule):
            if one.generated >= work[one.order][1]:
                schedule.remove(one)
        steps += 1
        assert steps < 3000


def test_the_same_inputs_give_the_same_batches() -> None:
    def story() -> list[dict[int, int]]:
        schedule = scheduler(slabs=3)
        for order in range(10):
            schedule.add(sequence(order, 7 * order + 1, 1 + order % 2))
        return [run(schedule, 40) for _ in range(60)]

    assert story() == story()


def test_invariants_are_noticed() -> None:
    harms: list[Callable[[Sequence, Sequence], None]] = [
        lambda one, other: one.blocks.clear(),
        lambda one, other: other.blocks.append(one.blocks[0]),
    ]
    for harm in harms:
        schedule = scheduler()
        pair = sequence(1, 20), sequence(2, 20)
        for one in pair:
            schedule.add(one)
        run(schedule)
        harm(*pair)
        with pytest.raises(InvariantError):
            schedule.check_invariants()


def test_batches_are_values() -> None:
    schedule = scheduler()
    one = sequence(1, 3)
    schedule.add(one)
    batch = schedule.next_batch(lambda _: 64)
    assert batch == Batch(1, [Chunk(one, 3)])


@pytest.mark.parametrize(
    ("windows", "groups"),
    [
        ((0, 0, 0), KvGroups(3, 1, 0, 0, (Place(0, 0), Place(0, 1), Place(0, 2)))),
        ((9, 9), KvGroups(2, 0, 1, 9, (Place(0, 0), Place(0, 1)))),
        ((9, 0, 9, 0), KvGroups(2, 1, 1, 9, (Place(1, 0), Place(0, 0), Place(1, 1), Place(0, 1)))),
        ((0, 0, 9), KvGroups(1, 2, 1, 9, (Place(0, 0), Place(1, 0), Place(2, 0)))),
    ],
)
def test_layers_share_blocks_with_their_like(windows: tuple[int, ...], groups: KvGroups) -> None:
    assert group(windows) == groups


def test_little_is_wasted_where_kinds_of_layers_do_not_divide() -> None:
    groups = group(tuple(512 if (number + 1) % 6 else 0 for number in range(26)))
    assert (groups.size, groups.whole, groups.sliding) == (4, 1, 6)
    assert len(set(groups.places)) == 26


def test_blocks_behind_the_window_go_back() -> None:
    schedule = scheduler()
    one = sequence(1, 100, windows=(0, 20))
    schedule.add(one)
    run(schedule, 1000)
    assert one.blocks.count(FREED) == 5  # tokens from number 81 on are seen
    assert [at for at, block in enumerate(one.blocks) if block == FREED] == [1, 3, 5, 7, 9]
    held = [block for block in one.blocks if block != FREED]
    while one.cached < 99 + 16:
        run(schedule)
    assert one.trimmed == 6
    assert one.blocks[:10] == [block if at % 2 == 0 else FREED for at, block in enumerate(one.blocks[:10])]
    assert set(held) - set(one.blocks)
    schedule.remove(one)
    assert schedule.next_batch(lambda _: 1) is None


def test_a_text_longer_than_the_memory_runs_through_a_window() -> None:
    """A prompt of 63 columns in 12 blocks, one chunk after the other."""
    schedule = scheduler(slabs=3)
    one = sequence(1, 1000, windows=(50,))
    schedule.add(one)
    assert one.groups.live(1000) == 5
    parts = []
    while one.missing > 1:
        parts.append(run(schedule, 1000)[1])
    assert sum(parts) == 1000
    assert parts[0] == 12 * 16
    assert not schedule.stranded


def test_a_window_that_does_not_fit_is_stranded() -> None:
    schedule = scheduler(slabs=1)
    schedule.add(sequence(1, 1000, windows=(500,)))
    assert run(schedule) == {1: 64}
    assert run(schedule) == {}
    assert len(schedule.stranded) == 1


def test_a_preempted_window_begins_anew() -> None:
    schedule = scheduler()
    one = sequence(1, 100, windows=(0, 20))
    schedule.add(one)
    run(schedule, 1000)
    schedule.preempt(one)
    schedule.check_invariants()
    assert run(schedule, 60) == {1: 60}
    assert one.blocks.count(FREED) == 2
