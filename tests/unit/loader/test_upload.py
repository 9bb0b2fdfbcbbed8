"""From files through the pool to tensors, by views and by copies."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serverless_llm.errors import CheckpointError
from serverless_llm.loader import manifest
from serverless_llm.loader.dest import Dest
from serverless_llm.loader.header import DTYPE_BITS, Header
from serverless_llm.loader.link import Priority
from serverless_llm.loader.manifest import Manifest
from serverless_llm.loader.pacer import Pacer
from serverless_llm.loader.plan import Landed
from serverless_llm.loader.pool import Pool
from serverless_llm.loader.upload import Uploader
from serverless_llm.loader.views import TORCH_DTYPES
from tests.unit.loader.checkpoints import Node, random, raw, same, write

News = queue.SimpleQueue[tuple[int, int]]
RATE = 1e6  # bytes per second


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    node = Node()
    yield node
    node.close()


@pytest.fixture(scope="module")
def uploader(node: Node) -> Iterator[Uploader]:
    uploader = Uploader(node.pool.fd, node.pool.capacity)
    yield uploader
    uploader.close()


def landed(node: Node, source: Manifest) -> list[Landed]:
    told = node.fetch(source)
    node.pipeline.release(source.checkpoint, 1)
    return told.spans


def sizes(source: Manifest) -> list[int]:
    return [file.size for file in source.files]


def until_ready(news: News) -> int:
    """The number of reports up to the one that says all is done."""
    count = 1
    while (report := news.get(timeout=30))[0] != report[1]:
        count += 1
    assert news.empty()
    return count


def dests(headers: tuple[Header, ...], gap: int = 0) -> tuple[list[Dest], int]:
    """Every tensor in two halves, one after another, `gap` bytes between; and the arena's bytes."""
    wanted, offset = [], 0
    for entry in (entry for one in headers for entry in one.tensors):
        middle = entry.nbytes // 2
        for start, stop in ((0, middle), (middle, entry.nbytes)):
            if start < stop:
                wanted.append(Dest(entry.name, start, stop, offset))
                offset += stop - start + gap
    return wanted, offset


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Up to six tensors of any type and shape, some of them longer than a slot."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    dtypes = st.sampled_from([dtype for name, dtype in TORCH_DTYPES.items() if name != "F4" and "FNUZ" not in name])
    shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple) | st.sampled_from([(700_001,), (1000, 300)])
    found = {}
    for number, (dtype, shape) in enumerate(draw(st.lists(st.tuples(dtypes, shapes), min_size=1, max_size=6))):
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if nbytes > 1_500_000:
            dtype, nbytes = torch.uint8, torch.Size(shape).numel()
        high = 2 if dtype == torch.bool else 256
        content = torch.randint(0, high, (nbytes,), dtype=torch.uint8, generator=generator)
        found[f"t{number}"] = content.view(dtype).view(shape)
    return found


