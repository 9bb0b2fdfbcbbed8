"""Mappings that outlive their replicas: reused where the bytes lie as before, and never read through when not."""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serverless_llm.errors import CapacityError
from serverless_llm.loader import manifest, plan
from serverless_llm.loader.manifest import Manifest
from serverless_llm.loader.memory import Range
from serverless_llm.loader.plan import Landed
from serverless_llm.loader.pool import Pool
from serverless_llm.loader.stitched import RELEASE, Kept, Stitched
from serverless_llm.loader.tasks import Mapping
from serverless_llm.loader.upload import Uploader
from tests.unit.loader.checkpoints import Node, random, write
from tests.unit.loader.mappings import areas, resident

MB = 1 << 20
FAULT_AROUND = 64 << 10  # bytes that the kernel may map beside a page that is read


@pytest.fixture
def pool() -> Iterator[Pool]:
    pool = Pool(8 * MB)
    for slot in range(8):
        pool.range(pool.offset(slot), 1)[:] = bytes([slot])
    yield pool
    pool.close()


def stitched(pool: Pool, sizes: list[int], spans: list[Landed] | None = None) -> Stitched:
    found = Stitched(sizes, pool.slot_bytes, 4096, pool.fd)
    found.show(spans or [])
    return found


def firsts(one: Stitched) -> list[list[int]]:
    """The first byte of every slot of every file: the pool's slot that it shows."""
    return [list(bytes(memoryview(home.buffer)[::MB])) for home in one.ranges]


def thin(home: Range) -> None:
    """Leaves only the first page of every slot."""
    for offset in range(0, home.length, MB):
        home.release(offset + 4096, MB - 4096)


