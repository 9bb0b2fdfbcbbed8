"""What transfers tell of the links that they crossed."""

from __future__ import annotations

import contextlib
import queue
from pathlib import Path

import pytest

from serverless_llm.loader.link import Rank
from serverless_llm.loader.plan import Piece
from serverless_llm.loader.pool import Pool
from serverless_llm.loader.reader import Batch, Reader, Transfer
from serverless_llm.loader.routes import Route, Routes
from serverless_llm.loader.source import Came, SourceFile

MIB = 1 << 20


def test_both_readers_wait_for_a_load_that_goes_first(tmp_path: Path) -> None:
    pool = Pool(2 * MIB)
    with contextlib.closing(pool), contextlib.closing(Reader(pool)) as reader:
        routes = Routes(pool, reader)
        routes.yield_to(1)
        network, path = routes._asker(), tmp_path / "file"
        path.write_bytes(bytes(MIB))
        file, piece = SourceFile(path, MIB, path.stat().st_mtime_ns), Piece(0, 0, MIB)
        both = [(one, queue.SimpleQueue[Batch]()) for one in (reader, network)]
        for slot, (one, news) in enumerate(both):
            one.submit(Transfer([file], {piece: slot}, [piece], news.put, Rank(number=2)))
        for one, _ in both:
            first = queue.SimpleQueue[Batch]()
            one.submit(Transfer([], {}, [], first.put, Rank(number=3)))  # a turn of its threads
            assert first.get(timeout=30).last
        assert all(news.empty() for _, news in both)
        routes.go_on(1)
        assert all(news.get(timeout=30).last for _, news in both)
        assert routes.close()


@pytest.mark.parametrize("rate", [0.0, 1e6])
def test_links_learn_from_what_crossed_them(rate: float) -> None:
    pool = Pool(MIB)
    with contextlib.closing(pool), contextlib.closing(Reader(pool, rate=rate)) as reader:
        routes = Routes(pool, reader)
        for link in (routes.remote, routes.disk):
            routes.observe(Route(reader, link, ()), Came(remote=4 * MIB, disk=2 * MIB, cache=MIB), 1.0)
        counted = 3 * MIB if rate else 2 * MIB
        assert (routes.remote.bytes, routes.disk.bytes) == (8 * MIB, 2 * counted)
        assert (routes.remote.bandwidth, routes.disk.bandwidth) == (0, 0)  # not all of it crossed either
        routes.observe(Route(reader, routes.remote, ()), Came(remote=4 * MIB), 2.0)
        routes.observe(Route(reader, routes.disk, ()), Came(disk=6 * MIB), 2.0)
        assert (routes.remote.bandwidth, routes.disk.bandwidth) == (2 * MIB, 3 * MIB)
        routes.observe(Route(reader, routes.disk, ()), Came(cache=6 * MIB), 1.0)
        assert (routes.disk.bandwidth > 3 * MIB) == bool(rate)  # a cap holds for what memory has, too
