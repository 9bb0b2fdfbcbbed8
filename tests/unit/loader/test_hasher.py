"""Digests of blocks in a pool, computed on a thread."""

from __future__ import annotations

import queue

import pytest
from xxhash import xxh3_128_digest

from serverless_llm.loader.hasher import Hasher
from serverless_llm.loader.plan import Landed
from serverless_llm.loader.pool import Pool

MIB = 1 << 20


def test_blocks_are_hashed_where_they_lie() -> None:
    pool = Pool(4 * MIB)
    pool.range(MIB, 3)[:] = b"abc"
    hasher = Hasher(pool)
    told: queue.SimpleQueue[list[bytes]] = queue.SimpleQueue()
    hasher.hash([Landed(0, 0, 3, MIB), Landed(0, 3, 1, MIB + 2)], told.put)
    hasher.hash([Landed(0, 0, MIB, 2 * MIB)], told.put)
    assert told.get(timeout=30) == [xxh3_128_digest(b"abc"), xxh3_128_digest(b"c")]
    assert told.get(timeout=30) == [xxh3_128_digest(bytes(MIB))]
    hasher.close()
    pool.close()  # nothing refers to it any more


@pytest.mark.parametrize("orders", [0, 1])
def test_nothing_is_told_after_the_end(orders: int) -> None:
    pool = Pool(4 * MIB)
    hasher = Hasher(pool)
    hasher._closed.set()
    told: list[list[bytes]] = []
    for _ in range(orders):
        hasher.hash([Landed(0, 0, MIB, 0)], told.append)
    hasher.close()
    assert told == []
    pool.close()
