"""Frames of tokens that come while a stream is open: each is on its way when the frame is through."""

from __future__ import annotations

import asyncio
import gc
import json
import tracemalloc
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import pytest

from serverless_llm import wire
from serverless_llm.gateway.options import GatewayOptions
from tests.integration.scripted import Served, begins, events, model, run

pytestmark = pytest.mark.slow


async def lines_of_http_1_0(server: Served, body: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """The reader of an answer without chunks, behind its headers."""
    place = urlsplit(server.url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    head = f"POST /v1/chat/completions HTTP/1.0\r\nHost: {place.netloc}\r\nConnection: keep-alive\r\n"
    writer.write(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    headers = await reader.readuntil(b"\r\n\r\n")
    assert b"chunked" not in headers.lower()
    return reader, writer


def test_each_frame_is_an_event_of_its_own(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        async with server.chat(stream=True) as response:
            seen = events(response)
            assert (await anext(seen))["choices"][0]["delta"]["content"] == "A"
            sequence = server.controller.all(wire.Run)[0].sequence
            for letter in "BCD":
                server.controller.tokens(sequence, [ord(letter)])
                assert (await anext(seen))["choices"][0]["delta"] == {"content": letter}
            server.controller.tokens(sequence, [*b"EF"], "length")
            rest = [event async for event in seen]
        assert [event["choices"][0]["delta"] for event in rest[:-1]] == [{"content": "EF"}, {}]
        assert rest[-1] == "data: [DONE]"

    run(tmp_path, begins, scenario)


@pytest.mark.parametrize("chat", [True, False])
def test_a_stream_holds_the_tokens_of_its_prompt_and_little_else(tmp_path: Path, chat: bool) -> None:
    count = 200_000
    given = {"messages": [{"role": "user", "content": "a" * count}]} if chat else {"prompt": [97] * count}
    body = json.dumps({"model": "demo", "stream": True, **given}).encode()

    async def scenario(server: Served) -> None:
        server.gateway.receive(wire.Catalog([model("demo", tmp_path / "demo", context=2 * count)], True))
        async with server.chat(stream=True) as warm:
            await anext(events(warm))
        route = "/v1/chat/completions" if chat else "/v1/completions"
        tracemalloc.start()
        try:
            async with server.http.post(route, data=body, headers={"Content-Type": "application/json"}) as response:
                await anext(events(response))
                gc.collect()
                assert tracemalloc.get_traced_memory()[0] < 5 * count  # a token takes 4 bytes
        finally:
            tracemalloc.stop()

    run(tmp_path, begins, scenario)


def test_frames_of_one_turn_come_in_their_order(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        async with server.chat(stream=True) as response:
            seen = events(response)
            await anext(seen)
            sequence = server.controller.all(wire.Run)[0].sequence
            for letter in "BCDE":
                server.controller.tokens(sequence, [ord(letter)])
            server.controller.tokens(sequence, [ord("F")], "length")
            rest = [event async for event in seen]
        assert "".join(event["choices"][0]["delta"].get("content", "") for event in rest[:-1]) == "BCDEF"

    run(tmp_path, begins, scenario)


def test_an_http_1_0_client_reads_events_without_chunks(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        body = json.dumps({"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "stream": True}).encode()
        reader, writer = await lines_of_http_1_0(server, body)
        texts = []
        for letter in "BC":
            line = await reader.readuntil(b"\n\n")
            texts.append(msgspec.json.decode(line.removeprefix(b"data: "))["choices"][0]["delta"]["content"])
            server.controller.tokens(server.controller.all(wire.Run)[0].sequence, [ord(letter)])
        server.controller.tokens(server.controller.all(wire.Run)[0].sequence, [], "length")
        rest = (await reader.read()).split(b"\n\n")  # it ends with the connection
        writer.close()
        assert texts == ["A", "B"]
        assert msgspec.json.decode(rest[0].removeprefix(b"data: "))["choices"][0]["delta"] == {"content": "C"}
        assert rest[-2:] == [b"data: [DONE]", b""]

    run(tmp_path, begins, scenario)


def test_heartbeats_follow_the_last_token(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        async with server.chat(stream=True) as response:
            seen = events(response)
            await anext(seen)
            server.controller.tokens(server.controller.all(wire.Run)[0].sequence, [66])
            deltas = [(await anext(seen))["choices"][0]["delta"] for _ in range(3)]
            assert {"content": "B"} in deltas
            assert deltas[-1] == {}

    run(tmp_path, begins, scenario, GatewayOptions(heartbeat_every=0.02))


def test_a_choice_that_ends_beside_anothers_token_ends_once(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        async with server.chat(stream=True, n=2) as response:
            seen = events(response)
            await server.controller.saw(wire.Run, 2)
            one, two = (sent.sequence for sent in server.controller.all(wire.Run))
            begun = [(await anext(seen))["choices"][0]["index"] for _ in range(2)]
            server.controller.deliver(wire.Tokens([(one, 0, [66], "length"), (two, 0, [66], "")]))
            server.controller.tokens(two, [67], "length")
            ends = [event["choices"][0] async for event in seen if event != "data: [DONE]"]
        assert sorted(begun) == [0, 1]
        assert [end["index"] for end in ends if end["finish_reason"]] == [0, 1]
        texts = {index: "".join(e["delta"].get("content", "") for e in ends if e["index"] == index) for index in (0, 1)}
        assert texts == {0: "B", 1: "BC"}

    run(tmp_path, begins, scenario)


def test_what_a_frame_brings_to_several_choices_is_one_write(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        async with server.chat(stream=True, n=3) as response:
            seen = events(response)
            await server.controller.saw(wire.Run, 3)
            choices = [sent.sequence for sent in server.controller.all(wire.Run)]
            for _ in choices:
                await anext(seen)
            server.controller.deliver(wire.Tokens([(choice, 0, [66], "") for choice in choices]))
            chunk = b""
            async for piece, whole in response.content.iter_chunks():
                chunk += piece
                if whole and chunk.strip():
                    break
            server.controller.deliver(wire.Tokens([(choice, 0, [], "length") for choice in choices]))
            assert [event async for event in seen][-1] == "data: [DONE]"
        assert chunk.count(b'"content":"B"') == 3

    run(tmp_path, begins, scenario)
