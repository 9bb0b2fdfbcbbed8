"""Links keep frames whole and in order, and notice a peer that is gone, silent or does not read."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from serverless_llm import framing, wire
from serverless_llm.node import links
from serverless_llm.node.links import SocketLink, WebSocketLink


def cancel(number: int) -> bytes:
    return wire.encode(wire.Cancel([(number, 0)]))


def number_of(frame: framing.Frame) -> int:
    message = wire.decode(frame.header.kind, frame.body)
    assert isinstance(message, wire.Cancel)
    return message.sequences[0][0]


class Ear:
    """Collects what a link says; `heard(n)` waits for the n-th frame."""

    def __init__(self) -> None:
        self.frames: list[framing.Frame] = []
        self.causes: list[str] = []
        self._changed = asyncio.Event()

    def receive(self, frame: framing.Frame) -> None:
        wire.decode(frame.header.kind, frame.body)  # as whoever listens does
        self.frames.append(frame)
        self._changed.set()

    def closed(self, cause: str) -> None:
        self.causes.append(cause)
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                self._changed.clear()
                await self._changed.wait()


@asynccontextmanager
async def socket_link() -> AsyncIterator[tuple[SocketLink, Ear, socket.socket]]:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    ear = Ear()
    _, link = await asyncio.get_running_loop().create_unix_connection(
        lambda: SocketLink(ear.receive, ear.closed), sock=ours
    )
    yield link, ear, theirs
    link.close("end of test")
    theirs.close()
    await ear.until(lambda: bool(ear.causes))


def test_a_socket_link_joins_what_arrives_in_bits() -> None:
    async def story() -> None:
        async with socket_link() as (_, ear, peer):
            for byte in cancel(1) + cancel(2):
                peer.send(bytes([byte]))
            await ear.until(lambda: len(ear.frames) == 2)
            assert [number_of(frame) for frame in ear.frames] == [1, 2]

    asyncio.run(story())


def test_a_socket_link_tells_once_that_the_peer_is_gone() -> None:
    async def story() -> None:
        async with socket_link() as (link, ear, peer):
            peer.close()
            await ear.until(lambda: bool(ear.causes))
            link.send(cancel(1))
            link.close("too late")
        assert ear.causes == ["the peer closed the link"]

    asyncio.run(story())


def test_a_socket_link_ends_at_foreign_bytes() -> None:
    async def story() -> None:
        async with socket_link() as (_, ear, peer):
            peer.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await ear.until(lambda: bool(ear.causes))
            assert ear.causes == ["not a serverless-llm frame"]

    asyncio.run(story())


BAD = {
    "truncated": (framing.pack(wire.KIND[wire.Run], b"\x90", 0, 0, 0), "bad Run frame"),
    "oversized": (
        framing.HEADER.pack(framing.MAGIC, 1, 0, 0, 0, 0, framing.MAX_FRAME + 1),
        f"frame of {framing.MAX_FRAME + 1} bytes is over the limit of {framing.MAX_FRAME}",
    ),
    "of another version": (
        framing.HEADER.pack(b"SLM\xff", 1, 0, 0, 0, 0, 0),
        f"peer speaks protocol version 255, this is version {framing.PROTOCOL}",
    ),
}


@pytest.mark.parametrize(("raw", "words"), BAD.values(), ids=BAD)
def test_a_bad_frame_ends_its_link_with_the_reason(raw: bytes, words: str) -> None:
    async def story() -> None:
        async with socket_link() as (_, ear, peer):
            peer.send(cancel(1) + raw)
            await ear.until(lambda: bool(ear.causes))
            assert (len(ear.frames), ear.causes[0].startswith(words)) == (1, True)
        async with websocket_pair() as (_, near, server, _far):
            assert server is not None
            server.send(cancel(1))
            server.send(raw)
            await near.until(lambda: bool(near.causes))
            assert (len(near.frames), near.causes[0].startswith(words)) == (1, True)

    asyncio.run(story())


def test_a_socket_link_gives_up_on_a_peer_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "WRITE_LIMIT", 1 << 20)

    async def story() -> None:
        async with socket_link() as (link, ear, _):
            for _ in range(40):
                link.send(bytes(1 << 16))
            await ear.until(lambda: bool(ear.causes))
            assert "unread" in ear.causes[0]

    asyncio.run(story())


@asynccontextmanager
async def websocket_pair(
    beat: float = 1.0, silence: float = 5.0, deaf: bool = False
) -> AsyncIterator[tuple[WebSocketLink, Ear, WebSocketLink | None, Ear]]:
    """A client's link and a server's; a `deaf` server accepts and then never reads nor answers."""
    served: asyncio.Future[WebSocketLink | None] = asyncio.get_running_loop().create_future()
    end = asyncio.Event()
    far = Ear()

    async def handler(request: web.Request) -> web.WebSocketResponse:
        response = web.WebSocketResponse(autoping=False, max_msg_size=links.MAX_MESSAGE, timeout=0.1)
        await response.prepare(request)
        if deaf:
            served.set_result(None)
            await end.wait()
        else:
            link = WebSocketLink(response, far.receive)
            served.set_result(link)
            try:
                await link.run()
            finally:  # the server cancels handlers whose connection is gone
                far.closed("ended")
        return response

    app = web.Application()
    app.router.add_get("/", handler)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        timeout = aiohttp.ClientWSTimeout(ws_close=0.1)
        response = await session.ws_connect(
            server.make_url("/"), autoping=False, max_msg_size=links.MAX_MESSAGE, timeout=timeout
        )
        near = Ear()
        link = WebSocketLink(response, near.receive, beat, silence)
        running = asyncio.ensure_future(link.run())
        running.add_done_callback(lambda task: near.closed(task.result()))
        yield link, near, await served, far
        link.close("end of test")
        end.set()
        await running


def test_a_websocket_carries_frames_in_order_both_ways() -> None:
    async def story() -> None:
        async with websocket_pair() as (client, near, server, far):
            assert server is not None
            big = wire.encode(wire.Answer(7, 200, bytes(3 << 20)))
            for number in range(100):
                client.send(cancel(number))
                server.send(big if number == 50 else cancel(number))
            await far.until(lambda: len(far.frames) == 100)
            await near.until(lambda: len(near.frames) == 100)
            assert [number_of(frame) for frame in far.frames] == list(range(100))
            assert near.frames[50].raw == big

    asyncio.run(story())


def test_both_ends_of_a_websocket_learn_of_its_end() -> None:
    async def story() -> None:
        async with websocket_pair() as (client, near, _, far):
            client.close("enough")
            await far.until(lambda: bool(far.causes))
            await near.until(lambda: bool(near.causes))
            assert near.causes == ["enough"]

    asyncio.run(story())


def test_pings_keep_a_quiet_websocket_alive() -> None:
    async def story() -> None:
        async with websocket_pair(beat=0.01, silence=0.08) as (_client, near, server, _):
            assert server is not None
            asyncio.get_running_loop().call_later(0.2, server.send, cancel(1))
            await near.until(lambda: bool(near.frames or near.causes))
            assert near.causes == []

    asyncio.run(story())


@pytest.mark.slow
def test_a_machine_that_stood_still_does_not_take_it_for_its_peer_s_silence() -> None:
    async def story() -> None:
        async with websocket_pair(beat=0.01, silence=0.08) as (_client, near, server, _):
            assert server is not None
            for _ in range(3):
                time.sleep(0.2)  # nothing runs meanwhile
                await asyncio.sleep(0.02)
            server.send(cancel(1))
            await near.until(lambda: bool(near.frames or near.causes))
            assert near.causes == []

    asyncio.run(story())


def test_a_silent_peer_is_given_up() -> None:
    assert links.SILENCE == 5.0

    async def story() -> None:
        async with websocket_pair(beat=0.01, silence=0.05, deaf=True) as (_, near, _, _):
            await near.until(lambda: bool(near.causes))
            assert near.causes == ["the peer was silent for 0.05 s"]

    asyncio.run(story())


def test_a_peer_that_does_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    assert links.WRITE_LIMIT == 64 << 20
    monkeypatch.setattr(links, "WRITE_LIMIT", 1 << 20)

    async def story() -> None:
        async with websocket_pair(deaf=True) as (client, near, _, _):
            for _ in range(40):
                client.send(bytes(1 << 16))
            await near.until(lambda: bool(near.causes))
            assert "unread" in near.causes[0]

    asyncio.run(story())
