"""The plan of a device's memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from serverless_llm.engine.blocks import SLAB_STEP, Memory, Range, slab_size
from serverless_llm.engine.config import aligned
from serverless_llm.errors import InvariantError

MIB = 1 << 20


@pytest.mark.parametrize(
    ("budget", "slab"), [(MIB, SLAB_STEP), (64 * MIB, MIB // 4), (1 << 30, 4 * MIB), (80 << 30, 32 * MIB)]
)
def test_slab_size(budget: int, slab: int) -> None:
    assert slab_size(budget) == slab


def test_weights_come_from_below_and_slabs_from_above() -> None:
    memory = Memory(4 * MIB)
    assert memory.place(1, [1000, 5000], 0, 0, 8192, 1024) == [0, 1024]
    assert memory.allocate(1) == 4 * MIB - memory.slab
    assert memory.fresh == [Range(4 * MIB - memory.slab, 8192)]
    memory.check_invariants()


def test_what_is_vacant_ends_where_others_begin() -> None:
    memory = Memory(67 * MIB)  # no whole number of slabs: the lowest bytes belong to none
    for replica in (1, 2):
        memory.place(replica, [1000], 0, 0, 8192, 1024)
    memory.allocate(2)
    memory.remove(1)
    assert memory.vacant() == [Range(0, 1024), Range(2048, memory.budget - 2048 - memory.slab)]


def test_viewed_weights_only_count() -> None:
    memory = Memory(4 * MIB)
    assert memory.place(1, [], 3 * MIB, 0, 65536, 65536) == []
    assert memory.free_bytes == MIB
    assert [memory.allocate(1) is not None for _ in range(17)] == [True] * 16 + [False]


def test_blocks_begin_on_multiples_of_a_layer() -> None:
    memory = Memory(4 * MIB)
    memory.place(1, [], 0, 0, 9000, 3000)
    blocks = [memory.allocate(1) for _ in range(20)]
    assert all(block is not None and block % 3000 == 0 for block in blocks)
    memory.check_invariants()


def test_a_block_larger_than_a_slab() -> None:
    memory = Memory(4 * MIB)
    memory.place(1, [], 0, 0, 3 * SLAB_STEP, SLAB_STEP)
    blocks = [memory.allocate(1) for _ in range(memory.capacity(1))]
    assert len(blocks) == 21
    assert None not in blocks
    memory.check_invariants()


def test_a_floor_is_kept_from_others_and_costs_no_bytes_before_use() -> None:
    memory = Memory(MIB)
    memory.place(1, [], 0, MIB // 2, SLAB_STEP, SLAB_STEP)
    memory.place(2, [], 0, 0, SLAB_STEP, SLAB_STEP)
    assert memory.used() == 0
    assert [memory.allocate(2) is not None for _ in range(9)] == [True] * 8 + [False]
    assert memory.capacity(2) == memory.capacity(1) - 8 == 8
    assert [memory.allocate(1) is not None for _ in range(9)] == [True] * 8 + [False]
    assert memory.above_floor(2)
    assert not memory.above_floor(1)


def test_place_refuses_what_does_not_fit() -> None:
    memory = Memory(MIB)
    assert memory.place(1, [MIB // 2], 0, MIB // 4, 4096, 4096) == [0]
    assert memory.place(2, [MIB // 2], 0, 0, 4096, 4096) is None
    assert memory.place(2, [], MIB // 4 + 1, 0, 4096, 4096) is None
    assert memory.place(2, [], MIB // 4, 0, 4096, 4096) == []
    memory.check_invariants()


def test_a_gap_between_weights_is_used_again() -> None:
    memory = Memory(4 * MIB)
    for replica in (1, 2):
        memory.place(replica, [MIB], 0, 0, 4096, 4096)
    memory.remove(1)
    assert memory.vacated
    assert memory.vacant() == [Range(0, MIB), Range(2 * MIB, memory.budget - 2 * MIB)]
    assert memory.place(3, [MIB // 2, MIB], 0, 0, 4096, 4096) == [0, 2 * MIB]


def test_an_extent_stays_until_the_last_who_refers_to_it_has_left() -> None:
    memory = Memory(4 * MIB)
    assert memory.place(1, [MIB, MIB // 2], 0, 0, 4096, 4096) == [0, MIB]
    first, second = memory.extents(1)
    assert memory.place(2, [MIB], MIB // 4, 0, 4096, 4096, [second]) == [MIB + MIB // 2]
    assert memory.extents(2) == [2, second]
    assert memory.place(3, [], 0, 0, 4096, 4096, [2, second]) == []
    assert memory.free_bytes == memory.budget - 2 * MIB - MIB // 2 - MIB // 4
    memory.remove(1)
    assert memory.vacant() == [Range(0, MIB), Range(2 * MIB + MIB // 2, memory.budget - 2 * MIB - MIB // 2)]
    assert _noted(memory)
    memory.remove(2)
    assert not _noted(memory)
    assert memory.free_bytes == memory.budget - MIB - MIB // 2
    memory.check_invariants()
    assert memory.place(4, [MIB], 0, 0, 4096, 4096) == [0]
    assert memory.extents(4) == [first + 3]
    memory.remove(3)
    assert _noted(memory)
    assert memory.free_bytes == memory.budget - MIB


def _noted(memory: Memory) -> bool:
    vacated, memory.vacated = memory.vacated, False
    return vacated


def test_what_is_shared_needs_no_room() -> None:
    memory = Memory(MIB)
    memory.place(1, [MIB // 2], 0, 0, 4096, 4096)
    assert memory.place(2, [MIB // 2 + 256], 0, 0, 4096, 4096, memory.extents(1)) is None
    assert memory.place(2, [MIB // 2], 0, 0, 4096, 4096, memory.extents(1)) == [MIB // 2]
    memory.remove(1)
    assert memory.free_bytes == 0


def test_slabs_in_the_way_of_weights() -> None:
    memory = Memory(MIB)
    memory.place(1, [], 0, 0, SLAB_STEP, SLAB_STEP)
    blocks = [memory.allocate(1) for _ in range(16)]
    memory.free(1, [block for block in blocks[:-1] if block is not None])
    assert memory.place(2, [MIB // 2], 0, 0, 4096, 4096) == [SLAB_STEP]
    assert memory.place(3, [MIB - MIB // 2 - SLAB_STEP + 1], 0, 0, 4096, 4096) is None


def test_slabs_keep_off_weights_in_the_middle() -> None:
    memory = Memory(MIB)
    memory.place(1, [MIB // 2], 0, 0, 4096, 4096)
    memory.place(2, [MIB // 4], 0, 0, 4096, 4096)
    memory.remove(1)
    memory.place(3, [], 0, 0, SLAB_STEP, SLAB_STEP)
    blocks = []
    while (block := memory.allocate(3)) is not None:
        blocks.append(block)
        memory.check_invariants()
    assert len(blocks) == 12
    memory.free(3, blocks)
    memory.remove(2)
    assert memory.available(3) == 16


def test_removing_a_replica_that_holds_blocks_is_a_bug() -> None:
    memory = Memory(MIB)
    memory.place(1, [], 0, 0, 4096, 4096)
    memory.allocate(1)
    with pytest.raises(InvariantError):
        memory.remove(1)


def broken() -> Memory:
    memory = Memory(MIB)
    memory.place(1, [1000], 0, 0, 4096, 4096)
    memory.allocate(1)
    memory.check_invariants()
    return memory


def test_invariants_are_noticed() -> None:
    harms: list[Callable[[Memory], object]] = [
        lambda memory: memory._extents.update({0: Range(0, MIB)}),
        lambda memory: memory._extents.update({0: Range(MIB, 100)}),
        lambda memory: memory._extents.update({0: Range(-10, 100)}),
        lambda memory: memory._extents.clear(),
        lambda memory: memory._holders.update([0]),
        lambda memory: memory._referred[1].clear(),
        lambda memory: memory._pinned.update({1: MIB}),
        lambda memory: memory._slabs.__setitem__(0, None),
        lambda memory: memory._pools[1].of.clear(),
        lambda memory: memory._pools[1].spans[0].free.pop(),
        lambda memory: memory._pools[1].spans[0].free.__setitem__(0, 7),
        lambda memory: memory._pools[1].spans[0].free.__setitem__(-1, MIB),
    ]
    for harm in harms:
        memory = broken()
        harm(memory)
        with pytest.raises(InvariantError):
            memory.check_invariants()


class Use(RuleBasedStateMachine):
    """Any order of placing, allocating, freeing and removing keeps the plan sound and the floors honoured."""

    @initialize(budget=st.sampled_from([MIB, 3 * MIB + SLAB_STEP, 20 * MIB]))
    def begin(self, budget: int) -> None:
        self.memory = Memory(budget)
        self.blocks: dict[int, list[int]] = {}
        self.floors: dict[int, int] = {}
        self.pinned: dict[int, int] = {}
        self.referred: dict[int, dict[int, int]] = {}  # replica -> extent -> bytes
        self.count = 0

    @rule(
        extents=st.lists(st.integers(1, MIB // 2), max_size=4),
        pinned=st.integers(0, MIB),
        floor=st.integers(0, MIB),
        layer=st.sampled_from([512, 3000, 40000]),
        layers=st.integers(1, 6),
        data=st.data(),
    )
    def place(self, extents: list[int], pinned: int, floor: int, layer: int, layers: int, data: st.DataObject) -> None:
        self.count += 1
        there = {number: size for held in self.referred.values() for number, size in held.items()}
        shared = data.draw(st.lists(st.sampled_from(sorted(there)), unique=True)) if there else []
        if self.memory.place(self.count, extents, pinned, floor, layer * layers, layer, shared) is not None:
            self.blocks[self.count], self.pinned[self.count] = [], pinned
            sizes = [*map(aligned, extents), *(there[number] for number in shared)]
            self.referred[self.count] = dict(zip(self.memory.extents(self.count), sizes, strict=True))

    @precondition(lambda self: self.blocks)
    @rule(data=st.data(), count=st.integers(1, 12))
    def allocate(self, data: st.DataObject, count: int) -> None:
        replica = data.draw(st.sampled_from(sorted(self.blocks)))
        available = self.memory.available(replica)
        for _ in range(count):
            block = self.memory.allocate(replica)
            if block is None:
                break
            self.blocks[replica].append(block)
            available -= 1
            assert self.memory.available(replica) >= available or available < 0

    @precondition(lambda self: self.blocks)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        replica = data.draw(st.sampled_from(sorted(self.blocks)))
        gone = data.draw(st.sets(st.sampled_from(self.blocks[replica]))) if self.blocks[replica] else set()
        self.memory.free(replica, sorted(gone))
        self.blocks[replica] = [block for block in self.blocks[replica] if block not in gone]

    @precondition(lambda self: self.blocks)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        replica = data.draw(st.sampled_from(sorted(self.blocks)))
        self.memory.free(replica, self.blocks.pop(replica))
        self.memory.remove(replica)
        del self.pinned[replica], self.referred[replica]

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "memory"):
            self.memory.check_invariants()
            there = {number: size for held in self.referred.values() for number, size in held.items()}
            stored = sum(there.values()) + sum(self.pinned.values())
            assert self.memory.kv_free() == max(0, self.memory.budget - stored - self.memory.used())
            if not any(self.blocks.values()):
                assert self.memory.used() == 0


Use.TestCase.settings = settings(max_examples=30, stateful_step_count=30)
TestUse = pytest.mark.slow(Use.TestCase)
