"""How parts get to a device: what is told of them, and when; what is registered for them, and when."""

from __future__ import annotations

import ctypes
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

from serverless_llm.loader import manifest
from serverless_llm.loader.copies import Copy
from serverless_llm.loader.dest import Dest
from serverless_llm.loader.memory import Range
from serverless_llm.loader.plan import Landed
from serverless_llm.loader.pool import HUGE_PAGE
from serverless_llm.loader.tasks import Upload
from serverless_llm.loader.toucher import MARGIN
from serverless_llm.loader.upload import PAUSE, Uploader
from serverless_llm.loader.ways import TEAM, Arrival, ByCpu, ByCuda, spread
from tests.unit.loader.checkpoints import Node, random, write


class Later:
    """Arrives when it is told to."""

    def __init__(self) -> None:
        self._told = threading.Event()
        self.awaited = threading.Event()

    def tell(self) -> None:
        self._told.set()

    def query(self) -> bool:
        return self._told.is_set()

    def synchronize(self) -> None:
        self.awaited.set()
        assert self._told.wait(30)


class Engines(ByCpu):
    """A device with copy engines of its own, and memory to be registered."""

    pins = True

    def __init__(self, window: Range, refusal: str = "", late: bool = False) -> None:
        super().__init__(window)
        self.refusal = refusal
        self.late = late
        self.begun: queue.SimpleQueue[tuple[Later, bool]] = queue.SimpleQueue()
        self.orders: list[tuple[str, int]] = []

    def begin(self, part: Landed, copies: Sequence[Copy], arena: torch.Tensor, direct: bool) -> Arrival:
        super().begin(part, copies, arena, direct)
        later = Later()
        if not self.late:
            later.tell()
        self.begun.put((later, direct))
        return later

    def register(self, offset: int, length: int) -> str:
        self.orders.append(("register", offset))
        return self.refusal

    def unregister(self, offset: int) -> None:
        self.orders.append(("unregister", offset))


class Clock:
    """It stands still, and notes when it is looked at."""

    def __init__(self) -> None:
        self.now = 0.0
        self.looks: queue.SimpleQueue[None] = queue.SimpleQueue()

    def __call__(self) -> float:
        self.looks.put(None)
        return self.now

    def looked_at(self) -> None:
        """Waits until somebody has looked, and done what there was to do, and looked again."""
        while not self.looks.empty():
            self.looks.get()
        for _ in range(2):
            self.looks.get(timeout=30)


class Device:
    """An uploader by such engines, whose news are kept. `room`: bytes of memory that are left."""

    def __init__(
        self, node: Node, refusal: str = "", late: bool = False, room: Callable[[], int] = lambda: sys.maxsize
    ) -> None:
        self.clock = Clock()
        self.pinned: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        self.news: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
        self.uploader = Uploader(
            node.pool.fd,
            node.pool.capacity,
            way=partial(Engines, refusal=refusal, late=late),
            on_pinned=lambda *report: self.pinned.put(report),
            pause=PAUSE,
            clock=self.clock,
            room=room,
        )
        way = self.uploader.way
        assert isinstance(way, Engines)
        self.way = way

    def upload(self, node: Node, directory: Path) -> tuple[Upload, list[Landed]]:
        """One that has begun, with its first span; and its others."""
        source = manifest.build(directory)
        spans = sorted(node.fetch(source).spans, key=lambda span: span.offset)
        node.pipeline.release(source.checkpoint, 1)
        upload = self.uploader.upload(
            [file.size for file in source.files],
            lambda done, total: self.news.put(("done", done)),
            lambda nbytes: self.news.put(("read", nbytes)),
        )
        upload.add(spans[:1])
        (head,) = upload.headers() or ()
        arena = torch.zeros(source.file_bytes, dtype=torch.uint8)
        upload.start([Dest(entry.name, 0, entry.nbytes, entry.start) for entry in head.tensors], arena)
        return upload, spans[1:]

    def use(self, node: Node, directory: Path) -> None:
        """Until what was used is registered."""
        upload, _ = self.upload(node, directory)
        self.news.get(timeout=30)
        upload.close()
        self.clock.now += PAUSE
        assert self.pinned.get(timeout=30) == (node.pool.capacity, "")


