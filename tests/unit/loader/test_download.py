"""The record of ranges, and files that come by ranges from a real server, with what goes wrong on the way."""

from __future__ import annotations

import errno
import mmap
import os
import random
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from zlib import crc32

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serverless_llm.errors import CheckpointError, TransientError
from serverless_llm.loader import download, manifest, remote
from serverless_llm.loader.download import Piece, add, apart, joined, line, missing, recorded
from serverless_llm.loader.remote import Remote
from serverless_llm.loader.source import OpenFile, SourceFile
from serverless_llm.loader.uncached import PAGE, Written
from tests.range_server import RangeServer
from tests.serving import until
from tests.unit.loader.checkpoints import full, spoil

SIZES = [1000, 0, 7]
PIECES = st.builds(Piece, st.integers(0, 3), st.integers(0, 1100), st.integers(0, 1100), st.integers(0, 2**32 - 1))


@given(st.lists(PIECES), st.integers(1, 300), st.booleans())
@example([Piece(0, 0, 9, 1), Piece(2, 0, 5, 1)], 300, False)
def test_what_is_recorded_and_what_is_missing_make_the_whole(pieces: list[Piece], most: int, overlap: bool) -> None:
    found = recorded("".join(map(line, pieces)), SIZES)
    assert {*found} <= {*pieces}
    assert all(a.file < b.file or (a.start < b.start and a.stop < b.stop) for a, b in pairwise(found))
    have = joined(found if overlap else apart(found))
    if not overlap:
        assert sum(one.stop - one.start for one in apart(found)) == sum(one.stop - one.start for one in have)
    gaps = missing(iter(have), SIZES, most)  # which goes over them once, however many files there are
    assert all(0 < one.stop - one.start <= most for one in gaps)
    covered = [(one.file, byte) for one in (*have, *gaps) for byte in range(one.start, one.stop)]
    assert sorted(covered) == [(file, byte) for file, size in enumerate(SIZES) for byte in range(size)]


SOME = Piece(0, 20, 30, 1)


@pytest.mark.parametrize("piece", [(0, 5, 5), (0, 0, 1001), (3, 0, 5), (0, -1, 5), (0, 0, 10**5000), (10**5000, 0, 1)])
def test_a_line_that_is_no_piece_counts_for_nothing(piece: tuple[int, int, int]) -> None:
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    row = line(Piece(*piece, 1))
    sys.set_int_max_str_digits(limit)
    assert recorded(line(SOME) + row, SIZES) == [SOME]


@pytest.mark.parametrize("row", ["0 0 5\n", "0 0 5 9\n", "0 0 5 00000000 00000000\n", "0 0 \u0665\n", "\0\0\0\n", "\n"])
def test_a_line_that_tells_nothing_of_itself_counts_for_nothing(row: str) -> None:
    assert recorded(line(SOME) + row, SIZES) == [SOME]


@given(PIECES, PIECES, st.integers(0, 60))
def test_a_line_that_was_cut_makes_no_other_of_the_next(one: Piece, other: Piece, cut: int) -> None:
    assert {*recorded(line(one)[:cut] + line(other), SIZES)} <= {one, other}


@given(PIECES, st.integers(0, 60), st.characters())
def test_a_line_in_which_one_character_changed_counts_for_nothing(one: Piece, place: int, other: str) -> None:
    row = line(one)
    changed = row[:place] + other + row[place + 1 :]
    assert recorded(changed, SIZES) in ([], recorded(row, SIZES))


def test_a_record_that_the_disk_takes_in_part_is_an_error(tmp_path: Path) -> None:
    with (tmp_path / "record").open("w") as record, pytest.raises(OSError, match="File too large"), full(100):
        add(record.fileno(), [Piece(0, at, at + 10, 0) for at in range(0, 1000, 10)])
    assert len(recorded((tmp_path / "record").read_text(), SIZES)) == 100 // len(line(Piece(0, 10, 20, 0)))


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "RETRY", {"max_retries": 0})


@pytest.fixture
def server() -> RangeServer:
    return RangeServer({"m/model.safetensors": random.Random(1).randbytes(1 << 20), "m/config.json": b"{}"})


def bring(
    source: Remote,
    folder: Path,
    told: download.Told = lambda name, done, total: None,
    memory: Mapping[str, memoryview] | None = None,
) -> bytes:
    files = source.files()
    folder.mkdir(exist_ok=True)
    download.prepare(folder, files)
    download.download(source, files, folder, told, memory or {})
    return (folder / manifest.CHECKPOINT / "model.safetensors").read_bytes()


