"""Both ways into a file, and what is wrong with files."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from serverless_llm.errors import CheckpointError, TransientError
from serverless_llm.loader import source
from serverless_llm.loader.source import Came, OpenFile, SourceFile
from serverless_llm.loader.staging import Staging


def written(path: Path, content: bytes, cold: bool = False) -> SourceFile:
    path.write_bytes(content)
    if cold:
        evict(path)
    stat = path.stat()
    return SourceFile(path, stat.st_size, stat.st_mtime_ns)


def evict(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def memory(*lengths: int) -> list[memoryview]:
    whole = memoryview(mmap.mmap(-1, sum(lengths)))
    starts = [sum(lengths[:n]) for n in range(len(lengths))]
    return [whole[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def content(nbytes: int) -> bytes:
    return os.urandom(nbytes)


def fetch(
    file: OpenFile, offset: int, length: int, *buffers: int, staging: Staging | None = None
) -> tuple[bytes, bool]:
    """What was read, and whether the page cache had it."""
    views = memory(*buffers)
    came = file.read(views, offset, length, staging)
    assert came in (Came(disk=length), Came(cache=length))
    return b"".join(views)[:length], came.cache == length


@pytest.mark.parametrize("staged", [True, False])
@pytest.mark.parametrize("cold", [True, False])
def test_scattered_with_a_tail_that_is_no_page(tmp_path: Path, cold: bool, staged: bool) -> None:
    data = content(20_001)
    file = OpenFile(written(tmp_path / "a", data, cold))
    staging = Staging(16_384) if staged else None
    got, cached = fetch(file, 4096, len(data) - 4096, 8192, 8192, staging=staging)
    assert got == data[4096:]
    assert cached != cold
    if staging:
        assert (staging.view[: len(data) - 4096] == data[4096:]) == cold
    file.close()


def test_half_in_the_page_cache_is_read_from_the_disk(tmp_path: Path) -> None:
    data = content(2 << 20)
    file = OpenFile(written(tmp_path / "a", data, cold=True))
    os.posix_fadvise(file._buffered, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead
    os.pread(file._buffered, 4096, 0)
    assert source.cached_pages(file._buffered, 0, len(data)) in (None, 1)
    assert fetch(file, 0, len(data), len(data)) == (data, False)
    file.close()


@pytest.mark.parametrize("cold", [True, False])
def test_where_the_system_does_not_tell_of_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cold: bool
) -> None:
    """A kernel before 6.5, or a container that forbids the call."""
    monkeypatch.setattr(source, "_CACHESTAT", 100_000)
    data = content(10_000)
    file = OpenFile(written(tmp_path / "a", data, cold))
    assert fetch(file, 0, len(data), 12288) == (data, not cold)
    file.close()


def test_where_there_is_no_direct_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags)

    real = os.open
    monkeypatch.setattr(os, "open", refuse)
    data = content(10_000)
    file = OpenFile(written(tmp_path / "a", data, cold=False))
    monkeypatch.undo()
    evict(tmp_path / "a")
    assert fetch(file, 0, len(data), 12288) == (data, False)
    file.close()


def test_a_device_that_wants_another_alignment_is_read_through_the_cache(tmp_path: Path) -> None:
    data = content(10_000)
    file = OpenFile(written(tmp_path / "a", data, cold=True))
    buffer = memory(16384)[0][1:]
    assert file.read([buffer], 0, len(data)) == Came(disk=len(data))
    assert buffer[: len(data)] == data
    file.close()


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    known = written(tmp_path / "a", content(5000))
    file = OpenFile(known)
    with (tmp_path / "a").open("ab") as more:
        more.write(b"x")
    with pytest.raises(CheckpointError, match=r"a was changed after its header was read"):
        file.check()
    file.close()
    with pytest.raises(CheckpointError, match="changed") as changed:
        OpenFile(known)
    assert not isinstance(changed.value, TransientError)
    with pytest.raises(TransientError, match="No such file"):
        OpenFile(known._replace(path=tmp_path / "b"))


@pytest.mark.parametrize("cold", [True, False])
def test_a_file_that_was_cut_is_an_error(tmp_path: Path, cold: bool) -> None:
    file = OpenFile(written(tmp_path / "a", content(20_000)))
    os.truncate(tmp_path / "a", 9000)
    if cold:
        evict(tmp_path / "a")
    with pytest.raises(CheckpointError, match="ends at byte"):
        fetch(file, 0, 20_000, 20_480)
    file.close()


def test_a_check_that_the_system_refuses_proves_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> os.stat_result:
        raise OSError(errno.ESTALE, "Stale file handle")

    file = OpenFile(written(tmp_path / "a", content(5000)))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", fail)
        with pytest.raises(TransientError, match="Stale file handle"):
            file.check()
    file.close()


def test_a_failing_device_is_named_with_the_offset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        raise OSError(errno.EIO, "Input/output error")

    file = OpenFile(written(tmp_path / "a", content(9000), cold=True))
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(TransientError, match=r"a, bytes 4096 to 9000: Input/output error"):
        fetch(file, 4096, 4904, 8192)
    monkeypatch.undo()
    file.close()


def test_short_reads_go_on_from_a_whole_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(descriptor: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        return real(descriptor, [buffers[0][:4608]], offset, flags)

    data = content(30_000)
    file = OpenFile(written(tmp_path / "a", data, cold=True))
    real = os.preadv
    monkeypatch.setattr(os, "preadv", short)
    assert fetch(file, 0, len(data), 8192, 8192, 16384) == (data, False)
    monkeypatch.undo()
    file.close()
