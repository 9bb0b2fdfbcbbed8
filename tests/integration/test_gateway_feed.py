"""`GET /admin/events`: those who watch, those who are too slow to, and the end."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest

from serverless_llm import wire
from serverless_llm.gateway import feed
from serverless_llm.gateway.options import GatewayOptions
from tests.integration.scripted import Served, error_of, events, run, says, silent

pytestmark = pytest.mark.slow


def news(number: int) -> wire.News:
    return wire.News(b'{"event":"evicted","replica":%d}' % number)


async def watching(server: Served, count: int) -> None:
    async with asyncio.timeout(5):
        while len(server.gateway._feed._watchers) != count:
            await asyncio.sleep(0)


def test_watchers_see_what_was_and_what_comes(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        for number in range(5):
            server.gateway.receive(news(number))
        async with server.http.get("/admin/events?recent=2") as response, server.http.get("/admin/events") as other:
            assert response.headers["Content-Type"] == "text/event-stream"
            await watching(server, 2)
            server.gateway.receive(news(5))
            seen = events(response)
            assert [(await anext(seen))["replica"] for _ in range(3)] == [3, 4, 5]
            assert (await anext(events(other)))["replica"] == 5
        await watching(server, 0)

    run(tmp_path, silent, scenario)


def test_a_head_of_what_has_no_end_is_not_served(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        async with server.http.head("/admin/events") as response:
            assert (response.status, response.headers["Allow"]) == (405, "GET")
        async with server.http.head("/v1/models") as response:
            assert (response.status, await response.read()) == (200, b"")

    run(tmp_path, silent, scenario)


def test_silence_is_filled_with_comments(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        async with server.http.get("/admin/events") as response:
            seen = events(response)
            assert [await anext(seen), await anext(seen)] == [": ping", ": ping"]

    run(tmp_path, silent, scenario, GatewayOptions(heartbeat_every=0.01))


@pytest.mark.parametrize("recent", ["x", "-1", "257", "9" * 5000])
def test_a_bad_number_of_recent_events(tmp_path: Path, recent: str) -> None:
    async def scenario(server: Served) -> None:
        async with server.http.get(f"/admin/events?recent={recent}") as response:
            assert (response.status, (await error_of(response))["param"]) == (400, "recent")

    run(tmp_path, silent, scenario)


def test_one_watcher_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "MOST", 1)

    async def scenario(server: Served) -> None:
        async with server.http.get("/admin/events"):
            await watching(server, 1)
            async with server.http.get("/admin/events") as response:
                assert (response.status, (await error_of(response))["code"]) == (503, "overloaded")

    run(tmp_path, silent, scenario)


def test_a_watcher_that_never_reads_is_dropped_and_delays_nobody(tmp_path: Path) -> None:
    large = wire.News(b'{"event":"evicted","padding":"%s"}' % (b"x" * 20_000))

    async def scenario(server: Served) -> None:
        loop = asyncio.get_running_loop()
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.setblocking(False)
            await loop.sock_connect(deaf, ("127.0.0.1", int(server.url.rpartition(":")[2])))
            await loop.sock_sendall(deaf, b"GET /admin/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await watching(server, 1)
            told = 0
            while server.gateway._feed._watchers:
                server.gateway.receive(large)
                told += 1
                await asyncio.sleep(0)
                assert told < 10 * feed.BEHIND
            assert told > feed.BEHIND
            async with server.chat() as response:
                assert response.status == 200

    run(tmp_path, says("hi"), scenario)


def test_stopping_ends_every_stream_and_begins_none(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        async with server.http.get("/admin/events") as response:
            await watching(server, 1)
            server.gateway.drain()
            rest: list[Any] = [event async for event in events(response)]
            assert rest == []
        async with server.http.get("/admin/events") as response:
            assert (response.status, (await error_of(response))["code"]) == (503, "overloaded")

    run(tmp_path, silent, scenario)
