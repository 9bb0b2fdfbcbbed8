"""The gateway as clients see it: a real server on loopback, real clients, a scripted controller."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import openai
import pytest
import yarl

from serverless_llm import wire
from serverless_llm.demo.tokenizer import chat_tokens
from serverless_llm.gateway.options import GatewayOptions
from tests.integration.scripted import (
    END,
    Behaviour,
    Controller,
    Served,
    attaches,
    begins,
    decoded,
    model,
    says,
    served,
    silent,
    write_checkpoint,
)

pytestmark = pytest.mark.slow

COLD = {"load_queue_ms": 1.0, "load_disk_ms": 20.0, "load_upload_ms": 3.0, "load_ms": 24.0}
QUICK = GatewayOptions(hold=0.05, commit_after=0.02, heartbeat_every=0.02)


def run(
    tmp_path: Path, on: Behaviour, scenario: Callable[[Served], Awaitable[None]], options: GatewayOptions | None = None
) -> None:
    """One scenario against one server; nothing may stay open in it."""

    async def main() -> None:
        async with served(tmp_path, on, options) as server, asyncio.timeout(20):
            await scenario(server)
            server.gateway.drain()
            await server.gateway.idle()

    asyncio.run(main())


def client(server: Served) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[Any]:
    """Decoded data events as they come; `[DONE]` and comments as text."""
    async for line in response.content:
        if line.startswith(b"data: {"):
            yield msgspec.json.decode(line[6:])
        elif line.strip():
            yield line.strip().decode()


async def error_of(response: aiohttp.ClientResponse) -> dict[str, Any]:
    body = msgspec.json.decode(await response.read())
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    assert response.content_type == "application/json"
    error: dict[str, Any] = body["error"]
    return error


# --- through the official client ---


def test_a_chat_streams(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        async with client(server) as ai:
            stream = await ai.chat.completions.create(
                model="demo",
                messages=[{"role": "user", "content": "Hi"}],
                stream=True,
                stream_options={"include_usage": True},
                seed=5,
            )
            chunks = [chunk async for chunk in stream]
        sent = server.controller.all(wire.Run)[0]
        deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
        assert "".join(delta.content or "" for delta in deltas) == "Grüße 😀"
        assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
        assert chunks[-2].choices[0].finish_reason == "stop"
        usage = chunks[-1].usage
        assert usage is not None
        prompt, _ = decoded(sent)
        assert prompt == chat_tokens("Hi")
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), len("Grüße 😀".encode()) + 1)
        assert (sent.seed, sent.max_tokens, sent.temperature, sent.stop_ids) == (5, 256 - len(prompt), 0.0, [END])

    run(tmp_path, says("Grüße 😀"), scenario)


def test_answers_that_do_not_stream(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        async with client(server) as ai:
            chat = await ai.chat.completions.create(model="demo", messages=[{"role": "user", "content": "Hi"}])
            text = await ai.completions.create(
                model="team/demo-2", prompt="ab", max_tokens=6, temperature=0.5, top_p=0.9
            )
        assert (chat.choices[0].message.content, chat.choices[0].finish_reason) == ("answer", "length")
        assert (text.choices[0].text, text.model, text.object) == ("answer", "team/demo-2", "text_completion")
        sent = server.controller.all(wire.Run)[1]
        assert decoded(sent) == ([*b"ab"], [])
        assert (sent.max_tokens, sent.temperature, sent.top_p) == (6, 0.5, 0.9)
        assert chat.model_extra is not None
        metrics = chat.model_extra["metrics"]
        assert metrics["queue_time_ms"] == 12.5
        assert metrics["time_to_first_token_ms"] == metrics["cold_start_ms"] > 0
        assert metrics["cold_start_phases"] == COLD | {"prefill_ms": metrics["cold_start_phases"]["prefill_ms"]}

    run(tmp_path, says("answer", "length", COLD), scenario)


def test_the_synchronous_client_on_a_models_own_url(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        def ask() -> str:
            with openai.OpenAI(base_url=f"{server.url}/models/team%2Fdemo-2/v1", api_key="x", max_retries=0) as ai:
                stream = ai.completions.create(model="team/demo-2", prompt=[65, 66], stream=True)
                return "".join(chunk.choices[0].text for chunk in stream)

        assert await asyncio.to_thread(ask) == "yes"
        assert server.controller.all(wire.Arrive)[0].model == "team/demo-2"
        assert decoded(server.controller.all(wire.Run)[0]) == ([65, 66], [])

    run(tmp_path, says("yes"), scenario)


# --- a request's life, message by message ---


def test_a_load_starts_before_the_prompt_is_read(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        async with server.chat(keep_alive="-1", max_tokens=3) as response:
            assert response.status == 200
        arrive, prompted = server.controller.sent[:2]
        assert arrive == wire.Arrive(3 << 32 | 1, "demo", "c0", "online", math.inf, response.headers["x-request-id"])
        assert prompted == wire.Prompted(3 << 32 | 1, len(chat_tokens("Hi")), 3)
        assert [type(message) for message in server.controller.sent] == [wire.Arrive, wire.Prompted, wire.Run]

    run(tmp_path, says("a"), scenario)


def test_a_client_that_goes_away_stops_its_sequence(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        async with server.chat(stream=True) as response:
            sequence = (await server.controller.saw(wire.Run)).sequence
            await anext(events(response))
            response.close()
        assert await server.controller.saw(wire.Gone) == wire.Gone([sequence], "client gone")
        server.controller.tokens(sequence, [66])  # what was on its way harms nobody

    run(tmp_path, begins, scenario)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_before_any_token(tmp_path: Path, stream: bool) -> None:
    async def scenario(server: Served) -> None:
        asking = asyncio.create_task(server.chat(stream=stream).__aenter__())
        sequence = (await server.controller.saw(wire.Run)).sequence
        asking.cancel()
        assert await server.controller.saw(wire.Gone) == wire.Gone([sequence], "client gone")

    run(tmp_path, attaches, scenario)


def test_a_sequence_goes_on_elsewhere_and_old_frames_are_dropped(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        controller = server.controller
        asking = asyncio.create_task(server.chat(stream=True, max_tokens=5, seed=9).__aenter__())
        first = await controller.saw(wire.Run)
        sequence = first.sequence
        controller.tokens(sequence, [*b"a"])
        controller.tokens(sequence, [*b"b"])
        controller.attach(sequence, epoch=1, replica=8)
        second = await controller.saw(wire.Run, 2)
        controller.tokens(sequence, [*b"X"], epoch=0)
        controller.attach(sequence, epoch=0)
        controller.tokens(sequence, [*b"c"], epoch=1)
        controller.tokens(sequence, [*b"X"], "length", epoch=2)
        controller.tokens(sequence, [*b"de"], "length", epoch=1)
        async with await asking as response:
            seen = [event async for event in events(response)]
        assert "".join(event["choices"][0]["delta"].get("content", "") for event in seen[:-1]) == "abcde"
        assert (second.epoch, second.replica, decoded(second)) == (1, 8, (decoded(first)[0], [*b"ab"]))
        assert (second.seed, second.max_tokens) == (first.seed, first.max_tokens) == (9, 5)
        assert len(controller.all(wire.Run)) == 2
        assert not controller.all(wire.Gone)

    run(tmp_path, attaches, scenario)


def test_an_attachment_after_the_end_is_answered(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        async with server.chat():
            pass
        server.controller.attach(3 << 32 | 1, epoch=1)
        assert await server.controller.saw(wire.Gone) == wire.Gone([3 << 32 | 1], "finished")

    run(tmp_path, says("a"), scenario)


@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_string_ends_the_sequence_and_is_not_sent(tmp_path: Path, stream: bool) -> None:
    async def scenario(server: Served) -> None:
        controller = server.controller
        async with client(server) as ai:
            asking = asyncio.create_task(collect(ai, stream, stop=["END"]))
            sequence = (await controller.saw(wire.Run)).sequence
            for byte in b"a ENDLESS":
                controller.tokens(sequence, [byte])
            assert await asking == ("a ", "stop")
        assert controller.all(wire.Gone) == [wire.Gone([sequence], "stop string")]

    run(tmp_path, attaches, scenario)


@pytest.mark.parametrize(("ignore_eos", "stops"), [(False, [33, END]), (True, [33])])
def test_a_stop_id_is_counted_and_not_shown(tmp_path: Path, ignore_eos: bool, stops: list[int]) -> None:
    async def scenario(server: Served) -> None:
        asking = asyncio.create_task(server.chat(stop_token_ids=[33], ignore_eos=ignore_eos).__aenter__())
        sent = await server.controller.saw(wire.Run)
        server.controller.tokens(sent.sequence, [*b"hi!"], "stop")
        async with await asking as response:
            answer = await response.json()
        assert sent.stop_ids == stops
        assert answer["choices"][0]["message"]["content"] == "hi"
        assert answer["usage"]["completion_tokens"] == 3

    run(tmp_path, attaches, scenario)


async def collect(ai: openai.AsyncOpenAI, stream: bool, **options: Any) -> tuple[str, str | None]:
    """Text and finish reason of one chat, streaming or not."""
    ask: Any = ai.chat.completions.create
    answer = await ask(model="demo", messages=[{"role": "user", "content": "Hi"}], stream=stream, **options)
    if not stream:
        return answer.choices[0].message.content, answer.choices[0].finish_reason
    choices = [chunk.choices[0] async for chunk in answer]
    return "".join(choice.delta.content or "" for choice in choices), choices[-1].finish_reason


# --- cold starts ---


@pytest.mark.parametrize("style", ["chunk", "comment"])
def test_a_silent_stream_sends_its_headers_and_heartbeats(tmp_path: Path, style: str) -> None:
    async def scenario(server: Served) -> None:
        async with server.chat(stream=True) as response:
            assert response.headers["Content-Type"] == "text/event-stream"
            assert response.headers["Cache-Control"] == "no-cache"
            assert response.headers["X-Accel-Buffering"] == "no"
            seen = events(response)
            beats = [await anext(seen) for _ in range(3)]
            sequence = (await server.controller.saw(wire.Prompted)).sequence
            server.controller.attach(sequence)
            server.controller.tokens(sequence, [*b"hi", END], "stop")
            rest = [event async for event in seen if event not in (": ping", beats[-1])]
        if style == "comment":
            assert beats == [": ping"] * 3
        else:
            deltas = [beat["choices"][0]["delta"] for beat in beats]
            assert deltas == [{"role": "assistant", "content": ""}, {}, {}]
        first = rest[0]["choices"][0]["delta"]
        assert first == {"content": "hi"} | ({"role": "assistant"} if style == "comment" else {})
        assert rest[-1] == "data: [DONE]"

    run(tmp_path, silent, scenario, GatewayOptions(commit_after=0.02, heartbeat_every=0.02, heartbeat=style))


def test_heartbeats_keep_their_distance(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        async with server.chat(stream=True) as response:
            seen = events(response)
            await anext(seen)
            for _ in range(3):  # time enough for more of them
                async with server.http.get("/health") as health:
                    assert health.status == 200
            sequence = (await server.controller.saw(wire.Prompted)).sequence
            server.controller.attach(sequence)
            server.controller.tokens(sequence, [65], "length")
            assert [event["choices"][0]["delta"] async for event in seen if "DONE" not in event] == [
                {"content": "A"},
                {},
            ]

    run(tmp_path, silent, scenario, GatewayOptions(commit_after=0.01, heartbeat_every=1000.0))


def test_headers_wait_for_the_first_token_and_carry_the_phases(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        async with server.chat(stream=True) as response:
            timing = dict(part.split(";dur=") for part in response.headers["Server-Timing"].split(", "))
            assert timing.keys() == {
                "queue",
                "load_queue",
                "load_disk",
                "load_upload",
                "load",
                "prefill",
                "first_token",
            }
            assert timing["load_disk"] == "20"
            seen = [event async for event in events(response)]
        assert seen[-2]["metrics"]["cold_start_phases"]["load_disk_ms"] == 20.0
        assert seen[0]["choices"][0]["delta"]["content"]

    run(tmp_path, says("hi", cold=COLD), scenario)


def test_a_hold_ends_in_503_with_the_estimate(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        async with server.chat() as response:
            error = await error_of(response)
            assert (response.status, error["code"]) == (503, "model_loading")
            assert response.headers["Retry-After"] == "8"
            assert "x-should-retry" not in response.headers
        sequence = server.controller.all(wire.Arrive)[0].sequence
        assert server.controller.all(wire.Gone) == [wire.Gone([sequence], "model_loading")]
        busy = model("demo", tmp_path / "demo", state="loaded")
        server.gateway.receive(wire.Catalog([busy], True))
        async with server.chat() as response:
            assert (response.status, (await error_of(response))["code"]) == (503, "overloaded")

    run(tmp_path, silent, scenario, QUICK)


def test_an_answer_that_has_begun_is_not_held_against_the_limit(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        asking = asyncio.create_task(server.chat().__aenter__())
        sequence = (await server.controller.saw(wire.Run)).sequence
        server.controller.tokens(sequence, [65])
        passed = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(2 * QUICK.hold, passed.set_result, None)
        await passed
        server.controller.tokens(sequence, [66], "length")
        async with await asking as response:
            assert response.status == 200

    run(tmp_path, attaches, scenario, QUICK)


# --- refusals ---


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("status", "code", "after", "headers"),
    [
        (503, "overloaded", 3.2, {"Retry-After": "4"}),
        (503, "model_load_failed", None, {"x-should-retry": "false"}),
        (500, "engine_error", None, {"x-should-retry": "false"}),
        (429, "rate_limit_exceeded", 100.0, {"Retry-After": "60"}),
    ],
)
def test_what_the_controller_refuses(
    tmp_path: Path, stream: bool, status: int, code: str, after: float | None, headers: dict[str, str]
) -> None:
    def refuses(controller: Controller, message: wire.Message) -> None:
        if isinstance(message, wire.Arrive):
            controller.reject(message.sequence, status, code, after)

    async def scenario(server: Served) -> None:
        async with server.chat(stream=stream) as response:
            assert response.status == status
            assert (await error_of(response))["code"] == code
            assert response.headers.items() >= headers.items()
        assert not server.controller.all(wire.Gone)

    run(tmp_path, refuses, scenario)


@pytest.mark.parametrize("cause", ["rejected", "engine"])
def test_a_failure_in_mid_stream_is_an_event_and_the_end(tmp_path: Path, cause: str) -> None:
    async def scenario(server: Served) -> None:
        async with server.chat(stream=True) as response:
            sequence = (await server.controller.saw(wire.Run)).sequence
            seen = events(response)
            assert (await anext(seen))["choices"][0]["delta"]["content"] == "A"
            if cause == "engine":
                server.controller.tokens(sequence, [], "error")
            else:
                server.controller.reject(sequence, 500, "engine_error")
            rest = [event async for event in seen]
        assert rest[0]["error"]["code"] == "engine_error"
        assert rest[1:] == ["data: [DONE]"]
        assert not server.controller.all(wire.Gone)

    run(tmp_path, begins, scenario)


def test_an_engine_failure_before_any_token_is_a_500(tmp_path: Path) -> None:
    def fails(controller: Controller, message: wire.Message) -> None:
        attaches(controller, message)
        if isinstance(message, wire.Run):
            controller.tokens(message.sequence, [], "error")

    async def scenario(server: Served) -> None:
        for stream in (True, False):
            async with server.chat(stream=stream) as response:
                assert (response.status, (await error_of(response))["code"]) == (500, "engine_error")

    run(tmp_path, fails, scenario)


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "param"),
    [
        ("/v1/chat/completions", {"model": "nobody", "messages": []}, 400, "invalid_request_error", "messages"),
        ("/v1/completions", {"model": "nobody", "prompt": "x"}, 404, "model_not_found", "model"),
        ("/v1/completions", {"prompt": "x"}, 400, "invalid_request_error", "model"),
        ("/models/demo/v1/completions", {"model": "team/demo-2", "prompt": "x"}, 400, "invalid_request_error", "model"),
        ("/models/nobody/v1/completions", {"prompt": "x"}, 404, "model_not_found", "model"),
        ("/v1/completions", {"model": "demo", "prompt": "x", "n": 2}, 400, "unsupported_parameter", "n"),
        ("/v1/completions", {"model": "demo", "prompt": "x" * 256}, 400, "context_length_exceeded", "prompt"),
        ("/v1/completions", {"model": "demo", "prompt": "x", "max_tokens": 256}, 400, "context_length_exceeded",
         "prompt"),
        ("/v1/completions", {"model": "demo", "prompt": ""}, 400, "invalid_request_error", "prompt"),
        ("/v1/completions", {"model": "demo", "prompt": [5000]}, 400, "invalid_request_error", "prompt"),
        ("/v1/completions", {"model": "demo", "prompt": "x" * 5000}, 413, "request_too_large", None),
        ("/v1/other", {}, 404, "not_found", None),
        ("/models/a/b/c/v1/completions", {}, 404, "not_found", None),
    ],
)  # fmt: skip
def test_refused_requests(tmp_path: Path, path: str, body: Any, status: int, code: str, param: str | None) -> None:
    async def scenario(server: Served) -> None:
        async with server.http.post(path, json=body) as response:
            error = await error_of(response)
            assert (response.status, error["code"], error["param"]) == (status, code, param)
        arrived, gone = server.controller.all(wire.Arrive), server.controller.all(wire.Gone)
        assert [message.sequence for message in arrived] == [message.sequences[0] for message in gone]

    run(tmp_path, silent, scenario, GatewayOptions(body_limit=4096))


def test_other_methods_and_bodies_get_json_errors(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        async with server.http.get("/v1/chat/completions") as response:
            assert (response.status, (await error_of(response))["code"]) == (405, "method_not_allowed")
        async with server.http.post("/v1/chat/completions", data=b"{") as response:
            assert (response.status, (await error_of(response))["code"]) == (400, "invalid_request_error")
        async with server.http.get("/v1/models", headers={"Host": "evil.example"}) as response:
            assert (response.status, (await error_of(response))["code"]) == (403, "permission_denied")

    run(tmp_path, silent, scenario)


def test_keys(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        async with server.chat() as response:
            assert (response.status, (await error_of(response))["code"]) == (401, "invalid_api_key")
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="secret") as ai:
            assert await collect(ai, stream=True) == ("hi", "stop")

    run(tmp_path, says("hi"), scenario, GatewayOptions(api_keys=("secret",)))


def test_a_key_that_is_no_text_is_refused(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        url = yarl.URL(server.url)
        reader, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xe9\r\nConnection: close\r\n\r\n")
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 401 ")
        writer.close()

    run(tmp_path, silent, scenario, GatewayOptions(api_keys=("secret",)))


def test_a_bug_is_a_500_and_a_traceback_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(server: Served) -> None:
        server.controller.broken = True
        async with server.http.get("/admin/status") as response:
            error = await error_of(response)
            assert (response.status, error["code"]) == (500, "engine_error")
            assert "broken" not in error["message"]

    run(tmp_path, silent, scenario)
    assert "the controller is broken" in caplog.text


def test_a_prompt_that_cannot_be_made_ends_its_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(server: Served) -> None:
        server.gateway.receive(wire.Catalog([model("demo", tmp_path / "demo", context="none")], True))
        async with server.chat(stream=True) as response:
            assert (response.status, (await error_of(response))["code"]) == (500, "engine_error")

    run(tmp_path, silent, scenario)
    assert "the prompt could not be made" in caplog.text


def test_a_hostile_template_is_its_models_error(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        source = write_checkpoint(tmp_path / "bad")
        (source / "chat_template.jinja").write_text("{{ raise_exception('no system messages, please') }}")
        server.gateway.receive(wire.Catalog([model("demo", tmp_path / "demo"), model("bad", source)], True))
        async with server.chat(model="bad", stream=True) as response:
            assert response.status == 400
            message = (await error_of(response))["message"]
            assert "'bad'" in message
            assert "no system messages, please" in message
        async with server.chat() as response:
            assert response.status == 200

    run(tmp_path, says("a"), scenario)


@pytest.mark.parametrize(("limit", "stall"), [(100_000, 60.0), (1 << 30, 0.05)], ids=["size", "time"])
def test_a_client_that_does_not_read_is_dropped(tmp_path: Path, limit: int, stall: float) -> None:
    async def scenario(server: Served) -> None:
        controller = server.controller
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
            body = b'{"model":"demo","messages":[{"role":"user","content":"Hi"}],"stream":true}'
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            deaf.sendall(head.encode() + body)
            sequence = (await controller.saw(wire.Run)).sequence
            while not controller.all(wire.Gone):
                controller.tokens(sequence, [65] * 20_000)
                await asyncio.sleep(0)
            cause = "slow reader" if stall > 1 else "client gone"
            assert controller.all(wire.Gone) == [wire.Gone([sequence], cause)]
            assert b"[DONE]" not in await rest_of(deaf)

    run(tmp_path, attaches, scenario, GatewayOptions(unread_limit=limit, write_stall=stall))


async def rest_of(client: socket.socket) -> bytes:
    """All that comes until the connection is closed or reset."""
    client.setblocking(False)
    seen = b""
    try:
        while part := await asyncio.get_running_loop().sock_recv(client, 1 << 20):
            seen += part
    except ConnectionResetError:
        pass
    return seen


# --- what is not a completion ---


def test_models_with_status(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        loading = model("demo", tmp_path / "demo", state="loading", progress=0.5)
        failed = model("team/demo-2", tmp_path, state="failed", error="no config.json")
        server.gateway.receive(wire.Catalog([loading, failed], True))
        async with client(server) as ai:
            listed = {entry.id: entry async for entry in ai.models.list()}
            one = await ai.models.retrieve("team/demo-2")
        assert listed.keys() == {"demo", "team/demo-2"}
        assert listed["demo"].model_extra is not None
        expected = {"value": "loading", "tier": "disk", "progress": 0.5, "error": None}
        assert listed["demo"].model_extra["status"] == expected
        assert one.model_extra is not None
        assert one.model_extra["status"]["error"] == "no config.json"
        async with server.http.get("/models/demo/v1/models") as response:
            assert [entry["id"] for entry in (await response.json())["data"]] == ["demo"]
        async with server.http.get("/v1/models/nobody") as response:
            assert (response.status, (await error_of(response))["code"]) == (404, "model_not_found")
        assert server.controller.sent == []

    run(tmp_path, silent, scenario)


def test_health_and_readiness(tmp_path: Path) -> None:
    async def status(server: Served, path: str) -> int:
        async with server.http.get(path) as response:
            return response.status

    async def scenario(server: Served) -> None:
        assert [await status(server, path) for path in ("/health", "/ready")] == [200, 200]
        server.gateway.receive(wire.Catalog([], False, ["node0/0 is not up: no driver"]))
        assert [await status(server, path) for path in ("/health", "/ready")] == [200, 503]
        async with server.http.get("/ready") as response:
            assert await response.json() == {"ready": False, "problems": ["node0/0 is not up: no driver"]}

    run(tmp_path, silent, scenario)


def test_metrics_of_served_and_deleted_models(tmp_path: Path) -> None:
    async def page(server: Served) -> str:
        async with server.http.get("/metrics") as response:
            assert response.status == 200
            return await response.text()

    async def scenario(server: Served) -> None:
        async with server.chat() as response:
            assert response.status == 200
        text = await page(server)
        served_by = 'engine="n0/0",model_name="demo"'
        assert f"vllm:generation_tokens_total{{{served_by}}} 3.0" in text
        assert f"vllm:time_to_first_token_seconds_count{{{served_by}}} 1.0" in text
        assert 'vllm:request_success_total{engine="n0/0",finished_reason="stop",model_name="demo"} 1.0' in text
        assert 'serverless_llm_cold_start_seconds_count{model_name="demo"} 1.0' in text
        server.gateway.receive(wire.Catalog([], True))
        assert '"demo"' not in await page(server)

    run(tmp_path, says("hi", cold=COLD), scenario)


def test_who_waits_and_who_runs(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        async with server.chat(stream=True) as response:
            async with server.http.get("/metrics") as page:
                text = await page.text()
            assert 'vllm:num_requests_running{engine="n0/0",model_name="demo"} 1.0' in text
            assert 'vllm:num_requests_waiting{engine="",model_name="team/demo-2"} 0.0' in text
            server.gateway.receive(wire.Catalog([], True))
            async with server.http.get("/metrics") as page:
                assert '"demo"' not in await page.text()  # its stream goes on
            server.controller.tokens(server.controller.all(wire.Run)[0].sequence, [65], "length")
            await response.read()

    run(tmp_path, begins, scenario)


def test_a_valid_request_id_is_kept(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        for given, kept in (("trace-1.a:B", True), ("x" * 129, False), ("a b", False)):
            body = {"model": "demo", "prompt": "x", "stream": True}
            async with server.http.post("/v1/completions", json=body, headers={"x-request-id": given}) as response:
                assert (response.headers["x-request-id"] == given) == kept
                await response.read()
            arrive = server.controller.all(wire.Arrive)[-1]
            assert arrive.request_id == response.headers["x-request-id"]

    run(tmp_path, says("a"), scenario)


def test_one_log_line_a_request_without_its_texts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(server: Served) -> None:
        message = {"role": "user", "content": "canary-in"}
        async with server.chat(messages=[message]) as response:
            await response.read()

    with caplog.at_level(logging.DEBUG):
        run(tmp_path, says("canary-out"), scenario)
    lines = [record.getMessage() for record in caplog.records if record.name == "serverless_llm.request"]
    assert len(lines) == 1
    assert "model=demo" in lines[0]
    assert "end=stop" in lines[0]
    assert "canary" not in caplog.text


# --- operators ---


def test_admin_routes_are_questions_to_the_controller(tmp_path: Path) -> None:
    def answers(controller: Controller, message: wire.Message) -> None:
        if isinstance(message, wire.Ask):
            body = msgspec.json.encode({"verb": message.verb, "name": message.name, "body": message.body.decode()})
            controller.deliver(wire.Answer(message.id, 201 if message.verb == "deploy" else 200, body))
            controller.deliver(wire.Answer(message.id, 500, b"{}"))  # a second answer is nobody's

    async def ask(server: Served, method: str, path: str, data: bytes | None = None) -> tuple[int, Any]:
        url = yarl.URL(server.url + path, encoded=True)
        async with aiohttp.ClientSession() as http, http.request(method, url, data=data) as response:
            return response.status, await response.json()

    async def scenario(server: Served) -> None:
        spec = b'{"source": "/models/x"}'
        deployed = (201, {"verb": "deploy", "name": "team/x", "body": spec.decode()})
        assert await ask(server, "PUT", "/admin/models/team/x", spec) == deployed
        assert await ask(server, "PUT", "/admin/models/team%2Fx", spec) == deployed
        assert await ask(server, "PUT", "/admin/models/team%2fx", spec) == deployed
        assert (await ask(server, "GET", "/admin/models/x"))[1]["verb"] == "show"
        assert (await ask(server, "DELETE", "/admin/models/x"))[1]["verb"] == "delete"
        assert (await ask(server, "GET", "/admin/status"))[1] == {"verb": "status", "name": "", "body": "{}"}
        for verb in ("load", "unload", "pin"):
            answer = {"verb": verb, "name": "team/x", "body": "{}"}
            assert await ask(server, "POST", f"/admin/models/team/x/{verb}") == (200, answer)
        assert (await ask(server, "PUT", "/admin/models/x", b"["))[0] == 400

    run(tmp_path, answers, scenario)


def test_a_controller_that_does_not_answer(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        async with server.http.get("/admin/status") as response:
            assert (response.status, (await error_of(response))["code"]) == (503, "overloaded")

    run(tmp_path, silent, scenario, GatewayOptions(admin_timeout=0.01))


def test_stopping(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        async with server.chat(stream=True) as response:
            sequence = (await server.controller.saw(wire.Run)).sequence
            seen = events(response)
            await anext(seen)
            server.gateway.drain()
            async with server.chat() as refused, server.http.get("/ready") as ready:
                assert (refused.status, ready.status) == (503, 503)
            server.gateway.abort("the server is stopping")
            rest = [event async for event in seen]
        assert rest[0]["error"]["message"] == "the server is stopping"
        await server.gateway.idle()
        assert server.controller.all(wire.Gone)[0].sequences == [sequence]

    run(tmp_path, begins, scenario)


def test_an_idle_gateway_stops_at_once(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        server.gateway.drain()
        await server.gateway.idle()

    run(tmp_path, silent, scenario)