class Worker:
    """One device's replicas and what it keeps."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.uploader = Uploader(node.pool.fd, node.pool.capacity)
        self.news: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self.reports: list[int] = []  # bytes done, of the last `place`

    def place(self, source: Manifest, holder: int) -> Mapping:
        sizes = [file.size for file in source.files]
        told = self.node.fetch(source, holder)
        mapping = self.uploader.mapping(source.checkpoint, sizes, lambda *report: self.news.put(report))
        mapping.add(plan.joined(told.spans) if holder % 2 else told.spans)
        done, total = 0, 1
        self.reports = []
        while done < total:
            done, total = self.news.get(timeout=30)
            self.reports.append(done)
        return mapping

    def drop(self, mapping: Mapping, source: Manifest, holder: int) -> None:
        assert mapping.close()
        self.node.pipeline.release(source.checkpoint, holder)


@pytest.fixture
def node() -> Iterator[Node]:
    node = Node()
    yield node
    node.close()


@pytest.fixture
def worker(node: Node) -> Iterator[Worker]:
    worker = Worker(node)
    yield worker
    worker.uploader.close()


# --- one mapping ---


def test_slots_that_follow_one_another_are_one_area(pool: Pool) -> None:
    spans = [Landed(0, 2 * MB, MB, 5 * MB), Landed(0, 0, MB, 0), Landed(0, MB, 4096, MB)]
    one = stitched(pool, [3 * MB], spans)
    assert firsts(one) == [[0, 1, 5]]
    assert sorted(size for size, _ in areas(one.ranges[0])) == [MB, 2 * MB]
    assert one.nbytes == 3 * MB


def test_only_what_lies_elsewhere_is_mapped_again(pool: Pool) -> None:
    spans = [Landed(0, 0, MB, 0), Landed(0, MB, MB, 3 * MB), Landed(1, 0, 10, 4 * MB)]
    one = stitched(pool, [2 * MB, 10], spans)
    for home in one.ranges:
        home.populate(0, home.length)
    assert one.show(spans) == set()
    assert one.show([Landed(0, MB + 4096, 4096, 3 * MB + 4096)]) == set()
    assert one.show([spans[0], Landed(0, MB, MB, 7 * MB), spans[2]]) == {(0, MB)}
    assert firsts(one) == [[0, 7], [4]]


def test_faults_are_to_be_taken_again_where_memory_was_given_back(pool: Pool) -> None:
    spans = [Landed(0, 0, MB, 0), Landed(0, MB, MB, 3 * MB), Landed(1, 0, 10, 4 * MB)]
    one = stitched(pool, [2 * MB, 10], spans)
    for home in one.ranges:
        home.populate(0, home.length)
    pool.punch([3, 4])
    pool.range(3 * MB, 1)[:] = bytes([9])
    assert one.show(spans) == {(0, MB), (1, 0)}
    assert firsts(one) == [[0, 9], [0]]


def test_a_span_may_go_over_many_slots(pool: Pool) -> None:
    one = stitched(pool, [4 * MB], [Landed(0, 0, 2 * MB, 3 * MB), Landed(0, 2 * MB + 5, MB, 6 * MB + 5)])
    assert firsts(one) == [[3, 4, 6, 7]]


def test_it_is_unused_once_no_view_of_any_file_is_left(pool: Pool) -> None:
    one = stitched(pool, [MB, MB])
    assert one.unused()
    view = memoryview(one.ranges[1].buffer)
    assert not one.unused()
    del view
    assert one.unused()


def test_page_tables_are_given_back_in_parts(pool: Pool) -> None:
    one = Stitched([RELEASE + 1, 5], pool.slot_bytes, 4096, pool.fd)
    one.show([Landed(0, 0, MB, 0), Landed(0, RELEASE, 1, MB), Landed(1, 0, 5, 2 * MB)])
    for home in one.ranges:
        home.populate(0, MB)
    one.ranges[0].populate(RELEASE, MB)
    left = [sum(map(resident, one.ranges))]
    while not one.release():
        left.append(sum(map(resident, one.ranges)))
    assert left == [3 * MB, 2 * MB, MB]
    assert sum(map(resident, one.ranges)) == 0


# --- those kept ---


def test_the_longest_kept_go_when_together_they_exceed_the_budget(pool: Pool) -> None:
    gone: list[Stitched] = []
    kept = Kept(3 * MB, gone.append)
    spans = [[Landed(0, 0, 1, slot * MB)] for slot in range(3)]
    one, two, three = (stitched(pool, [1], each) for each in spans)
    big = stitched(pool, [2 * MB], [Landed(0, 0, MB, 4 * MB), Landed(0, MB, MB, 5 * MB)])
    kept.keep("one", one)
    kept.keep("two", two)
    kept.keep("three", three)
    assert (kept.nbytes, gone) == (3 * MB, [])
    assert kept.take("one") is one
    kept.keep("one", one)  # the last kept now
    kept.keep("big", big)
    assert (kept.nbytes, gone) == (3 * MB, [two, three])
    assert (kept.take("two"), kept.take("one"), kept.take("one")) == (None, one, None)


def test_one_is_kept_of_a_checkpoint(pool: Pool) -> None:
    gone: list[Stitched] = []
    kept = Kept(3 * MB, gone.append)
    one, two = (stitched(pool, [1], [Landed(0, 0, 1, 0)]) for _ in range(2))
    kept.keep("same", one)
    kept.keep("same", two)
    assert gone == [one]
    assert kept.take("same") is two


def test_a_mapping_goes_when_one_of_its_slots_is_anothers(pool: Pool) -> None:
    gone: list[Stitched] = []
    kept = Kept(8 * MB, gone.append)
    one, two = (stitched(pool, [1], [Landed(0, 0, 1, slot * MB)]) for slot in range(2))
    kept.keep("one", one)
    kept.keep("two", two)
    kept.handed("one", [0, 3 * MB])
    kept.handed("three", [3 * MB])
    assert gone == []
    kept.handed("three", [3 * MB, MB])
    assert gone == [two]
    assert kept.take("one") is one


# --- as a worker uses them ---


def test_a_checkpoint_that_comes_back_takes_no_page_faults(tmp_path: Path, worker: Worker) -> None:
    content = random(2.5)
    source = manifest.build(write(tmp_path, content))
    mapping = worker.place(source, 1)
    home = mapping._stitched.ranges[0]
    assert resident(home) == -(-source.file_bytes // 4096) * 4096
    worker.drop(mapping, source, 1)
    thin(home)
    worker.uploader.longest = 4096
    again = worker.place(source, 3)
    assert worker.reports == [source.file_bytes]  # in one turn, for nothing is moved
    assert again._stitched.ranges == [home]
    assert resident(home) == 3 * 4096  # so nothing was populated
    assert all(torch.equal(tensor, content[name]) for name, tensor in again.tensors().items())


def test_faults_are_taken_of_the_slots_that_lie_elsewhere(tmp_path: Path, worker: Worker) -> None:
    content = random(2.5)
    source = manifest.build(write(tmp_path, content))
    worker.drop(worker.place(source, 1), source, 1)
    spans = worker.node.fetch(source, 2).spans
    moved = max(spans)._replace(pool_offset=7 * MB)
    worker.node.pool.range(7 * MB, moved.length)[:] = worker.node.pool.range(max(spans).pool_offset, moved.length)
    mapping = worker.uploader.mapping(source.checkpoint, [source.file_bytes], lambda *report: worker.news.put(report))
    home = mapping._stitched.ranges[0]
    thin(home)
    mapping.add([*sorted(spans)[:-1], moved])
    while worker.news.get(timeout=30)[0] < source.file_bytes:
        pass
    assert moved.length < resident(home) < moved.length + FAULT_AROUND
    assert all(torch.equal(tensor, content[name]) for name, tensor in mapping.tensors().items())


def test_faults_are_taken_of_a_slot_in_the_middle_of_a_span(tmp_path: Path, worker: Worker) -> None:
    source = manifest.build(write(tmp_path, random(2.5)))
    worker.drop(worker.place(source, 1), source, 1)
    (span,) = plan.joined(sorted(worker.node.fetch(source, 2).spans))
    mapping = worker.uploader.mapping(source.checkpoint, [source.file_bytes], lambda *report: worker.news.put(report))
    home = mapping._stitched.ranges[0]
    home.release(0, home.length)
    home.populate(0, 4096)
    home.populate(2 * MB, 4096)
    mapping.add([span])
    while worker.news.get(timeout=30)[0] < source.file_bytes:
        pass
    assert MB < resident(home) <= MB + 2 * FAULT_AROUND


def test_a_mapping_that_went_stale_is_unmapped_in_the_background(tmp_path: Path, worker: Worker) -> None:
    one = manifest.build(write(tmp_path / "one", random(4.5, 1)))
    two = manifest.build(write(tmp_path / "two", random(5.5, 2)))
    mapping = worker.place(one, 1)
    unmapped = threading.Event()
    weakref.finalize(mapping._stitched, unmapped.set)
    worker.drop(mapping, one, 1)
    assert worker.uploader.kept.nbytes == 5 * MB
    worker.place(two, 2)
    assert worker.uploader.kept.nbytes == 0
    del mapping
    assert unmapped.wait(timeout=30)


def test_a_mapping_that_is_incomplete_is_not_kept(tmp_path: Path, worker: Worker) -> None:
    source = manifest.build(write(tmp_path, random(2.5)))
    mapping = worker.uploader.mapping(source.checkpoint, [source.file_bytes], lambda done, total: None)
    mapping.add(worker.node.fetch(source).spans[1:])
    unmapped = threading.Event()
    weakref.finalize(mapping._stitched, unmapped.set)
    worker.drop(mapping, source, 1)
    assert worker.uploader.kept.nbytes == 0
    assert unmapped.wait(timeout=30)


def test_a_mapping_that_is_still_referred_to_is_not_kept(tmp_path: Path, worker: Worker) -> None:
    source = manifest.build(write(tmp_path, random(2.5)))
    mapping = worker.place(source, 1)
    tensors = mapping.tensors()
    assert not mapping.close()
    assert worker.uploader.kept.nbytes == 0
    del tensors
    worker.drop(mapping, source, 1)
    assert worker.uploader.kept.nbytes == 3 * MB


STEP = st.tuples(st.sampled_from(["place", "place", "drop", "drop", "forget"]), st.integers(0, 3), st.integers(0, 1))
SIZES = (0.7, 1.6, 2.5, 3.4)  # megabytes; six slots of one are in the pool


@pytest.mark.slow
@settings(max_examples=20)
@given(steps=st.lists(STEP, min_size=30, max_size=50))
def test_tensors_are_always_the_checkpoints_bytes(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int]]
) -> None:
    """Two workers, four checkpoints, more bytes than slots: whatever was evicted, punched or moved in between."""
    contents = [random(size, seed) for seed, size in enumerate(SIZES)]
    home = tmp_path_factory.getbasetemp()
    sources = [manifest.build(write(home / f"checkpoint{n}", one)) for n, one in enumerate(contents)]
    node = Node(slots=6)
    workers = [Worker(node), Worker(node)]
    placed: dict[int, tuple[Worker, int, Mapping, dict[str, torch.Tensor]]] = {}
    for holder, (verb, which, device) in enumerate(steps):
        source = sources[which]
        if verb == "place":
            with contextlib.suppress(CapacityError):
                mapping = workers[device].place(source, holder)
                placed[holder] = workers[device], which, mapping, mapping.tensors()
        elif verb == "drop" and placed:
            number = list(placed)[which % len(placed)]
            worker, which, mapping, tensors = placed.pop(number)
            tensors.clear()
            worker.drop(mapping, sources[which], number)
        elif verb == "forget":
            node.tier.forget(source.checkpoint)
            node.pool.punch(node.tier.free_slots)
        for _, which, _, tensors in placed.values():
            assert all(torch.equal(tensors[name], tensor) for name, tensor in contents[which].items())
    for worker in workers:
        worker.uploader.close()
    node.close()
