"""The pool: its slots, its sharing by descriptor, and its memory."""

from __future__ import annotations

import mmap
import os
import re
import sys
from pathlib import Path

import pytest

from serverless_llm.errors import CapacityError
from serverless_llm.loader import hugefile
from serverless_llm.loader.pool import LARGE, MAX_SLOT, MIN_SLOT, Pool, shared_huge_pages, slot_size


@pytest.mark.parametrize(
    ("capacity", "size"),
    [
        (1, MIN_SLOT),
        ((256 << 20) - 1, MIN_SLOT),
        (256 << 20, 2 << 20),
        (2 << 30, 2 << 20),
        (12 << 30, 8 << 20),
        (100 << 30, MAX_SLOT),
        (1 << 40, MAX_SLOT),
    ],
)
def test_slots_follow_the_capacity(capacity: int, size: int) -> None:
    assert slot_size(capacity) == size


def test_capacity_is_whole_slots() -> None:
    pool = Pool((5 << 20) - 1)
    assert (pool.slots, pool.capacity, pool.offset(3)) == (4, 4 << 20, 3 << 20)
    pool.close()
    with pytest.raises(CapacityError, match="no slot"):
        Pool(MIN_SLOT - 1)


def test_what_is_written_is_seen_through_the_descriptor() -> None:
    pool = Pool(4 << 20)
    pool.range(pool.offset(2), 4)[:] = b"abcd"
    with mmap.mmap(pool.fd, pool.capacity, prot=mmap.PROT_READ) as other:
        assert other[2 << 20 : (2 << 20) + 4] == b"abcd"
    pool.close()


def test_memory_comes_with_writing_and_goes_with_punching() -> None:
    punched: list[int] = []
    pool = Pool(8 << 20, punched.append)
    assert pool.memory == 0
    for slot in range(3):
        pool.range(pool.offset(slot), pool.slot_bytes)[:] = bytes(pool.slot_bytes)
    assert pool.memory >= 3 << 20
    pool.punch([0, 2])
    assert pool.memory < 3 << 20
    os.close(os.dup(pool.fd))
    with pytest.raises(OSError, match="fallocate"):
        pool.punch([-1])
    assert punched == [0, 2 << 20]
    pool.close()


def test_touched_memory_is_there_and_keeps_its_bytes() -> None:
    pool = Pool(8 << 20)
    pool.range(pool.offset(2), 4)[:] = b"abcd"
    pool.touch(2)
    pool.touch(5)
    assert pool.memory == 2 << 20
    assert bytes(pool.range(pool.offset(2), 8)) == b"abcd\0\0\0\0"
    pool.close()


def mapped_huge(name: str) -> int:
    """Bytes of a file's mappings in this process that are huge pages."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            inside = name in line
        elif inside and line.startswith("ShmemPmdMapped:"):
            total += int(line.split()[1]) << 10
    return total


def may_mount() -> bool:
    """Whether this process may make namespaces and mount in them: CAP_SYS_ADMIN."""
    status = Path("/proc/self/status").read_text()
    return bool(int(re.findall(r"CapEff:\s+(\w+)", status)[0], 16) >> 21 & 1)


def test_a_tmpfs_of_its_own_has_huge_pages_whatever_the_setting() -> None:
    mounts = Path("/proc/self/mounts").read_text()
    descriptor = hugefile.open_file(8 << 20)
    if descriptor is None:
        assert not may_mount()
        pytest.skip("no mount may be made here")
    os.ftruncate(descriptor, 8 << 20)
    with mmap.mmap(descriptor, 8 << 20) as memory:
        memory[:] = b"\1" * len(memory)
        assert mapped_huge(str(Path(f"/proc/self/fd/{descriptor}").readlink())) > 0
    assert not os.get_inheritable(descriptor)
    os.close(descriptor)
    assert Path("/proc/self/mounts").read_text() == mounts


def test_where_no_process_can_be_started_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    opened = len(list(Path("/proc/self/fd").iterdir()))
    assert hugefile.open_file(8 << 20) is None
    assert len(list(Path("/proc/self/fd").iterdir())) == opened
    pool = Pool(LARGE)
    assert pool.pages == "small" or shared_huge_pages()
    pool.close()


def test_the_kind_of_page_is_what_the_system_offers() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled").read_text()
    pool = Pool(4 << 20)
    assert pool.pages == ("small" if "[never]" in setting or "[deny]" in setting else "huge")
    pool.close()
    large = Pool(LARGE)
    large.touch(0)
    assert large.memory == large.slot_bytes == 2 << 20
    large.punch([0])
    assert large.memory == 0
    assert large.pages == "huge" or not may_mount()
    large.close()
