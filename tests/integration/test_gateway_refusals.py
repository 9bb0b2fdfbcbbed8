"""Every way in which the gateway says no, or ends what had begun."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import openai
import pytest
import yarl

from serverless_llm import wire
from serverless_llm.gateway import text
from serverless_llm.gateway.keys import Key, digest, full
from serverless_llm.gateway.options import GatewayOptions
from serverless_llm.gateway.text import TextLimits, TextPool
from tests.integration.scripted import (
    Controller,
    Served,
    attaches,
    begins,
    collect,
    error_of,
    events,
    model,
    run,
    says,
    served,
    silent,
    write_checkpoint,
)

pytestmark = pytest.mark.slow


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
        async with server.http.get("/metrics") as page:
            assert f'serverless_llm_errors_total{{code="{code}"}} 1.0' in await page.text()
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
                server.controller.tokens(sequence, [], "not_finite")
            else:
                server.controller.reject(sequence, 500, "engine_error")
            rest = [event async for event in seen]
        assert rest[0]["error"]["code"] == "engine_error"
        assert rest[1:] == ["data: [DONE]"]
        assert not server.controller.all(wire.Gone)

    run(tmp_path, begins, scenario)


def test_a_failure_before_the_headers_is_a_status(tmp_path: Path) -> None:
    def fails(controller: Controller, message: wire.Message) -> None:
        attaches(controller, message)
        if isinstance(message, wire.Run):
            controller.tokens(message.sequence, [65])
            controller.tokens(message.sequence, [], "not_finite")

    async def scenario(server: Served) -> None:
        async with server.chat(stream=True) as response:
            assert (response.status, (await error_of(response))["code"]) == (500, "engine_error")

    run(tmp_path, fails, scenario)


def test_an_engine_failure_before_any_token_is_a_500(tmp_path: Path) -> None:
    def fails(controller: Controller, message: wire.Message) -> None:
        attaches(controller, message)
        if isinstance(message, wire.Run):
            controller.tokens(message.sequence, [], "not_finite")

    async def scenario(server: Served) -> None:
        for stream in (True, False):
            async with server.chat(stream=stream) as response:
                error = await error_of(response)
                assert (response.status, error["code"]) == (500, "engine_error")
                assert "logits are NaN or infinite" in error["message"]

    run(tmp_path, fails, scenario)


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "param"),
    [
        ("/v1/chat/completions", {"model": "nobody", "messages": []}, 400, "invalid_request_error", "messages"),
        ("/v1/completions", {"model": "nobody", "prompt": "x"}, 404, "model_not_found", "model"),
        ("/v1/completions", {"prompt": "x"}, 400, "invalid_request_error", "model"),
        ("/models/demo/v1/completions", {"model": "team/demo-2", "prompt": "x"}, 400, "invalid_request_error", "model"),
        ("/models/nobody/v1/completions", {"prompt": "x"}, 404, "model_not_found", "model"),
        ("/models/nobody/v1/completions", {"model": "demo", "prompt": "x"}, 404, "model_not_found", "model"),
        ("/v1/completions", {"model": "demo", "prompt": "x", "suffix": "y"}, 400, "unsupported_parameter",
         "suffix"),
        ("/v1/completions", {"model": "demo", "prompt": "x" * 256}, 400, "context_length_exceeded", "prompt"),
        ("/v1/completions", {"model": "demo", "prompt": "x", "max_tokens": 256}, 400, "context_length_exceeded",
         "max_tokens"),
        ("/v1/chat/completions", {"model": "demo", "messages": [{"role": "user", "content": "x"}], "max_tokens": 256},
         400, "context_length_exceeded", "max_tokens"),
        ("/v1/completions", {"model": "demo", "prompt": ""}, 400, "invalid_request_error", "prompt"),
        ("/v1/completions", {"model": "demo", "prompt": [5000]}, 400, "invalid_request_error", "prompt"),
        ("/v1/completions", {"model": "demo", "prompt": "x", "logit_bias": {"5000": 1}}, 400, "invalid_request_error",
         "logit_bias"),
        ("/v1/completions", {"model": "demo", "prompt": "x", "stop_token_ids": [1, 5000]}, 400,
         "invalid_request_error", "stop_token_ids"),
        ("/v1/completions", {"model": "demo", "prompt": "x", "min_tokens": 17}, 400, "invalid_request_error",
         "min_tokens"),
        ("/v1/completions", {"model": "demo", "prompt": "x" * 5000}, 413, "request_too_large", None),
        ("/v1/other", {}, 404, "not_found", None),
        ("/v1/completions/", {}, 404, "not_found", None),
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


def test_a_body_over_the_limit_is_told_the_limit(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        async with server.chat(messages=[{"role": "user", "content": "x" * 5000}]) as response:
            assert response.status == 413
            assert (await error_of(response))["message"] == "the body is over the limit of 4096 bytes"

    run(tmp_path, silent, scenario, GatewayOptions(body_limit=4096))


def test_a_prompt_over_the_context_is_told_both_lengths(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        for count, wanted in (256, 1), (300, 16):
            body = {"model": "demo", "prompt": [65] * count, "max_tokens": wanted}
            async with server.http.post("/v1/completions", json=body) as response:
                message = (await error_of(response))["message"]
            says = f"the context is 256 tokens long; the prompt has {count} and max_tokens asks for {wanted} more"
            assert message == says

    run(tmp_path, silent, scenario)


def test_an_unknown_model_is_told_the_nearest_name(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        for name, near in (("dmo", "; did you mean 'demo'?"), ("nobody", "")):
            async with server.chat(model=name) as response:
                assert (await error_of(response))["message"] == f"the model {name!r} does not exist{near}"

    run(tmp_path, silent, scenario)


def test_a_model_that_could_not_be_restored_is_not_unknown(tmp_path: Path) -> None:
    """The controller does not know it; the catalogue says why."""

    async def scenario(server: Served) -> None:
        lost = model("lost", tmp_path, checkpoint="", state="failed", error="model.safetensors is missing in /m")
        server.gateway.receive(wire.Catalog([lost], True))
        async with server.chat(model="lost") as response:
            assert response.status == 503
            error = await error_of(response)
            assert error["code"] == "model_load_failed"
            why = "model.safetensors is missing in /m; it is tried again once a minute"
            assert error["message"] == f"the model 'lost' cannot be served: {why}"
            assert response.headers["x-should-retry"] == "false"
        assert not server.controller.all(wire.Arrive)

    run(tmp_path, silent, scenario)


def test_other_methods_and_bodies_get_json_errors(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        async with server.http.get("/v1/chat/completions") as response:
            error = await error_of(response)
            assert (response.status, error["code"]) == (405, "method_not_allowed")
            assert error["message"] == "/v1/chat/completions takes POST, not GET"
            assert response.headers["Allow"] == "POST"
        for path in ("/models/demo", "/models/demo/v1", "/nothing"):
            async with server.http.get(path) as response:
                assert (response.status, (await error_of(response))["code"]) == (404, "not_found")
        async with server.http.post("/v1/chat/completions", data=b"{") as response:
            assert (response.status, (await error_of(response))["code"]) == (400, "invalid_request_error")
        async with server.http.get("/v1/models", headers={"Host": "evil.example"}) as response:
            assert (response.status, (await error_of(response))["code"]) == (403, "permission_denied")

    run(tmp_path, silent, scenario)


def test_keys(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        async with server.chat() as response:
            assert (response.status, (await error_of(response))["code"]) == (401, "invalid_api_key")
            assert response.headers["WWW-Authenticate"] == "Bearer"
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="secret") as ai:
            assert await collect(ai, stream=True) == ("hi", "stop")

    run(tmp_path, says("hi"), scenario, GatewayOptions(keys=(full("secret"),)))


def test_limits_of_a_key(tmp_path: Path) -> None:
    limited = (Key("a", digest(b"a"), concurrency=1), Key("b", digest(b"b"), tokens_per_minute=10))

    async def scenario(server: Served) -> None:
        def chat(key: str) -> Any:
            body = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}
            return server.http.post("/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"})

        async with chat("b") as response:
            assert response.status == 200
        async with chat("b") as response:
            error = await error_of(response)
            assert (response.status, error["code"], error["type"]) == (429, "rate_limit_exceeded", "rate_limit_error")
            assert int(response.headers["Retry-After"]) > 0
        server.controller.on = attaches
        async with asyncio.TaskGroup() as group:
            first = group.create_task(status_of(chat("a")))
            sequence = (await server.controller.saw(wire.Run, 2)).sequence
            async with chat("a") as response:
                assert (response.status, (await error_of(response))["code"]) == (429, "rate_limit_exceeded")
            server.controller.tokens(sequence, [65], "length")
        assert first.result() == 200
        server.controller.on = says("hi")
        async with chat("a") as response:
            assert response.status == 200

    run(tmp_path, says("hi, who are you?"), scenario, GatewayOptions(keys=limited))


def test_a_choice_counts_as_a_request_of_its_key(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        for choices, after in ((3, None), (2, "1")):
            body = {"model": "demo", "prompt": ["a"] * choices, "max_tokens": 1}
            if after:  # another one runs
                held = server.http.post("/v1/completions", json=body | {"prompt": "a"}, headers=KEY)
                running = asyncio.create_task(held.__aenter__())
                await server.controller.saw(wire.Run)
            async with server.http.post("/v1/completions", json=body, headers=KEY) as response:
                assert (response.status, (await error_of(response))["code"]) == (429, "rate_limit_exceeded")
                assert response.headers.get("Retry-After") == after
                assert ("x-should-retry" in response.headers) == (after is None)
        server.controller.tokens(server.controller.all(wire.Run)[0].sequence, [65], "length")
        async with await running as response:
            assert response.status == 200
        assert len(server.controller.all(wire.Arrive)) == 1

    run(tmp_path, attaches, scenario, GatewayOptions(keys=(Key("a", digest(b"a"), concurrency=2),)))


KEY = {"Authorization": "Bearer a"}


async def status_of(request: Any) -> int:
    async with request as response:
        status: int = response.status
        return status


def test_a_key_that_is_no_text_is_refused(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        url = yarl.URL(server.url)
        reader, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xe9\r\nConnection: close\r\n\r\n")
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 401 ")
        writer.close()

    run(tmp_path, silent, scenario, GatewayOptions(keys=(full("secret"),)))


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
        server.gateway.receive(wire.Catalog([model("demo", tmp_path / "demo", checkpoint=["c0"])], True))
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


ENDLESS = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
BACKTRACKING = {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated", "invert": False}
ATTACK = 3.0  # seconds that a text process is given
PANICKING = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize("file", ["template", "regex", "panic"])
def test_hostile_text_files_delay_no_live_stream(tmp_path: Path, file: str) -> None:
    async def scenario(server: Served) -> None:
        source = write_checkpoint(tmp_path / "bad")
        if file == "template":
            (source / "chat_template.jinja").write_text(ENDLESS)
        else:
            parts = json.loads((source / "tokenizer.json").read_text())
            parts["pre_tokenizer"] = BACKTRACKING if file == "regex" else PANICKING
            (source / "tokenizer.json").write_text(json.dumps(parts))
        server.gateway.receive(wire.Catalog([model("demo", tmp_path / "demo"), model("bad", source)], True))
        async with server.chat(stream=True) as response, asyncio.TaskGroup() as group:
            sequence = (await server.controller.saw(wire.Run)).sequence
            seen = events(response)
            assert (await anext(seen))["choices"][0]["delta"]["content"] == "A"
            messages = [{"role": "user", "content": "a" * 34 + "!"}]
            hostile = group.create_task(refusal_of(server.chat(model="bad", messages=messages)))
            told = 0
            while not hostile.done():  # each token arrives before the next, and before the attack has ended
                server.controller.tokens(sequence, [66])
                async with asyncio.timeout(ATTACK / 2):
                    assert (await anext(seen))["choices"][0]["delta"]["content"] == "B"
                told += 1
            assert told > 10
            status, error = hostile.result()
            assert (status, error["code"]) == (500, "engine_error")
            assert "'bad': its chat template or tokenizer ended a text process" in error["message"]
            server.controller.tokens(sequence, [67], "length")
            assert [event async for event in seen][-1] == "data: [DONE]"

    async def main() -> None:
        text = TextPool(1, TextLimits(seconds=ATTACK))
        async with served(tmp_path, begins, GatewayOptions(), text) as server, asyncio.timeout(20):
            await scenario(server)

    asyncio.run(main())


async def refusal_of(request: Any) -> tuple[int, dict[str, Any]]:
    async with request as response:
        return response.status, await error_of(response)


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


def test_a_large_prompt_whose_client_left_while_it_waited_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "LARGE", 500)

    async def scenario(server: Served) -> None:
        (process,) = server.text._free
        async with server.text._turn:
            messages = [{"role": "user", "content": "x" * 500}]
            asked = asyncio.create_task(refusal_of(server.chat(messages=messages)))
            while not server.text._turn._waiters:
                await asyncio.sleep(0)
            asked.cancel()
            await server.controller.saw(wire.Gone)
        while server.text._large:
            assert process in server.text._free
            await asyncio.sleep(0)

    run(tmp_path, begins, scenario)
