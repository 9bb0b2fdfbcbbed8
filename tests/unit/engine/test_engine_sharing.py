"""Replicas that have tensors in common on one device."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from serverless_llm.domain import FinishReason
from serverless_llm.engine.config import ModelConfig
from serverless_llm.engine.engine import Engine
from serverless_llm.engine.extents import Extent, Placement, lent
from serverless_llm.engine.layers import Tensors
from tests.unit.engine.tiny import config_json, drain, entries_of, fill, prompt, serve, start, tensors_of

MIB = 1 << 20
CONFIG = ModelConfig.parse(config_json())
BASE = tensors_of(CONFIG)
CHANGED = "model.layers.1.self_attn.v_proj.weight"  # one of three that lie side by side
TUNED = BASE | {CHANGED: -BASE[CHANGED]}
SIDE = {CHANGED.replace("v_proj", part) for part in ("q_proj", "k_proj", "v_proj")}
SAME = {name: name for name in BASE if name != CHANGED}


def engine(budget: int = 16 * MIB) -> Engine:
    made = Engine(budget=budget, weights="copy")
    serve(made, CONFIG, BASE)
    return made


def serve_beside(made: Engine, tensors: Tensors, twins: Mapping[int, Mapping[str, str]], replica: int = 2) -> set[str]:
    """Places and activates one; the tensors that it brought."""
    planned = made.place(replica, CONFIG, entries_of(tensors), 0, twins)
    assert planned is not None
    for dest in planned:
        made.arena[dest.offset : dest.offset + dest.stop] = tensors[dest.tensor].contiguous().view(-1).view(torch.uint8)
    made.activate(replica)
    return {dest.tensor for dest in planned}


def says(made: Engine, replica: int) -> tuple[list[int], FinishReason | None]:
    made.add(start(replica, prompt(10), replica=replica))
    return drain(made)[replica]


def alone(tensors: dict[str, torch.Tensor]) -> tuple[list[int], FinishReason | None]:
    made = Engine(budget=16 * MIB, weights="copy")
    serve(made, CONFIG, tensors)
    return says(made, 1)


def test_a_second_replica_brings_the_buffers_that_are_its_own() -> None:
    made = engine()
    before = made.kv_free
    brought = serve_beside(made, TUNED, {1: SAME})
    assert brought == SIDE
    own = sum(TUNED[name].nbytes for name in brought)
    assert made.kv_free == before - own
    shared = made.shared(2)
    assert {lender for *_, lender in shared} == {1}
    assert sum(size for _, size, _ in shared) == CONFIG.weight_bytes() - own
    assert len({number for number, *_ in shared}) == len(shared)
    assert made.shared(1) == []
    assert (says(made, 1), says(made, 2)) == (alone(BASE), alone(TUNED))


def test_who_leaves_first_takes_nothing_from_the_other() -> None:
    expected = {1: alone(BASE), 2: alone(TUNED)}
    for gone, left in ((1, 2), (2, 1)):
        made = engine()
        serve_beside(made, TUNED, {1: SAME})
        made.drop(gone)
        assert made.kv_free == made.arena.numel() - CONFIG.weight_bytes()
        serve(made, CONFIG, tensors_of(CONFIG, seed=9), replica=3)  # where the other was
        assert says(made, left) == expected[left]
        made.drop(left)
        made.drop(3)
        assert made.kv_free == made.arena.numel()


def test_what_was_borrowed_is_lent_on() -> None:
    made = engine()
    serve_beside(made, TUNED, {1: SAME})
    made.drop(1)
    assert serve_beside(made, BASE, {2: SAME}, replica=3) == SIDE
    assert {number for number, *_ in made.shared(3)} == {number for number, *_ in made.shared(2)}
    made.drop(2)
    assert says(made, 3) == alone(BASE)


def test_a_replica_that_brings_nothing() -> None:
    made = engine()
    assert serve_beside(made, BASE, {1: {name: name for name in BASE}}) == set()
    made.drop(1)
    assert says(made, 2) == alone(BASE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_is_shared_with_who_is_not_there_or_serves_other_numbers(dtype: str) -> None:
    made = Engine(budget=16 * MIB, weights="copy")
    served = ModelConfig.parse(config_json(), dtype)
    assert (made.place(1, served, entries_of(BASE), 0) is None) == (dtype == "bfloat16")
    if dtype == "bfloat16":
        fill(made, BASE)
        made.activate(1, BASE)
    assert serve_beside(made, TUNED, {1: SAME, 7: SAME}) == set(TUNED)
    assert made.shared(2) == []


def test_what_is_converted_is_shared_and_not_written_again() -> None:
    served = ModelConfig.parse(config_json(), "bfloat16")
    made = Engine(budget=16 * MIB, weights="copy")
    for replica, tensors in ((1, BASE), (2, TUNED)):
        assert made.place(replica, served, entries_of(tensors), 0, {1: SAME}) is None
        assert made.targets(replica).keys() == (tensors.keys() if replica == 1 else SIDE)
        fill(made, tensors, replica)
        assert not made.activate(replica, tensors)
    expected = Engine(budget=16 * MIB, weights="copy")
    serve(expected, served, TUNED, replica=2)
    assert says(made, 2) == says(expected, 2)
    assert made.shared(2)


def test_an_extent_takes_the_place_of_one_buffer() -> None:
    """Two equal tensors of one model are two buffers, and stay so."""
    extents: dict[tuple[str, ...], Extent] = {("a",): Extent(0, 0, 256), ("b", "c"): Extent(3, 512, 256)}
    there = {1: Placement(CONFIG, {}, extents)}
    twins = {1: {"x": "a", "y": "a", "b": "b", "c": "c", "d": "c"}}
    buffers = [("x",), ("y",), ("b", "c"), ("b", "d"), ("c", "b"), ("b",), ("z",)]
    found = lent("float32", buffers, twins, there)
    assert found == {("x",): Extent(0, 0, 256, 1), ("b", "c"): Extent(3, 512, 256, 1)}
    assert lent("bfloat16", buffers, twins, there) == {}


def test_the_first_lender_that_has_a_buffer_lends_it() -> None:
    extents: dict[tuple[str, ...], Extent] = {("a",): Extent(0, 0, 256), ("b",): Extent(1, 256, 256)}
    there = {number: Placement(CONFIG, {}, extents) for number in (1, 2)}
    found = lent("float32", [("a",), ("b",)], {3: {"a": "a"}, 2: {"a": "a"}, 1: {"a": "a", "b": "b"}}, there)
    assert found == {("a",): Extent(0, 0, 256, 2), ("b",): Extent(1, 256, 256, 1)}
