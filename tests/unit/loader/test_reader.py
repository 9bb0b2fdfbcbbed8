"""The reader's queue: order, priorities, cancellation, errors. Files are real."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from serverless_llm.errors import TransientError
from serverless_llm.loader import plan
from serverless_llm.loader import reader as module
from serverless_llm.loader.link import Priority, Rank
from serverless_llm.loader.plan import Piece
from serverless_llm.loader.pool import Pool
from serverless_llm.loader.reader import Batch, Reader, Transfer
from serverless_llm.loader.source import Came, Opened, SourceFile
from tests.serving import until

MB = 1 << 20
Begin = Callable[..., Reader]
SLOW = 20e6  # bytes per second: 50 ms for a call of each thread


@pytest.fixture
def pool() -> Iterator[Pool]:
    pool = Pool(8 * MB)
    yield pool
    pool.close()


@pytest.fixture
def begin(pool: Pool) -> Iterator[Begin]:
    """Makes readers of the pool, which end with the test, however that ends."""
    begun: list[Reader] = []

    def make(**options: Any) -> Reader:
        begun.append(Reader(pool, **options))
        return begun[-1]

    yield make
    for reader in begun:
        reader.close()


def transfer(path: Path, nbytes: int, slots: list[int], news: queue.SimpleQueue[Batch], *rank: int) -> Transfer:
    path.write_bytes(bytes([slots[0] + 1]) * nbytes)
    stat = path.stat()
    pieces = plan.cut(Piece(0, 0, nbytes), MB)
    files = [SourceFile(path, stat.st_size, stat.st_mtime_ns)]
    return Transfer(files, dict(zip(pieces, slots, strict=True)), pieces, news.put, Rank(*rank))


def until_last(news: queue.SimpleQueue[Batch]) -> list[Batch]:
    batches = [news.get(timeout=30)]
    while not batches[-1].last:
        batches.append(news.get(timeout=30))
    return batches


@pytest.mark.parametrize("staged", [True, False])
@pytest.mark.parametrize(("rate", "calls"), [(0.0, 1), (2e7, 3)])
def test_slots_are_filled_in_calls_of_the_size(
    tmp_path: Path, pool: Pool, begin: Begin, rate: float, calls: int, staged: bool
) -> None:
    reader, news = begin(threads=1, rate=rate, staged=staged), queue.SimpleQueue[Batch]()
    read = transfer(tmp_path / "a", 2 * MB + 5, [5, 1, 3], news)
    reader.submit(read)
    batches = until_last(news)
    assert len(batches) == calls
    assert sum(batch.came.total for batch in batches) == 2 * MB + 5
    assert [pool.range(slot * MB, MB).tobytes() for slot in (5, 1)] == [b"\6" * MB] * 2
    assert pool.range(3 * MB, 6) == b"\6" * 5 + b"\0"
    assert 0 < read.started <= read.ended


def test_nothing_to_read_ends_at_once(tmp_path: Path, begin: Begin) -> None:
    reader, news = begin(), queue.SimpleQueue[Batch]()
    reader.submit(Transfer([], {}, [], news.put))
    assert until_last(news) == [Batch((), Came(), True, None)]


def test_priority_then_number_then_first_come(tmp_path: Path, begin: Begin) -> None:
    reader, order = begin(threads=1, rate=SLOW), queue.SimpleQueue[Batch]()
    first = transfer(tmp_path / "first", 2 * MB, [0, 1], order, 0, 7)
    reader.submit(first)
    for name, slot, *rank in (("late", 2, 1), ("urgent", 3, -1), ("equal", 4, 0, 7), ("lower", 5, 0, 6)):
        reader.submit(transfer(tmp_path / str(name), 1, [int(slot)], order, *map(int, rank)))
    ends = [until_last(order)[-1].landed[0].pool_offset // MB for _ in range(5)]
    assert ends == [3, 5, 1, 4, 2]


def test_what_nobody_waits_for_is_read_in_short_calls_until_somebody_does(
    tmp_path: Path, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BRIEF", module.CALL_BYTES // MB)
    reader, news, others = begin(threads=1, staged=False), queue.SimpleQueue[Batch](), queue.SimpleQueue[Batch]()
    reader.submit(transfer(tmp_path / "a", 2 * MB, [0, 1], news, Priority.PREFETCH))
    assert [len(batch.landed) for batch in until_last(news)] == [1, 1]
    first = hanging(tmp_path / "pipe", [2], others)
    reader.submit(first)
    hastened = transfer(tmp_path / "b", 4 * MB, [3, 4, 5, 6], news, Priority.PREFETCH)
    reader.submit(hastened)
    reader.rank(hastened, Rank(Priority.ONLINE))
    opened = os.open(tmp_path / "pipe", os.O_RDWR)  # kept until the reader has opened it, too
    assert until_last(others)[-1].error is not None
    os.close(opened)
    assert [len(batch.landed) for batch in until_last(news)] == [4]


@pytest.mark.parametrize("rank", [(Priority.PREFETCH, 0), (Priority.ONLINE, 3)])
def test_what_ranks_after_a_load_begins_no_read_while_that_one_prepares(
    tmp_path: Path, begin: Begin, rank: tuple[int, int]
) -> None:
    reader, news, other = begin(threads=1, rate=SLOW), queue.SimpleQueue[Batch](), queue.SimpleQueue[Batch]()
    reader.yield_to(1)
    reader.yield_to(2)
    held = transfer(tmp_path / "held", 2 * MB, [0, 1], news, *rank)
    reader.submit(held)
    reader.submit(transfer(tmp_path / "first", 2 * MB, [2, 3], other, Priority.ONLINE, 1))
    until_last(other)
    reader.go_on(1)
    reader.submit(transfer(tmp_path / "second", 2 * MB, [2, 3], other, Priority.ONLINE, 2))
    until_last(other)
    reader.cancel(held)
    assert until_last(news)[-1].last
    assert held.started == 0
    reader.submit(transfer(tmp_path / "next", 2 * MB, [0, 1], news, *rank))
    reader.go_on(2)
    reader.go_on(2)
    assert sum(span.length for batch in until_last(news) for span in batch.landed) == 2 * MB


def test_cancelled_ends_before_others_and_reads_no_more(tmp_path: Path, begin: Begin) -> None:
    reader, news, other = begin(threads=1, rate=SLOW), queue.SimpleQueue[Batch](), queue.SimpleQueue[Batch]()
    read = transfer(tmp_path / "a", 4 * MB, [0, 1, 2, 3], news)
    reader.submit(transfer(tmp_path / "b", 2 * MB, [4, 5], other, -1))
    reader.submit(read)
    reader.cancel(read)
    batch = until_last(news)[-1]
    assert batch == Batch((), Came(), True, None)
    assert read.started == 0
    assert other.qsize() <= 2  # of four
    until_last(other)
    reader.cancel(read)


def test_an_error_ends_a_transfer_once_and_no_other(tmp_path: Path, begin: Begin) -> None:
    reader, news, other = begin(), queue.SimpleQueue[Batch](), queue.SimpleQueue[Batch]()
    bad = transfer(tmp_path / "a", 2 * MB, [0, 1], news)
    (tmp_path / "a").unlink()
    opened = descriptors(tmp_path)
    reader.submit(bad)
    reader.submit(transfer(tmp_path / "b", 1, [2], other))
    batches = until_last(news)
    assert len(batches) == 1
    assert "No such file" in str(batches[0].error)
    assert until_last(other)[-1].error is None
    assert news.empty()
    assert descriptors(tmp_path) == opened


class Broken(NamedTuple):
    """A file that fails in a way that nobody foresaw: when it is opened, read or closed."""

    fails: str
    path: str = "broken"
    size: int = MB

    def open(self) -> Opened:
        self._do("open")
        return self

    def read(self, buffers: Sequence[memoryview], offset: int, length: int, staging: object = None) -> Came:
        self._do("read")
        return Came(disk=length)

    def check(self) -> None: ...
    @property
    def longest(self) -> int:
        return 0

    def close(self) -> None:
        self._do("close")

    def _do(self, what: str) -> None:
        if what == self.fails:
            raise KeyError(what)


@pytest.mark.parametrize("fails", ["open", "read", "close"])
def test_what_nobody_foresaw_ends_a_transfer_and_no_thread(
    tmp_path: Path, begin: Begin, caplog: pytest.LogCaptureFixture, fails: str
) -> None:
    reader, news = begin(threads=1), queue.SimpleQueue[Batch]()
    piece = Piece(0, 0, MB)
    for _ in range(2):
        reader.submit(Transfer([Broken(fails)], {piece: 0}, [piece], news.put))
        (batch,) = until_last(news)
        assert isinstance(batch.error, TransientError)
        assert str(batch.error) == f"broken: KeyError: '{fails}'"
    assert caplog.text.count("Traceback") == 2
    reader.submit(transfer(tmp_path / "good", 1, [1], news))
    assert until_last(news)[-1].error is None


def test_a_file_changed_while_it_is_read_is_an_error(tmp_path: Path, begin: Begin) -> None:
    reader, news = begin(rate=SLOW), queue.SimpleQueue[Batch]()
    reader.submit(transfer(tmp_path / "a", 4 * MB, [0, 1, 2, 3], news))
    news.get(timeout=30)
    with (tmp_path / "a").open("r+b") as file:
        file.write(b"changed")
    assert "changed after its header was read" in str(until_last(news)[-1].error)


def test_a_file_cut_while_it_is_read_is_closed(tmp_path: Path, begin: Begin) -> None:
    reader, news = begin(rate=SLOW), queue.SimpleQueue[Batch]()
    opened = descriptors(tmp_path)
    reader.submit(transfer(tmp_path / "a", 6 * MB, list(range(6)), news))
    news.get(timeout=30)
    os.truncate(tmp_path / "a", MB)
    assert "it was cut" in str(until_last(news)[-1].error)
    assert descriptors(tmp_path) == opened


def descriptors(folder: Path) -> int:
    """Of files in it."""
    count = 0
    for one in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it is closed by now
            count += one.readlink().is_relative_to(folder)
    return count


def test_a_file_is_open_from_its_first_call_to_its_last(tmp_path: Path, begin: Begin) -> None:
    reader, news = begin(threads=1, rate=SLOW), queue.SimpleQueue[Batch]()
    opened: list[int] = []

    def deliver(batch: Batch) -> None:
        opened.append(descriptors(tmp_path))
        news.put(batch)

    before = descriptors(tmp_path)
    one, *others = [transfer(tmp_path / str(slot), nbytes, [slot], news) for slot, nbytes in enumerate((MB, 1, 1, 1))]
    both = Piece(0, 0, MB), *(Piece(number, 0, 1) for number in (1, 2, 3))
    files = [*one.files, *(other.files[0] for other in others)]
    read = Transfer(files, {piece: number for number, piece in enumerate(both)}, both, deliver)
    reader.submit(read)
    news.get(timeout=30)
    (tmp_path / "0").unlink()  # it is not opened again, whatever becomes of its calls
    reader.rank(read, Rank(Priority.PREFETCH))
    assert until_last(news)[-1].error is None
    assert opened[0] > before
    assert opened[-4:] == [before] * 4, "each is closed before it is told of"


def test_a_transfer_that_is_hastened_overtakes_what_was_before_it(tmp_path: Path, begin: Begin) -> None:
    reader = begin(threads=1, rate=SLOW)
    first, second = queue.SimpleQueue[Batch](), queue.SimpleQueue[Batch]()
    overtaken = transfer(tmp_path / "a", 4 * MB, [0, 1, 2, 3], first, 1)
    overtaking = transfer(tmp_path / "b", 2 * MB, [4, 5], second, 1)
    began = time.monotonic()
    reader.submit(overtaken)
    first.get(timeout=30)
    reader.submit(overtaking)
    reader.rank(overtaking, Rank(0))
    assert until_last(second)[-1].error is None
    assert until_last(first)[-1].error is None
    assert overtaking.ended < overtaken.ended
    assert overtaken.busy + overtaking.busy < time.monotonic() - began, "it did not read meanwhile"
    reader.rank(overtaking, Rank(0))  # it has ended


def test_what_is_cancelled_ends_first_and_moves_nobody(tmp_path: Path, begin: Begin) -> None:
    reader, news = begin(threads=1, rate=SLOW), [queue.SimpleQueue[Batch]() for _ in range(3)]
    cancelled = transfer(tmp_path / "cancelled", 6 * MB, list(range(6)), news[0], 1)
    first, second = (transfer(tmp_path / str(slot), MB, [slot], news[slot - 5]) for slot in (6, 7))
    reader.submit(cancelled)
    news[0].get(timeout=30)
    reader.submit(first)
    reader.cancel(cancelled)
    reader.submit(second)
    reader.rank(cancelled, Rank(0))  # too late
    ends = [until_last(one)[-1] for one in news]
    assert [end.error for end in ends] == [None] * 3
    assert cancelled.ended < first.ended < second.ended


def test_close_drops_the_queue(tmp_path: Path, begin: Begin) -> None:
    reader, news = begin(rate=SLOW), queue.SimpleQueue[Batch]()
    reader.submit(transfer(tmp_path / "a", 7 * MB, list(range(7)), news))
    news.get(timeout=30)
    assert reader.close()
    assert not any(news.get().last for _ in range(news.qsize()))


def hanging(path: Path, slots: list[int], news: queue.SimpleQueue[Batch]) -> Transfer:
    """A transfer whose file does not open before somebody writes to it."""
    os.mkfifo(path)
    pieces = plan.cut(Piece(0, 0, len(slots) * MB), MB)
    files = [SourceFile(path, len(slots) * MB, 0)]
    return Transfer(files, dict(zip(pieces, slots, strict=True)), pieces, news.put)


@contextlib.contextmanager
def let_go(*paths: Path) -> Iterator[None]:
    """They open, whoever came or comes, and are not what they were said to be."""
    ends = [os.open(path, os.O_RDWR) for path in paths]
    try:
        yield
    finally:
        for end in ends:
            os.close(end)


@pytest.mark.parametrize("rate", [0.0, SLOW])  # one call of it, or many
def test_reads_that_hang_keep_no_other_waiting(
    tmp_path: Path, begin: Begin, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, rate: float
) -> None:
    monkeypatch.setattr(module, "STUCK_S", 0.02)
    reader, stuck, news = begin(threads=2, rate=rate), queue.SimpleQueue[Batch](), queue.SimpleQueue[Batch]()
    bad = [hanging(tmp_path / name, slots, stuck) for name, slots in (("a", [0, 1, 2]), ("b", [3]), ("c", [4]))]
    for one in bad:
        reader.submit(one)
    reader.submit(transfer(tmp_path / "good", 1, [5], news))
    assert until_last(news)[-1].error is None
    assert f"{tmp_path}/a: a read at byte 0 has not returned" in caplog.text
    for one in bad:
        reader.cancel(one)
    reader.submit(transfer(tmp_path / "late", 1, [5], news))
    until_last(news)
    assert stuck.empty()  # they may still write to their slots
    with let_go(*(Path(one.files[0].path) for one in bad)):
        assert ["changed" in str(until_last(stuck)[-1].error) for _ in bad] == [True] * 3
    while len(reader._threads) > 2:  # those in their place go
        reader.submit(transfer(tmp_path / "good", 1, [5], news))
        until_last(news)
    monkeypatch.undo()
    assert reader.close()


def test_a_read_that_hangs_keeps_nobody_from_closing(
    tmp_path: Path, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STUCK_S", 0.02)
    reader, stuck, news = begin(threads=2), queue.SimpleQueue[Batch](), queue.SimpleQueue[Batch]()
    reader.submit(hanging(tmp_path / "a", [0], stuck))
    reader.submit(transfer(tmp_path / "b", 1, [1], news))
    until_last(news)
    assert not reader.close()
    with let_go(tmp_path / "a"):
        assert until_last(stuck)[-1].error is not None
    monkeypatch.undo()
    assert reader.close()


@pytest.fixture
def exhausted(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The system has no threads left, until this is undone."""

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(module, "STUCK_S", 0.02)
    monkeypatch.setattr(threading.Thread, "start", start)
    return monkeypatch