@pytest.fixture
def node() -> Iterator[Node]:
    node = Node()
    yield node
    node.close()


def test_a_part_is_told_of_when_its_copy_has_ended_and_in_order(node: Node, tmp_path: Path) -> None:
    device = Device(node, late=True)
    upload, others = device.upload(node, write(tmp_path, random(2.5)))
    upload.add(others)
    parts = [device.way.begun.get(timeout=30)[0] for _ in range(1 + len(others))]
    assert parts[0].awaited.wait(30)
    for one in reversed(parts[1:]):
        one.tell()
    assert device.news.empty()
    parts[0].tell()
    told = [device.news.get(timeout=30) for _ in range(2 * len(parts))]
    assert [kind for kind, _ in told] == ["read", "done"] * len(parts)
    assert [nbytes for kind, nbytes in told if kind == "read"] == [1 << 20, 2 << 20, upload._sizes[0]]
    assert told[-1] == ("done", upload.total)
    upload.close()
    device.uploader.close()


def test_a_closed_upload_waits_for_its_copies_and_tells_no_more(node: Node, tmp_path: Path) -> None:
    device = Device(node, late=True)
    upload, _ = device.upload(node, write(tmp_path, random(2.5)))
    (part, _) = device.way.begun.get(timeout=30)
    assert part.awaited.wait(30)
    closing = threading.Thread(target=upload.close)
    closing.start()
    part.awaited.clear()
    assert closing.is_alive()
    part.tell()
    closing.join(30)
    assert not closing.is_alive()
    device.uploader.close()
    assert device.news.empty() or device.news.get()[0] == "read"  # what had ended before it was closed


def test_what_was_used_is_registered_when_there_is_time_and_goes_straight_then(node: Node, tmp_path: Path) -> None:
    device = Device(node)
    device.uploader.step_due = True
    upload, others = device.upload(node, write(tmp_path, random(2.5)))
    upload.add(others)
    while not device.news.empty() or upload.done < upload.total:
        device.news.get(timeout=30)
    assert [device.way.begun.get()[1] for _ in range(3)] == [False] * 3
    upload.close()
    device.clock.looked_at()
    assert device.pinned.empty()
    device.uploader.step_due = False
    device.clock.looked_at()
    assert device.pinned.empty()
    device.clock.now += PAUSE
    assert device.pinned.get(timeout=30) == (node.pool.capacity, "")
    again, _ = device.upload(node, tmp_path)
    assert device.way.begun.get(timeout=30)[1]
    again.close()
    device.uploader.punched(0)
    assert device.pinned.get(timeout=30) == (0, "")
    assert device.way.orders == [("register", 0), ("unregister", 0)]
    once_more, _ = device.upload(node, tmp_path)
    assert not device.way.begun.get(timeout=30)[1]
    once_more.close()
    device.uploader.close()


def test_what_is_stale_is_let_go_during_a_load_and_beside_steps(node: Node, tmp_path: Path) -> None:
    device = Device(node)
    device.use(node, write(tmp_path, random(2.5)))
    device.uploader.step_due = True
    upload, others = device.upload(node, tmp_path)
    device.uploader.punched(0)
    upload.add(others)
    assert device.pinned.get(timeout=30) == (0, "")
    device.clock.looked_at()
    assert device.pinned.empty()
    upload.close()
    device.uploader.close()


def test_no_chunk_is_let_go_before_what_is_copied_from_it_has_left_it(node: Node, tmp_path: Path) -> None:
    device = Device(node)
    device.use(node, write(tmp_path, random(2.5)))
    while not device.way.begun.empty():
        device.way.begun.get()
    device.way.late = True
    upload, others = device.upload(node, tmp_path)
    parts = [device.way.begun.get(timeout=30)]
    assert parts[0][0].awaited.wait(30)
    upload.add(others)
    parts[0][0].tell()
    parts += [device.way.begun.get(timeout=30) for _ in others]
    assert all(direct for _, direct in parts)
    assert parts[1][0].awaited.wait(30)
    device.uploader.punched(0)
    parts[1][0].tell()
    assert parts[2][0].awaited.wait(30)
    assert device.way.orders == [("register", 0)]
    parts[2][0].tell()
    assert device.pinned.get(timeout=30) == (0, "")
    upload.close()
    device.uploader.close()


