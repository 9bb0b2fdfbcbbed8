"""Memory taken ahead of need: how slowly, and where none is."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from serverless_llm.loader.headroom import headroom
from serverless_llm.loader.pool import Pool
from serverless_llm.loader.toucher import MARGIN, REST, Toucher

SLOT = 1 << 20
LONG = 0.02  # seconds


class SlowPool(Pool):
    """Every slot takes `LONG`. `ended`: when the last one had it."""

    ended = 0.0

    def touch(self, slot: int) -> None:
        threading.Event().wait(LONG)
        super().touch(slot)
        self.ended = time.monotonic()


@pytest.fixture
def pool() -> Iterator[SlowPool]:
    pool = SlowPool(4 * SLOT)
    yield pool
    pool.close()


def test_most_of_a_core_is_left_to_others(pool: SlowPool) -> None:
    toucher, told = Toucher(pool), queue.SimpleQueue[float]()
    toucher.touch(0, 0.0, lambda _: told.put(time.monotonic()))
    assert told.get(timeout=30) - pool.ended >= REST * LONG
    assert REST >= 2.0
    toucher.close()


def test_a_slot_is_touched_when_it_is_time(pool: SlowPool) -> None:
    toucher, told = Toucher(pool), queue.SimpleQueue[bool]()
    began = time.monotonic()
    toucher.touch(0, 2 * LONG, told.put)
    assert told.get(timeout=30)
    assert pool.ended - began >= 3 * LONG
    toucher.close()


@pytest.mark.parametrize(("left", "taken"), [(MARGIN + SLOT, True), (MARGIN + SLOT - 1, False), (-SLOT, False)])
def test_no_memory_is_taken_that_others_would_miss(pool: SlowPool, left: int, taken: bool) -> None:
    toucher, told = Toucher(pool, lambda: left), queue.SimpleQueue[bool]()
    toucher.touch(0, 0.0, told.put)
    assert told.get(timeout=30) is taken
    assert pool.memory == SLOT * taken
    toucher.close()


def test_a_control_group_that_is_nearly_full_gets_no_fuller(tmp_path: Path, pool: SlowPool) -> None:
    """Until it has memory again."""
    proc, box = tmp_path / "proc", tmp_path / "cgroup" / "box"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("0::/box\n")
    box.mkdir(parents=True)
    (box / "memory.max").write_text(f"{2 * MARGIN}\n")
    toucher, told = Toucher(pool, lambda: headroom(proc, tmp_path / "cgroup")), queue.SimpleQueue[bool]()
    for used, taken in ((2 * MARGIN, False), (MARGIN, False), (0, True)):
        (box / "memory.current").write_text(f"{used}\n")
        toucher.touch(1, 0.0, told.put)
        assert told.get(timeout=30) is taken
    toucher.close()


def test_a_closed_one_tells_nothing(pool: SlowPool) -> None:
    toucher, told = Toucher(pool), queue.SimpleQueue[bool]()
    toucher.touch(0, 3600.0, told.put)
    toucher.close()
    assert told.empty()
    assert pool.memory == 0