def test_a_stuck_thread_is_replaced_as_soon_as_the_system_has_another(
    tmp_path: Path, begin: Begin, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    reader, stuck, news = begin(threads=1, stuck_s=0.02), queue.SimpleQueue[Batch](), queue.SimpleQueue[Batch]()
    patched: pytest.MonkeyPatch = request.getfixturevalue("exhausted")
    reader.submit(hanging(tmp_path / "a", [0], stuck))
    reader.submit(transfer(tmp_path / "b", 1, [1], news))
    until(lambda: "no thread reads in the place of one that is stuck" in caplog.text, "the watcher")
    assert news.empty()
    patched.undo()
    assert until_last(news)[-1].error is None
    with let_go(tmp_path / "a"):
        until_last(stuck)


def test_a_reader_without_all_of_its_threads_keeps_none(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    hire, before = threading.Thread.start, threading.active_count()

    def start(thread: threading.Thread) -> None:
        if threading.active_count() > before + 1:
            raise RuntimeError("can't start new thread")
        hire(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="can't start"):
        Reader(pool, threads=4)
    until(lambda: threading.active_count() == before, "the threads to end")


def test_a_slow_disk_is_told_of_once_a_transfer(begin: Begin, caplog: pytest.LogCaptureFixture) -> None:
    reader = begin(threads=1)
    slow = Transfer([SourceFile(Path("/slow"), 2 * MB, 0)], {}, [], lambda _: None)
    for offset in (0, MB):
        with reader._wake:
            reader._give_up(module._Read(slow, (Piece(0, offset, MB),), 0.0))
    assert [record.getMessage() for record in caplog.records] == ["/slow: a read at byte 0 has not returned for 5.0 s"]


def test_under_a_cap_nothing_is_staged(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cap is slower than the copy is dear."""
    monkeypatch.setattr(module, "pays", lambda pages: True)
    readers = [begin(threads=1, rate=rate) for rate in (0.0, SLOW)]
    assert [reader._staged for reader in readers] == [True, False]
