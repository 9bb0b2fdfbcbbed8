"""Tensors in another type than their files: written, compared where they are, converted again, or told of."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from serverless_llm.loader import digest, manifest
from serverless_llm.loader.converted import Conversion
from serverless_llm.loader.digest import BLOCK, Due, Key
from serverless_llm.loader.plan import Landed
from serverless_llm.loader.upload import Uploader
from tests.unit.loader.checkpoints import Node, random, raw, same, write

Targets = dict[str, torch.Tensor]
WANTED = {"0.0": torch.bfloat16, "0.2": torch.float32}  # "0.1" is a view of the pool
FIRST = 1000  # a number of the first tensor, in the file's first block
LAST = 3  # the block in which the last tensor ends


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    node = Node()
    yield node
    node.close()


def converted(
    node: Node,
    directory: Path,
    targets: Targets,
    harm: Callable[[Targets, list[Landed]], None],
    due: Due | None = digest.every,
    rate: float = 0.0,
) -> Conversion:
    """The conversion of what was mapped to `targets`, when it is closed; `harm` comes when all is written."""
    source = manifest.build(directory)
    told = node.fetch(source)
    node.pipeline.release(source.checkpoint, 1)
    node.tier.forget(source.checkpoint)  # its bytes are harmed
    uploader = Uploader(node.pool.fd, node.pool.capacity, rate)
    news = queue.SimpleQueue[int]()
    mapping = uploader.mapping(source.checkpoint, [file.size for file in source.files], lambda *_: news.put(0))
    mapping.add(told.spans)
    while mapping.done < mapping.total:
        news.get(timeout=30)
    stored = sum(entry.nbytes for name, (_, entry) in source.tensors().items() if name in targets)

    def progress(done: int, total: int) -> None:
        """In the uploader's thread, which compares nothing meanwhile."""
        if done == stored and total > stored:
            harm(targets, told.spans)
        if done == total:
            news.put(1)

    conversion = uploader.conversion(mapping, targets, progress, due)
    while not news.get(timeout=30):
        pass
    assert not mapping.close()  # the conversion refers to it
    conversion.close()
    conversion.close()
    assert mapping.close()
    uploader.close()
    return conversion


def wanted(content: dict[str, torch.Tensor]) -> Targets:
    """Places for what is wanted, which hold nothing that is right."""
    return {name: torch.full_like(content[name], torch.nan, dtype=dtype) for name, dtype in WANTED.items()}


def run(
    tmp_path: Path,
    node: Node,
    harm: Callable[[Targets, list[Landed]], None],
    due: Due | None = digest.every,
    rate: float = 0.0,
) -> Conversion:
    """Of three tensors two are wanted; where nothing differs for good they are right in the end."""
    content = random(3.3)
    targets = wanted(content)
    conversion = converted(node, write(tmp_path / "m", content), targets, harm, due, rate)
    if conversion.held and not conversion.held.differing:
        assert all(same(targets[name], content[name].to(dtype)) for name, dtype in WANTED.items())
    return conversion


def untouched(targets: Targets, spans: list[Landed]) -> None:
    pass


def flipped(targets: Targets, spans: list[Landed]) -> None:
    targets["0.0"].view(-1).view(torch.uint8)[FIRST] ^= 1


@pytest.mark.parametrize("rate", [0.0, 2e7], ids=["blocks", "less-than-blocks"])
def test_what_was_converted_is_compared_once(tmp_path: Path, node: Node, rate: float) -> None:
    conversion = run(tmp_path, node, untouched, rate=rate)
    assert conversion.held
    content = random(3.3)
    assert conversion.held.nbytes == sum(content[name].numel() * dtype.itemsize for name, dtype in WANTED.items())
    assert conversion.done == conversion.held.nbytes + sum(content[name].nbytes for name in WANTED)
    assert (conversion.held.mended, conversion.held.differing, conversion.held.noted) == (set(), [], {})


def test_what_is_not_to_be_compared_is_not(tmp_path: Path, node: Node) -> None:
    content = random(3.3)
    targets = wanted(content)
    conversion = converted(node, write(tmp_path / "m", content), targets, flipped, None)
    assert conversion.held is None
    assert all(same(targets[name], content[name].to(dtype)) for name, dtype in WANTED.items())


@pytest.mark.parametrize(("name", "place"), [("0.0", 0), ("0.0", FIRST), ("0.0", -1), ("0.2", -1)])
def test_a_flipped_bit_is_converted_again(tmp_path: Path, node: Node, name: str, place: int) -> None:
    def harm(targets: Targets, spans: list[Landed]) -> None:
        targets[name].view(-1).view(torch.uint8)[place] ^= 1

    held = run(tmp_path, node, harm).held
    assert held
    assert len(held.mended) == 1
    assert held.differing == []


def test_where_memory_fails_too_the_part_is_told_of(tmp_path: Path, node: Node) -> None:
    def harm(targets: Targets, spans: list[Landed]) -> None:
        flipped(targets, spans)
        first = next(span for span in spans if span.offset == 0)
        node.pool.range(first.pool_offset, BLOCK)[BLOCK // 2 + 3] ^= 1  # of a number's exponent

    held = run(tmp_path, node, harm).held
    assert held
    ((file, offset, length),) = (part[:3] for part in held.differing)
    assert (file, length) == (0, BLOCK)
    assert 0 < offset < BLOCK // 2
    assert held.mended == set()


def test_a_sample_is_compared_and_no_more(tmp_path: Path, node: Node) -> None:
    first = run(tmp_path, node, flipped, due=lambda key: key == Key(0, 0)).held
    assert first
    assert first.mended == {Key(0, 0)}
    assert first.nbytes == BLOCK // 2  # as bfloat16
    other = run(tmp_path, node, untouched, due=lambda key: key == Key(0, LAST)).held
    assert other
    assert 0 < other.nbytes < BLOCK
    missed = run(tmp_path, node, untouched, due=lambda key: False).held
    assert missed
    assert missed.nbytes == 0


def test_numbers_that_lie_misaligned_are_converted(tmp_path: Path, node: Node) -> None:
    numbers = torch.arange(BLOCK).to(torch.float16)  # two blocks
    data = bytes([7]) + numbers.view(torch.uint8).numpy().tobytes()
    fields = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "odd": {"dtype": "F16", "shape": [4, BLOCK // 4], "data_offsets": [1, len(data)]},
    }
    directory = write(tmp_path / "m", random(0.1))
    (directory / manifest.SINGLE).write_bytes(raw(fields, data))
    targets = {"odd": torch.zeros(4, BLOCK // 4)}

    def harm(targets: Targets, spans: list[Landed]) -> None:
        targets["odd"][2, 5] = 9

    held = converted(node, directory, targets, harm).held
    assert held
    assert len(held.mended) == 1
    assert same(targets["odd"], numbers.float().view(4, -1))
