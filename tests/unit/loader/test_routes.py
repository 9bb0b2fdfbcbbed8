"""What transfers tell of the links that they crossed."""

from __future__ import annotations

import contextlib

import pytest

from serverless_llm.loader.pool import Pool
from serverless_llm.loader.reader import Reader
from serverless_llm.loader.routes import Route, Routes
from serverless_llm.loader.source import Came

MIB = 1 << 20


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
