"""Address ranges: what is placed is seen; they live as long as anything refers to them."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import pytest
import torch

from serverless_llm.loader.memory import Range, want_huge
from serverless_llm.loader.pool import HUGE_PAGE, Pool
from serverless_llm.loader.staging import SETTING
from tests.unit.loader.mappings import resident, wanted_huge


def mapped(address: int) -> bool:
    spans = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(start, 16) <= address < int(stop, 16) for start, stop in spans)


def test_page_faults_are_taken_and_undone_at_will() -> None:
    pool = Pool(2 << 20)
    pool.range(0, 2 << 20)[:] = bytes(range(256)) * (8 << 10)
    home = Range(2 << 20)
    home.place(0, 2 << 20, pool.fd, 0)
    assert (resident(home), home.missing([0, 1 << 20])) == (0, [0, 1 << 20])
    home.populate(0, 2 << 20)
    assert (resident(home), home.missing([0, 1 << 20])) == (2 << 20, [])
    home.release(0, 1 << 20)
    assert (resident(home), home.missing([0, 1 << 20])) == (1 << 20, [0])
    assert bytes(memoryview(home.buffer)[:256]) == bytes(range(256))
    assert home.close()
    pool.close()


def test_it_is_unused_when_nothing_made_from_it_is_left() -> None:
    home = Range(1 << 20)
    pool = Pool(1 << 20)
    home.place(0, 1 << 20, pool.fd, 0)
    assert home.unused()
    tensor = torch.frombuffer(home.buffer, dtype=torch.uint8, count=4, offset=8).view(torch.int32)
    assert not home.unused()
    part = tensor[:0]
    del tensor
    assert not home.unused()
    del part
    assert home.unused()
    assert home.close()
    pool.close()


def test_slots_in_any_order_make_one_range() -> None:
    pool = Pool(4 << 20)
    for slot, letter in enumerate(b"abcd"):
        pool.range(pool.offset(slot), 8)[:] = bytes([letter]) * 8
    home = Range(3 << 20, HUGE_PAGE)
    assert home.address % HUGE_PAGE == 0
    for place, slot in ((0, 3), (2, 0), (1, 1)):
        home.place(place << 20, 1 << 20, pool.fd, pool.offset(slot))
        home.populate(place << 20, 1 << 20)
    view = memoryview(home.buffer)
    assert [bytes(view[n << 20 : (n << 20) + 2]) for n in range(3)] == [b"dd", b"bb", b"aa"]
    del view
    assert home.close()
    pool.close()


def test_it_is_unmapped_with_the_last_reference() -> None:
    home = Range(1 << 20)
    address = home.address
    view = memoryview(home.buffer)
    assert not home.close()
    assert mapped(address)
    del view
    assert not mapped(address)
    assert home.close()


def test_the_systems_refusal_is_an_error() -> None:
    home = Range(1 << 20)
    descriptor = os.open(os.devnull, os.O_WRONLY)
    with pytest.raises(OSError, match="Permission denied"):
        home.place(0, 4096, descriptor, 0)
    os.close(descriptor)
    assert home.close()


@pytest.mark.skipif(not SETTING.exists(), reason="this kernel has no transparent huge pages")
def test_huge_pages_are_wanted_for_whole_pages_around_what_is_meant() -> None:
    memory = mmap.mmap(-1, 4 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    want_huge(address + mmap.PAGESIZE + 64, mmap.PAGESIZE)
    assert (address + mmap.PAGESIZE, address + 3 * mmap.PAGESIZE) in wanted_huge()
