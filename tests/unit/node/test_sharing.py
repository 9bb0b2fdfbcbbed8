"""Digests of tensors: learned from DRAM while nothing is loaded, and kept for the next agent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from blake3 import blake3

from serverless_llm.loader import manifest
from serverless_llm.loader.manifest import Manifest
from serverless_llm.loader.sharing import Part, orders
from serverless_llm.node import sharing
from serverless_llm.node.sharing import TENSORS, Sharing
from tests.unit.loader.checkpoints import Node, random, write


@pytest.fixture
def node() -> Iterator[Node]:
    node = Node(12)
    yield node
    node.close()


@pytest.fixture(autouse=True)
def portions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many to a checkpoint."""
    monkeypatch.setattr(sharing, "PORTION", 1 << 20)


@pytest.fixture
def source(tmp_path: Path) -> Manifest:
    none = {"empty": torch.zeros(0, 2)}
    return manifest.build(write(tmp_path / "a", random(4.5) | none, random(0.1, 1)))


def make(node: Node, folder: Path, idle: Callable[[], bool] = lambda: True) -> Sharing:
    return Sharing(node.pool, node.pipeline, folder, idle, pause=0.0)


def expected(source: Manifest) -> list[bytes]:
    found = []
    for file in source.files:
        content = file.path.read_bytes()
        for entry in file.header.tensors:
            head = f"{entry.dtype} {list(entry.shape)}\n".encode()
            found.append(blake3(head + content[entry.start : entry.end]).digest())
    return found


def kept(folder: Path, source: Manifest) -> object:
    path = folder / f"{source.checkpoint}.digests"
    return TENSORS.decode(source, path.read_bytes()) if path.exists() else None


async def learn(one: Sharing) -> None:
    one.learn()
    if one._task is not None:
        await one._task


def test_what_is_whole_is_learned_and_known_to_the_next_agent(node: Node, tmp_path: Path, source: Manifest) -> None:
    folder = tmp_path / "n0.tensors"

    async def tell() -> None:
        first = make(node, folder)
        await first.meet(source)
        await learn(first)
        assert kept(folder, source) is None  # nothing is in DRAM
        node.fetch(source)
        await learn(first)
        assert kept(folder, source) == expected(source)
        assert first.own_bytes() == {source.checkpoint: source.file_bytes}
        first.close()

        second = make(node, folder)
        await second.meet(source)
        other = manifest.build(write(tmp_path / "b", random(4.5)))
        await second.meet(other)
        assert second.loan(other) is None
        node.fetch(other, 2)
        await learn(second)
        assert second.own_bytes() == {
            source.checkpoint: source.file_bytes - source.files[0].size + source.files[0].data_offset,
            other.checkpoint: other.files[0].data_offset,
        }
        assert second.loan(other) is None  # all of it is there
        node.pipeline.release(other.checkpoint, 2)
        node.pipeline.forget(other.checkpoint)
        loan = second.loan(other)
        assert loan is not None
        assert second.lent_bytes() == {other.checkpoint: sum(piece.length for piece in loan.spared)}
        node.fetch(other, 3)
        assert second.lent_bytes() == {}
        node.pipeline.release(other.checkpoint, 3)
        node.pipeline.forget(other.checkpoint)
        assert second.lent_bytes().keys() == {other.checkpoint}
        second.forget(source.checkpoint)
        assert second.loan(other) is None
        assert second.lent_bytes() == {}
        assert second.own_bytes() == {other.checkpoint: other.file_bytes}
        second.close()

    asyncio.run(tell())


def test_small_tensors_are_not_worth_it(node: Node, tmp_path: Path) -> None:
    small = manifest.build(write(tmp_path / "s", random(1.5)))

    async def tell() -> None:
        one = make(node, tmp_path / "n0.tensors")
        await one.meet(small)
        node.fetch(small)
        await learn(one)
        assert kept(tmp_path / "n0.tensors", small) is None
        one.close()

    asyncio.run(tell())


@pytest.mark.parametrize("returns", [True, False])
def test_loads_in_between_cost_a_portion_or_all(node: Node, tmp_path: Path, source: Manifest, returns: bool) -> None:
    """Another checkpoint takes all slots while a portion is hashed, with or without this one's return."""
    other = manifest.build(write(tmp_path / "other", random(11)))
    looks = 0

    def idle() -> bool:
        nonlocal looks
        looks += 1
        return True

    async def tell() -> None:
        one = make(node, tmp_path / "n0.tensors", idle)
        plain = one._hash
        begun = 0

        def hash(*order: object) -> object:
            nonlocal begun
            begun += 1
            found = plain(*order)  # type: ignore[arg-type]
            if begun == 2:
                node.fetch(other, 2)
                node.pipeline.release(other.checkpoint, 2)
                if returns:
                    node.fetch(source, 3)
                    node.pipeline.release(source.checkpoint, 3)
            return found

        one._hash = hash  # type: ignore[method-assign,assignment]
        await one.meet(source)
        node.fetch(source)
        node.pipeline.release(source.checkpoint, 1)
        await learn(one)
        assert begun == (6 if returns else 2)
        assert kept(tmp_path / "n0.tensors", source) == (expected(source) if returns else None)
        assert looks
        one.close()

    asyncio.run(tell())


def test_it_waits_while_something_is_loaded(node: Node, tmp_path: Path, source: Manifest) -> None:
    busy = True

    async def tell() -> None:
        nonlocal busy
        one = make(node, tmp_path / "n0.tensors", lambda: not busy)
        await one.meet(source)
        node.fetch(source)
        one.learn()
        for _ in range(9):
            await asyncio.sleep(0)
        assert kept(tmp_path / "n0.tensors", source) is None
        busy = False
        await learn(one)
        assert kept(tmp_path / "n0.tensors", source) == expected(source)
        one.close()

    asyncio.run(tell())


def test_what_is_closed_reads_no_more(node: Node, tmp_path: Path, source: Manifest) -> None:
    async def tell() -> None:
        one = make(node, tmp_path / "n0.tensors")
        await one.meet(source)
        node.fetch(source)
        one.learn()
        await asyncio.sleep(0)
        one.close()
        assert one._hash([next(iter(_parts(source)))], [0], None) == (None, [])
        assert one._task is not None
        with pytest.raises(asyncio.CancelledError):
            await one._task

    asyncio.run(tell())


def _parts(source: Manifest) -> Iterator[Part]:
    for order in orders(source.files, 1 << 20, 1 << 20):
        yield from order