@pytest.mark.slow
@settings(max_examples=30)
@given(content=tensors(), shards=st.integers(1, 3), order=st.integers(0, 99), gap=st.sampled_from([0, 7]))
def test_any_checkpoint_comes_through(
    node: Node, uploader: Uploader, content: dict[str, torch.Tensor], shards: int, order: int, gap: int
) -> None:
    with TemporaryDirectory() as directory:
        parts = [dict(list(content.items())[n::shards]) for n in range(shards)]
        source = manifest.build(write(Path(directory), *filter(None, parts)))
        spans = landed(node, source)
    Random(order).shuffle(spans)
    news, copied = News(), News()
    mapping = uploader.mapping(source.checkpoint, sizes(source), lambda *report: news.put(report))
    upload = uploader.upload(sizes(source), lambda *report: copied.put(report))
    for cut in (spans[: len(spans) // 2], spans[len(spans) // 2 :]):
        mapping.add(cut)
        upload.add(cut)
    until_ready(news)
    got = mapping.tensors()
    assert got.keys() == content.keys()
    assert all(same(got[name], content[name]) for name in content)
    headers = mapping.headers()
    assert headers == upload.headers() == tuple(file.header for file in source.files)
    wanted, nbytes = dests(headers, gap)
    if wanted:
        arena = torch.zeros(nbytes, dtype=torch.uint8)
        upload.start(wanted, arena)
        until_ready(copied)
        for dest in wanted:
            whole = content[dest.tensor].contiguous().view(-1).view(torch.uint8)
            assert torch.equal(arena[dest.offset :][: dest.stop - dest.start], whole[dest.start : dest.stop])
    upload.close()
    del got
    assert mapping.close()


def test_views_are_of_the_pool_and_outlive_the_mapping(tmp_path: Path, node: Node, uploader: Uploader) -> None:
    source = manifest.build(write(tmp_path, random(2.5)))
    spans, news = landed(node, source), News()
    mapping = uploader.mapping(source.checkpoint, sizes(source), lambda *report: news.put(report))
    mapping.add(spans)
    until_ready(news)
    tensor = mapping.tensors()["0.0"]
    assert not mapping.close()
    first = node.pool.range(next(span for span in spans if span.offset == 0).pool_offset, 1 << 20)
    start = source.files[0].header.tensors[0].start
    first[start] ^= 1
    assert tensor.view(torch.uint8).view(-1)[0] == first[start]
    node.tier.forget(source.checkpoint)  # one of its bytes is wrong now
    del tensor
    assert mapping.close()


def test_misaligned_tensors_are_copied_and_the_others_viewed(tmp_path: Path, node: Node, uploader: Uploader) -> None:
    fields: dict[str, Any] = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "odd": {"dtype": "I32", "shape": [2], "data_offsets": [1, 9]},
    }
    directory = write(tmp_path, random(0.1))
    (directory / manifest.SINGLE).write_bytes(raw(fields, bytes([7]) + (1).to_bytes(4, "little") * 2))
    source = manifest.build(directory)
    news = News()
    mapping = uploader.mapping(source.checkpoint, sizes(source), lambda *report: news.put(report))
    mapping.add(landed(node, source))
    until_ready(news)
    got = mapping.tensors()
    assert got["odd"].tolist() == [1, 1]
    home = mapping._stitched.ranges[0]
    inside = {name: home.address <= tensor.data_ptr() < home.address + home.length for name, tensor in got.items()}
    assert inside == {"byte": True, "odd": False}
    del got
    (room,) = mapping.misaligned(but=()).items()
    assert (room[0], room[1].dtype, room[1].shape) == ("odd", torch.int32, (2,))
    assert mapping.misaligned(but={"odd"}) == {}
    assert mapping.tensors(but={"odd"}).keys() == {"byte"}
    assert mapping.close()


def test_a_type_that_torch_has_not_is_named(tmp_path: Path, node: Node, uploader: Uploader) -> None:
    assert DTYPE_BITS.keys() - TORCH_DTYPES.keys() == {"F6_E2M3", "F6_E3M2"}
    directory = write(tmp_path, random(0.1))
    content = raw({"six": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}, bytes(3))
    (directory / manifest.SINGLE).write_bytes(content)
    source = manifest.build(directory)
    mapping = uploader.mapping(source.checkpoint, sizes(source), lambda done, total: None)
    mapping.add(landed(node, source))
    with pytest.raises(CheckpointError, match="'six' has the dtype F6_E2M3"):
        mapping.tensors()
    assert mapping.close()


def test_headers_come_with_the_first_pieces(tmp_path: Path, node: Node, uploader: Uploader) -> None:
    source = manifest.build(write(tmp_path, random(2.5, 0), random(1.5, 1)))
    spans = sorted(landed(node, source), key=lambda span: span.offset)
    upload = uploader.upload(sizes(source), lambda done, total: None)
    assert upload.headers() is None
    upload.add([spans[0]])
    assert upload.headers() is None
    upload.add([spans[1]])
    assert upload.headers() == tuple(file.header for file in source.files)
    upload.close()


def test_a_hostile_header_in_the_pool_is_an_error(node: Node, uploader: Uploader) -> None:
    node.pool.range(7 << 20, 16)[:] = raw(b"[1,2,3]]")
    upload = uploader.upload([16], lambda done, total: None)
    upload.add([Landed(0, 0, 16, 7 << 20)])
    with pytest.raises(CheckpointError):
        upload.headers()
    upload.close()


def test_a_cap_paces_copies_and_close_stops_them(tmp_path: Path, node: Node) -> None:
    source = manifest.build(write(tmp_path, random(3)))
    spans, news = landed(node, source), News()
    slow = Uploader(node.pool.fd, node.pool.capacity, rate=20e6)
    upload = slow.upload(sizes(source), lambda *report: news.put(report))
    upload.add(spans)
    headers = upload.headers()
    assert headers is not None
    wanted, nbytes = dests(headers)
    arena = torch.zeros(nbytes, dtype=torch.uint8)
    upload.start(wanted, arena)
    done, total = news.get(timeout=30)
    assert 0 < done < total
    upload.close()
    written = arena.clone()
    slow.close()
    assert torch.equal(arena, written)
    assert written.count_nonzero() < nbytes * 2 // 3


def test_a_cap_is_for_what_crosses(tmp_path: Path, node: Node) -> None:
    """Not for what nobody wants of the file, nor for what was mapped and is converted."""
    content = random(3)
    source = manifest.build(write(tmp_path, content))
    spans, news = landed(node, source), News()
    uploader = Uploader(node.pool.fd, node.pool.capacity)
    uploader.pacer = Pacer(RATE, clock=lambda: 0.0)
    uploader.pacer.stop()  # it books, and nobody waits
    upload = uploader.upload(sizes(source), lambda *report: news.put(report))
    upload.add(spans)
    headers = upload.headers()
    assert headers is not None
    wanted, nbytes = dests(headers)
    upload.start(wanted[:1], torch.zeros(nbytes, dtype=torch.uint8))
    until_ready(news)
    booked = wanted[0].stop - wanted[0].start
    assert round(uploader.pacer.delay(0) * RATE) == booked < source.file_bytes / 2
    upload.close()
    mapping = uploader.mapping(source.checkpoint, sizes(source), lambda *report: news.put(report))
    mapping.add(spans)
    until_ready(news)
    booked += source.file_bytes
    assert round(uploader.pacer.delay(0) * RATE) == booked
    targets = {name: one.to(torch.float64) for name, one in content.items()}
    conversion = uploader.conversion(mapping, targets, lambda *report: news.put(report))
    until_ready(news)
    assert round(uploader.pacer.delay(0) * RATE) == booked
    conversion.close()
    assert mapping.close()
    uploader.close()


def test_spans_that_land_after_the_start_are_copied_too(tmp_path: Path, node: Node, uploader: Uploader) -> None:
    content = random(2.5)
    source = manifest.build(write(tmp_path, content))
    spans, news = landed(node, source), News()
    upload = uploader.upload(sizes(source), lambda *report: news.put(report))
    upload.add(spans[:1])
    headers = upload.headers()
    assert headers is not None
    wanted = [Dest(entry.name, 0, entry.nbytes, entry.start) for entry in headers[0].tensors]
    arena = torch.zeros(source.file_bytes, dtype=torch.uint8)
    upload.start(wanted, arena)
    upload.add(spans[1:])
    assert until_ready(news) == len(spans)
    for entry in headers[0].tensors:
        assert torch.equal(arena[entry.start : entry.end], content[entry.name].view(-1).view(torch.uint8))
    upload.close()


def test_a_closed_task_moves_nothing(node: Node, uploader: Uploader) -> None:
    news = News()
    upload = uploader.upload([16], lambda *report: news.put(report))
    upload.close()
    upload.step(Landed(0, 0, 16, 0))
    assert news.empty()


@pytest.mark.parametrize("hastened", [False, True])
def test_what_somebody_waits_for_goes_before_the_next_part(
    tmp_path: Path, node: Node, uploader: Uploader, hastened: bool
) -> None:
    spans = landed(node, manifest.build(write(tmp_path, random(2.5))))
    begun, go, order = threading.Event(), threading.Event(), queue.SimpleQueue[str]()

    def told(name: str, done: int, total: int) -> None:
        order.put(name)
        if name == "first":
            begun.set()
            go.wait(30)

    tasks = {name: uploader.mapping(name, [3 << 20], partial(told, name)) for name in ("first", "slow", "late")}
    for task in tasks.values():
        task.priority = Priority.PREFETCH
    tasks["first"].add(spans[:1])
    begun.wait(30)  # what comes meanwhile waits for its turn
    tasks["slow"].add(spans)
    tasks["late"].add(spans)
    if hastened:
        tasks["late"].priority = Priority.ONLINE
    go.set()
    names = [order.get(timeout=30) for _ in range(3)]
    assert names[1:] == (["late", "slow"] if hastened else ["slow", "late"])
    assert all(task.close() for task in tasks.values())


def test_beside_steps_parts_are_shorter() -> None:
    pool = Pool(64 << 20)
    uploader = Uploader(pool.fd, pool.capacity)
    parts = {}
    for due in (False, True):
        uploader.step_due = due
        news = News()
        mapping = uploader.mapping(str(due), [32 << 20], lambda *report, news=news: news.put(report))
        mapping.add(Landed(0, offset, pool.slot_bytes, offset) for offset in range(0, 32 << 20, pool.slot_bytes))
        parts[due] = until_ready(news)
        assert mapping.close()
    assert parts == {False: 2, True: 8}
    uploader.close()
    pool.close()


def test_ranges_suit_huge_pages_where_slots_do() -> None:
    pool = Pool(2 << 30)
    uploader = Uploader(pool.fd, pool.capacity)
    mapping = uploader.mapping("one", [1], lambda done, total: None)
    assert [one.address % (2 << 20) for one in (uploader.window, mapping._stitched.ranges[0])] == [0, 0]
    assert mapping.close()
    uploader.close()
    pool.close()
