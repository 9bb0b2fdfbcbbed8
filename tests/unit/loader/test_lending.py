"""A checkpoint that has tensors in common with one in DRAM, from its files to views and copies."""

from __future__ import annotations

import os
import queue
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from serverless_llm.errors import CapacityError
from serverless_llm.loader import manifest, sharing
from serverless_llm.loader.dest import Dest
from serverless_llm.loader.manifest import Manifest
from serverless_llm.loader.sharing import Known
from serverless_llm.loader.upload import Uploader
from tests.unit.loader.checkpoints import Device, Node, Told, random, same, write


def known(source: Manifest) -> Known:
    digests = []
    for number, entry in sharing.tensors(source.files):
        content = source.files[number].path.read_bytes()[entry.start : entry.end]
        digests.append(blake2b(sharing.head(entry) + content).digest())
    return Known(source.checkpoint, source.files, digests)


@pytest.fixture
def node() -> Iterator[Node]:
    node = Node(12)
    yield node
    node.close()


@pytest.fixture
def uploader(node: Node) -> Iterator[Uploader]:
    uploader = Uploader(node.pool.fd, node.pool.capacity)
    yield uploader
    uploader.close()


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Manifest, Manifest]:
    """4.5 MB each, of which 4 MB are equal: in two files there, in another order, misaligned, in one file here."""
    common, own = random(4, 1, count=4), random(0.5, 2)
    lender = manifest.build(write(tmp_path / "a", common, random(0.5, 3)))
    scalar = {"0": torch.zeros(3, dtype=torch.uint8)}
    return lender, manifest.build(write(tmp_path / "b", own | dict(reversed(common.items())) | scalar))


def borrow(node: Node, lender: Manifest, borrower: Manifest, told: Told, holder: int = 2) -> Told:
    node.fetch(lender)
    node.pipeline.release(lender.checkpoint, 1)
    loan = node.pipeline.lending.find(known(borrower), [known(lender)])
    assert loan is not None
    ring = isinstance(told, Device)
    told.load = node.pipeline.load(borrower, holder, told.landed, told.failures.append, ring=ring, loan=loan)
    return told


def tensors(source: Manifest) -> dict[str, torch.Tensor]:
    return {name: one for file in source.files for name, one in load_file(file.path).items()}


def test_views_are_of_the_lender_where_it_has_them(
    node: Node, uploader: Uploader, pair: tuple[Manifest, Manifest]
) -> None:
    lender, borrower = pair
    told = borrow(node, lender, borrower, Told())
    read = node.pipeline.disk.bytes
    news: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
    sizes = [file.size for file in borrower.files]
    for kept in range(2):
        mapping = uploader.mapping(borrower.checkpoint, sizes, lambda *report: news.put(report), told.load.lent)
        if not kept:
            told.load.start()
            node.finish(told)
        mapping.add(told.spans)
        while (report := news.get(timeout=30))[0] != report[1]:
            pass
        assert report[1] == told.load.total
        found = mapping.tensors()
        assert found.keys() == tensors(borrower).keys()
        assert all(same(found[name], one) for name, one in tensors(borrower).items())
        del found
        assert mapping.close()
    assert told.load.done == told.load.total
    assert node.pipeline.disk.bytes - read <= 2 << 20
    assert node.tier.used_bytes <= (6 + 2) << 20  # the lender has two files
    node.pipeline.release(borrower.checkpoint, 2)
    alone = node.fetch(borrower)  # from DRAM and disk, with a mapping of its own
    other = Uploader(node.pool.fd, node.pool.capacity)
    mapping = other.mapping(borrower.checkpoint, sizes, lambda *report: news.put(report))
    mapping.add(alone.spans)
    while (report := news.get(timeout=30))[0] != report[1]:
        pass
    assert all(same(mapping.tensors()[name], one) for name, one in tensors(borrower).items())
    assert mapping.close()
    mapping = other.mapping(borrower.checkpoint, sizes, lambda *report: news.put(report), told.load.lent)
    mapping.add(told.spans)  # nothing was evicted
    while (report := news.get(timeout=30))[0] != report[1]:
        pass
    assert all(same(mapping.tensors()[name], one) for name, one in tensors(borrower).items())
    assert mapping.close()
    other.close()


@pytest.mark.parametrize("ring", [False, True])
def test_copies_come_from_the_lender_too(
    uploader: Uploader, node: Node, pair: tuple[Manifest, Manifest], ring: bool
) -> None:
    lender, borrower = pair
    told = borrow(node, lender, borrower, Device(node.pool) if ring else Told())
    told.load.start()
    node.finish(told)
    news: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
    sizes = [file.size for file in borrower.files]
    upload = uploader.upload(sizes, lambda *report: news.put(report), lent=told.load.lent)
    upload.add(told.spans)
    headers = upload.headers()
    assert headers is not None
    dests, offset, places = [], 0, {}
    for entry in (entry for one in headers for entry in one.tensors):
        dests.append(Dest(entry.name, 0, entry.nbytes, offset))
        places[entry.name] = offset
        offset += entry.nbytes
    arena = torch.zeros(offset, dtype=torch.uint8)
    upload.start(dests, arena)
    while (report := news.get(timeout=30))[0] != report[1]:
        pass
    assert news.empty()
    upload.close()
    for name, one in tensors(borrower).items():
        raw = one.contiguous().view(-1).view(torch.uint8)
        assert torch.equal(arena[places[name] : places[name] + raw.numel()], raw)