def test_nothing_is_registered_before_there_is_memory_for_it(node: Node, tmp_path: Path) -> None:
    capacity = node.pool.capacity
    rooms = iter([0, capacity + MARGIN - 1, capacity + MARGIN])
    device = Device(node, room=rooms.__next__)
    device.use(node, write(tmp_path, random(2.5)))
    device.uploader.close()
    assert list(rooms) == []


def test_nothing_is_registered_during_a_load(node: Node, tmp_path: Path) -> None:
    device = Device(node)
    upload, _ = device.upload(node, write(tmp_path, random(2.5)))
    device.clock.looked_at()
    assert device.pinned.empty()
    upload.close()
    device.clock.now += PAUSE
    assert device.pinned.get(timeout=30) == (node.pool.capacity, "")
    device.uploader.close()


def test_a_refusal_is_told_once_and_all_goes_through_buffers(node: Node, tmp_path: Path) -> None:
    device = Device(node, refusal="not permitted")
    for _ in range(2):
        upload, _ = device.upload(node, write(tmp_path, random(2.5)))
        assert not device.way.begun.get(timeout=30)[1]
        upload.close()
        device.clock.now += PAUSE
        if not device.way.orders:
            assert device.pinned.get(timeout=30) == (0, "not permitted")
    device.uploader.close()
    assert device.way.orders == [("register", 0)]
    assert device.pinned.empty()


@pytest.mark.parametrize("length", [1, TEAM, 1001])
def test_a_team_copies_all(length: int) -> None:
    source = (ctypes.c_char * length).from_buffer(bytearray(range(1, 252)) * 4)
    target = (ctypes.c_char * (length + 1))()
    with ThreadPoolExecutor(TEAM) as team:
        spread(team, ctypes.addressof(target), ctypes.addressof(source), length)
    assert target.raw == source.raw + b"\0"


@pytest.mark.gpu
def test_copies_arrive_on_a_cuda_device_by_both_ways(node: Node, tmp_path: Path) -> None:
    content = random(5)
    source = manifest.build(write(tmp_path, content))
    spans = node.fetch(source).spans
    pinned: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
    way = partial(ByCuda, device=torch.device("cuda:0"))
    uploader = Uploader(
        node.pool.fd, node.pool.capacity, way=way, on_pinned=lambda *report: pinned.put(report), pause=0
    )
    for straight in (False, True):
        news: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        upload = uploader.upload([file.size for file in source.files], lambda *report, news=news: news.put(report))
        upload.add(spans)
        (head,) = upload.headers() or ()
        arena = torch.zeros(source.file_bytes, dtype=torch.uint8, device="cuda")
        assert uploader.pinned.direct(spans[0].pool_offset, spans[0].length) == straight
        upload.start([Dest(entry.name, 0, entry.nbytes, entry.start) for entry in head.tensors], arena)
        while len(set(news.get(timeout=30))) > 1:
            pass
        for entry in head.tensors:
            assert torch.equal(arena[entry.start : entry.end].cpu(), content[entry.name].view(-1).view(torch.uint8))
        upload.close()
        if not straight:
            nbytes, refused = pinned.get(timeout=30)
            if refused:
                pytest.skip(f"memory cannot be pinned here: {refused}")
            assert nbytes == node.pool.capacity
    uploader.close()


@pytest.mark.gpu
def test_a_refused_registration_fails_no_later_kernel(node: Node) -> None:
    window = Range(node.pool.capacity, HUGE_PAGE)
    window.place(0, node.pool.capacity, node.pool.fd, 0)
    way = ByCuda(window, torch.device("cuda:0"))
    if refused := way.register(0, node.pool.capacity):
        pytest.skip(f"memory cannot be pinned here: {refused}")
    assert way.register(0, node.pool.capacity)  # it is already
    assert torch.ones(4, device="cuda").sum() == 4
    way.unregister(0)
