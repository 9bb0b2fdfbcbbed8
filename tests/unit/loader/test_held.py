"""Copies in a device's arena that are not what was sent there: found, copied again, or told of."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from serverless_llm.loader import digest, manifest
from serverless_llm.loader.dest import Dest
from serverless_llm.loader.digest import BLOCK, Due, Key
from serverless_llm.loader.plan import Landed
from serverless_llm.loader.tasks import Upload
from serverless_llm.loader.upload import Uploader
from tests.unit.loader.checkpoints import Node, random, write

GAP = 64  # bytes between the halves of tensors in the arena


class Copied(NamedTuple):
    """`differing` as of `Held`; `arena`: as it was in the end; `moved`: bytes, those of comparisons included."""

    upload: Upload
    arena: torch.Tensor
    spans: list[Landed]
    moved: int


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    node = Node()
    yield node
    node.close()


def copied(
    tmp_path: Path,
    node: Node,
    harm: Callable[[torch.Tensor, list[Landed]], None],
    due: Due | None = digest.every,
    ring: bool = False,
    rate: float = 0.0,
) -> Copied:
    """Three tensors, the second of which nobody wants, the others in halves; `harm` comes when all are copied."""
    source = manifest.build(write(tmp_path / "m", random(3.3)))
    told = node.fetch(source)
    node.pipeline.release(source.checkpoint, 1)
    node.tier.forget(source.checkpoint)  # its bytes are harmed
    uploader = Uploader(node.pool.fd, node.pool.capacity, rate)
    wanted, offset = [], GAP
    for name in ("0.0", "0.2"):
        nbytes = next(one.nbytes for one in source.files[0].header.tensors if one.name == name)
        for start, stop in ((0, nbytes // 2), (nbytes // 2, nbytes)):
            wanted.append(Dest(name, start, stop, offset))
            offset += stop - start + GAP
    total = sum(dest.stop - dest.start for dest in wanted)
    arena, news = torch.zeros(offset, dtype=torch.uint8), queue.SimpleQueue[int]()

    def progress(done: int, whole: int) -> None:
        """In the uploader's thread, which compares nothing meanwhile."""
        if done == total and whole > total:
            harm(arena, told.spans)
        if done == whole:
            news.put(done)

    sizes = [file.size for file in source.files]
    upload = uploader.upload(sizes, progress, (lambda nbytes: None) if ring else None, due)
    upload.add(told.spans)
    assert upload.headers()
    upload.start(wanted, arena)
    moved = news.get(timeout=30)
    upload.close()
    uploader.close()
    for dest in wanted if upload.held and not upload.held.differing else ():
        start = next(one.start for one in source.files[0].header.tensors if one.name == dest.tensor) + dest.start
        raw = source.files[0].path.read_bytes()[start : start + dest.stop - dest.start]
        assert arena[dest.offset :][: len(raw)].numpy().tobytes() == raw
    return Copied(upload, arena, told.spans, moved)


def untouched(arena: torch.Tensor, spans: list[Landed]) -> None:
    pass


def flipped(arena: torch.Tensor, spans: list[Landed]) -> None:
    """One bit of the first tensor's, in the file's first block."""
    arena[GAP + 1000] ^= 1


@pytest.mark.parametrize("rate", [0.0, 1e9, 2e7], ids=["at-once", "pieces", "less-than-blocks"])
def test_what_arrived_whole_is_compared_once(tmp_path: Path, node: Node, rate: float) -> None:
    done = copied(tmp_path, node, untouched, rate=rate)
    assert done.upload.held
    assert done.upload.held.nbytes * 2 == done.moved
    assert (done.upload.held.mended, done.upload.held.differing, done.upload.held.noted) == (set(), [], {})


def test_what_is_not_to_be_compared_is_not(tmp_path: Path, node: Node) -> None:
    assert copied(tmp_path, node, flipped, due=None).upload.held is None


@pytest.mark.parametrize("place", [GAP, GAP + 1000, -GAP - 1], ids=["first", "within", "last"])
def test_a_flipped_bit_is_copied_again(tmp_path: Path, node: Node, place: int) -> None:
    def harm(arena: torch.Tensor, spans: list[Landed]) -> None:
        arena[place] ^= 1

    held = copied(tmp_path, node, harm).upload.held
    assert held
    assert len(held.mended) == 1
    assert held.differing == []


def test_what_lies_between_copies_is_not_compared(tmp_path: Path, node: Node) -> None:
    def harm(arena: torch.Tensor, spans: list[Landed]) -> None:
        arena[GAP - 1] ^= 1
        arena[-GAP] ^= 1

    held = copied(tmp_path, node, harm).upload.held
    assert held
    assert (held.mended, held.differing) == (set(), [])


def test_where_memory_fails_too_the_block_is_told_of(tmp_path: Path, node: Node) -> None:
    def harm(arena: torch.Tensor, spans: list[Landed]) -> None:
        flipped(arena, spans)
        first = next(span for span in spans if span.offset == 0)
        node.pool.range(first.pool_offset, BLOCK)[BLOCK // 2] ^= 1

    held = copied(tmp_path, node, harm).upload.held
    assert held
    assert [part[:3] for part in held.differing] == [(0, 0, BLOCK)]
    assert held.mended == set()


def test_what_passed_through_a_ring_cannot_be_copied_again(tmp_path: Path, node: Node) -> None:
    held = copied(tmp_path, node, flipped, ring=True).upload.held
    assert held
    assert [digest.key_of(part) for part in held.differing] == [Key(0, 0)]


def test_a_sample_is_compared_and_no_more(tmp_path: Path, node: Node) -> None:
    first = copied(tmp_path, node, flipped, due=lambda key: key == Key(0, 0))
    assert first.upload.held
    assert first.upload.held.mended == {Key(0, 0)}
    other = copied(tmp_path, node, untouched, due=lambda key: key == Key(0, 3))
    assert other.upload.held
    assert other.upload.held.nbytes < first.upload.held.nbytes < BLOCK
    missed = copied(tmp_path, node, untouched, due=lambda key: False).upload.held
    assert missed
    assert missed.nbytes == 0