def test_what_is_lent_stays_when_the_lender_is_forgotten(node: Node, pair: tuple[Manifest, Manifest]) -> None:
    lender, borrower = pair
    told = borrow(node, lender, borrower, Told())
    told.load.start()
    node.finish(told)
    before = {span: bytes(node.pool.range(span.pool_offset, span.length)) for span in told.spans}
    node.pipeline.forget(lender.checkpoint)
    node.settle()
    assert {span: bytes(node.pool.range(span.pool_offset, span.length)) for span in told.spans} == before
    assert node.tier.holders(lender.checkpoint) == {2}
    again = Told()
    assert node.pipeline.lending.find(known(borrower), [known(lender)]) is not None
    with pytest.raises(CapacityError):
        again.load = node.pipeline.load(
            manifest.build(write(lender.directory.parent / "c", random(8))), 3, again.landed, again.failures.append
        )
    node.pipeline.release(borrower.checkpoint, 2)
    assert node.tier.holders(lender.checkpoint) == frozenset()
    assert dict(node.tier.residents()).keys() == {borrower.checkpoint}
    node.settle()


def test_a_load_that_finds_no_room_holds_nothing_of_the_lender(node: Node, pair: tuple[Manifest, Manifest]) -> None:
    lender, borrower = pair
    node.fetch(lender)
    loan = node.pipeline.lending.find(known(borrower), [known(lender)])
    assert loan is not None
    node.pipeline.release(lender.checkpoint, 1)
    taken = node.tier.lend("other", node.tier.slots - 6)
    told = Told()
    with pytest.raises(CapacityError):
        node.pipeline.load(borrower, 2, told.landed, told.failures.append, loan=loan)
    assert node.tier.holders(lender.checkpoint) == frozenset()
    node.tier.give_back(taken)


def evict(node: Node, slots: int, kept: int = 0) -> None:
    """So many slots go to nobody; `kept` of them are not given back."""
    taken = node.tier.lend("other", len(node.tier.free_slots) + slots)
    node.tier.give_back(taken[kept:])


@pytest.mark.parametrize("ring", [False, True])
def test_beneath_who_borrowed_nothing_is_read_again_after_a_failure(node: Node, tmp_path: Path, ring: bool) -> None:
    common = random(4, 1, count=4)
    lender = manifest.build(write(tmp_path / "a", common, random(3, 3)))
    told = borrow(node, lender, manifest.build(write(tmp_path / "b", random(0.5, 2) | common)), Told())
    told.load.start()
    node.finish(told)
    before = {span: bytes(node.pool.range(span.pool_offset, span.length)) for span in told.spans}
    taken = len(node.tier.free_slots) + 1 if ring else 0
    evict(node, 3, kept=taken)
    paths = [file.path for file in lender.files]
    times = [path.stat().st_mtime_ns for path in paths]
    os.utime(paths[1], ns=(0, 0))
    failed = node.load(lender, 3, told=Device(node.pool) if ring else Told())
    failed.load.start()
    node.finish(failed)
    assert (len(failed.failures), failed.load.ringed) == (1, ring)
    node.pipeline.release(lender.checkpoint, 3)
    while node.tier.lent > taken:
        node.turn()
    paths[0].write_bytes(bytes(paths[0].stat().st_size))
    for path, time in zip(paths, times, strict=True):
        os.utime(path, ns=(time, time))
    again = node.load(lender, 4, told=Device(node.pool) if ring else Told())
    again.load.start()
    while not again.over:
        if isinstance(again, Device) and again.waiting:
            again.copy(again.waiting)
        else:
            node.turn()
    assert not again.failures
    assert {span: bytes(node.pool.range(span.pool_offset, span.length)) for span in told.spans} == before


def test_beneath_a_replica_that_borrows_its_own_bytes_are_not_read_again_after_anothers_failure(
    node: Node, pair: tuple[Manifest, Manifest]
) -> None:
    """The other one reads what the first had lent, into slots of the same checkpoint."""
    lender, borrower = pair
    told = borrow(node, lender, borrower, Told())
    told.load.start()
    node.finish(told)
    before = {span: bytes(node.pool.range(span.pool_offset, span.length)) for span in told.spans}
    (path,) = (file.path for file in borrower.files)
    time = path.stat().st_mtime_ns
    os.utime(path, ns=(0, 0))
    failed = node.load(borrower, 3)
    failed.load.start()
    node.finish(failed)
    assert len(failed.failures) == 1
    node.pipeline.release(borrower.checkpoint, 3)
    path.write_bytes(bytes(path.stat().st_size))
    os.utime(path, ns=(time, time))
    again = node.load(borrower, 4)
    again.load.start()
    node.finish(again)
    assert not again.failures
    assert {span: bytes(node.pool.range(span.pool_offset, span.length)) for span in told.spans} == before


def test_what_is_being_read_is_not_lent_since_the_read_may_fail(node: Node, pair: tuple[Manifest, Manifest]) -> None:
    lender, borrower = pair
    node.fetch(lender)
    node.pipeline.release(lender.checkpoint, 1)
    evict(node, 1)
    assert node.pipeline.lending.find(known(borrower), [known(lender)]) is not None
    told = node.load(lender)
    assert node.pipeline.lending.find(known(borrower), [known(lender)]) is None
    told.load.start()
    node.finish(told)
    assert node.pipeline.lending.find(known(borrower), [known(lender)]) is not None