def test_files_come_whole_and_are_told_of(server: RangeServer, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    with server:
        assert (
            bring(Remote(f"{server.url}/m"), tmp_path, lambda *one: told.append(one))
            == server.files["m/model.safetensors"]
        )
    assert told[-1] == ("model.safetensors", 1 << 20, 1 << 20)
    assert ("config.json", 2, 2) in told
    assert server.gets.count("m/model.safetensors") >= download.CONNECTIONS


def test_what_is_written_stands_in_the_record_whatever_the_disk_still_has_to_sync(
    server: RangeServer, tmp_path: Path
) -> None:
    def told(name: str, done: int, total: int) -> None:  # while nothing is synced
        def there() -> int:
            pieces = recorded((tmp_path / download.RECORD).read_text(), [total, total])
            return sum(one.stop - one.start for one in pieces)

        if done:
            until(lambda: there() >= min(total, done + 200_000), "more to be recorded")

    with server:
        bring(Remote(f"{server.url}/m"), tmp_path, told)


def test_what_is_wanted_in_memory_is_there_whatever_came_before(server: RangeServer, tmp_path: Path) -> None:
    wanted = memoryview(mmap.mmap(-1, 1 << 20))
    with server:
        source = Remote(f"{server.url}/m")
        server.faults.fails_after = 500_000
        with pytest.raises(TransientError, match="500"):
            bring(source, tmp_path, memory={"model.safetensors": wanted})
        with (tmp_path / download.RECORD).open("a") as record:
            record.write(line(Piece(1, 1048000, 1048111, crc32(b"\7" * 111))))  # as of no page's length
        with (tmp_path / manifest.CHECKPOINT / "model.safetensors").open("r+b") as file:
            file.seek(1048000)
            file.write(b"\7" * 111)  # which the memory must have
        server.faults.fails_after = None
        wanted[:] = bytes(1 << 20)
        came = bring(source, tmp_path, memory={"model.safetensors": wanted})
    expected = bytearray(server.files["m/model.safetensors"])
    expected[1048000:1048111] = b"\7" * 111
    assert came == wanted == expected


def test_bytes_go_past_the_page_cache(server: RangeServer, tmp_path: Path) -> None:
    with server:
        source = Remote(f"{server.url}/m")
        files = source.files()
        download.prepare(tmp_path, files)
        download.download(source, files, tmp_path, lambda name, done, total: None, {})
    path = tmp_path / manifest.CHECKPOINT / "model.safetensors"
    opened = OpenFile(SourceFile(path, path.stat().st_size, path.stat().st_mtime_ns))
    place = memoryview(mmap.mmap(-1, 1 << 20))
    try:
        assert not opened.read([place], 0, 1 << 20).cache
    finally:
        opened.close()


@pytest.mark.slow
@settings(max_examples=50)
@given(st.sampled_from([0, 1, 512, PAGE, 3 * PAGE]), st.integers(0, 5 * PAGE), st.sampled_from([0, 1, 512]))
@example(0, PAGE, 1)
def test_any_bytes_from_anywhere_are_written(offset: int, nbytes: int, shift: int) -> None:
    memory = memoryview(mmap.mmap(-1, 8 * PAGE))
    memory[:] = random.Random(0).randbytes(len(memory))
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(offset)
        with Written(Path(file.name)) as written:
            written.write(memory[shift : shift + nbytes], offset)
        assert Path(file.name).read_bytes() == bytes(offset) + memory[shift : shift + nbytes]


@pytest.mark.parametrize("etag", ["", None, "W/"])
def test_connections_that_break_off_cost_nothing(server: RangeServer, tmp_path: Path, etag: str | None) -> None:
    server.faults.resets, server.faults.reset_after, server.faults.etag = 20, 30_000, etag
    with server:
        assert bring(Remote(f"{server.url}/m"), tmp_path) == server.files["m/model.safetensors"]
    assert server.faults.resets == 0


def test_what_came_before_an_error_is_not_read_again(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "CONNECTIONS", 1)
    with server:
        source, tail = Remote(f"{server.url}/m"), server.files["m/model.safetensors"][-1000:]
        server.faults.fails_after = 700_000
        with pytest.raises(TransientError, match=r"/m/model\.safetensors: .*500 Internal Server Error"):
            bring(source, tmp_path)
        server.faults.fails_after, server.sent = None, 0
        told: list[int] = []
        assert bring(source, tmp_path, lambda name, done, total: told.append(done))[-1000:] == tail
    assert server.sent < 450_000
    assert max(told) == 1 << 20
    assert min(one for one in told if one > 2) > 600_000
    lines = (tmp_path / download.RECORD).read_text().splitlines()
    assert len(lines) == len(set(lines)) > 8


def test_a_machine_without_threads_is_told_and_those_that_it_had_end(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, begun, goes_on = threading.Thread.start, list[threading.Thread](), threading.Event()

    def exhausted(thread: threading.Thread) -> None:
        if len(begun) == 2:
            raise RuntimeError("can't start new thread")
        begun.append(thread)
        start(thread)

    monkeypatch.setattr(download, "JOIN_SECONDS", 0.0)
    with server:
        source = Remote(f"{server.url}/m")
        files = source.files()
        download.prepare(tmp_path, files)
        server._loop.call_soon_threadsafe(goes_on.wait)
        try:
            with monkeypatch.context() as patched:
                patched.setattr(threading.Thread, "start", exhausted)
                with pytest.raises(TransientError, match="the machine has no more: can't start new thread"):
                    download.download(source, files, tmp_path, lambda name, done, total: None, {})
        finally:
            goes_on.set()
        until(lambda: not any(thread.is_alive() for thread in begun), "the threads to end")
        assert len(server.gets) <= len(begun)
        assert bring(source, tmp_path) == server.files["m/model.safetensors"]


def test_a_machine_without_memory_is_told(server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: int) -> mmap.mmap:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(mmap, "mmap", exhausted)
    with server, pytest.raises(TransientError, match=r"no memory for what comes of .*/m: Cannot allocate memory$"):
        bring(Remote(f"{server.url}/m"), tmp_path)


def test_memory_that_ends_while_it_is_compared_is_told(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: object) -> bool:
        raise MemoryError

    with server:
        bring(Remote(f"{server.url}/m"), tmp_path)
        monkeypatch.setattr(download, "intact", exhausted)
        with pytest.raises(TransientError, match=r"no memory for what comes of .*/m$"):
            bring(Remote(f"{server.url}/m"), tmp_path)


def test_a_panic_of_what_reads_ends_it(server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicError(BaseException):
        """As a library of Rust raises."""

    def panics(*_: object, **__: object) -> Iterator[bytes]:
        raise PanicError

    monkeypatch.setattr(Remote, "read", panics)
    with server, pytest.raises(PanicError):
        bring(Remote(f"{server.url}/m"), tmp_path)


def test_a_write_that_hangs_with_its_disk_is_waited_for_and_none_follows(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, begun, goes_on, ended = os.pwrite, threading.Event(), threading.Event(), threading.Event()
    late: list[int] = []

    def hangs(descriptor: int, data: memoryview, offset: int) -> int:
        begun.set()
        goes_on.wait()
        late.extend([offset] if ended.is_set() else [])
        return real(descriptor, data, offset)

    def call() -> None:
        with pytest.raises(CheckpointError, match=r"config\.json is not there"):
            download.download(source, files, tmp_path, lambda name, done, total: None, {})
        ended.set()

    monkeypatch.setattr(download, "JOIN_SECONDS", 0.0)
    monkeypatch.setattr(os, "pwrite", hangs)
    with server:
        source = Remote(f"{server.url}/m")
        files = source.files()
        download.prepare(tmp_path, files)
        server.faults.statuses = {"m/config.json": 404}
        before = {*threading.enumerate()}
        caller = threading.Thread(target=call)
        caller.start()
        begun.wait()
        caller.join(0.2)
        goes_on.set()
        until(lambda: before >= {*threading.enumerate()}, "all threads to end")
    assert ended.is_set()
    assert not late


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
@pytest.mark.parametrize("wanted", [False, True])
def test_what_was_damaged_since_it_came_is_read_again(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, wanted: bool
) -> None:
    monkeypatch.setattr(download, "CONNECTIONS", 1)
    path, content = tmp_path / manifest.CHECKPOINT / "model.safetensors", server.files["m/model.safetensors"]
    memory = memoryview(mmap.mmap(-1, len(content)))
    with server:
        source = Remote(f"{server.url}/m")
        server.faults.fails_after = 700_000
        with pytest.raises(TransientError):
            bring(source, tmp_path)
        server.faults.fails_after, server.sent = None, 0
        spoil(path, 300_000, damage)
        told: list[int] = []
        memories = {path.name: memory} if wanted else {}
        assert bring(source, tmp_path, lambda name, done, total: told.append(done), memories) == content
    assert max(told) == len(content)
    assert bytes(memory) == (content if wanted else bytes(len(content)))
    again = {"flipped": 1 << 16, "cut": 400_000}.get(damage, 700_000)
    assert server.sent <= len(content) - 650_000 + again


def test_a_record_without_digests_counts_for_nothing(server: RangeServer, tmp_path: Path) -> None:
    with server:
        source = Remote(f"{server.url}/m")
        download.prepare(tmp_path, source.files())
        (tmp_path / download.RECORD).write_text("1 0 1048576\n")
        assert bring(source, tmp_path) == server.files["m/model.safetensors"]


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        ({"shift": 5}, r"Requested \d+\.\.\d+, got \d+"),
        ({"extra": 5}, "sent more than the range"),
        ({"missing": 5}, "sent less than the range"),
        ({"whole": True}, "answers no ranges"),
        ({"etag": "other"}, "was changed while it was read: try again"),
        ({"etag": "other", "deaf": True}, "was changed while it was read: try again"),
        ({"statuses": {"m/config.json": 403}}, "config.json may not be read"),
        ({"statuses": {"m/config.json": 404}}, "config.json is not there"),
    ],
)  # fmt: skip
def test_servers_that_lie_are_told(server: RangeServer, tmp_path: Path, faults: dict[str, object], said: str) -> None:
    with server:
        source = Remote(f"{server.url}/m")
        files = source.files()
        for name, value in faults.items():
            setattr(server.faults, name, value)
        download.prepare(tmp_path, files)
        with pytest.raises(CheckpointError, match=said) as raised:
            download.download(source, files, tmp_path, lambda name, done, total: None, {})
    assert f"{server.url}/m" in str(raised.value)
