"""What the gateway shows beside completions: models, readiness, metrics, logs, answers to operators; its end."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
import yarl

from serverless_llm import wire
from serverless_llm.errors import RequestError
from serverless_llm.gateway.keys import full
from serverless_llm.gateway.metrics import Metrics
from serverless_llm.gateway.options import GatewayOptions
from serverless_llm.gateway.traffic import STEP
from tests.integration.scripted import (
    COLD,
    Behaviour,
    Controller,
    Served,
    begins,
    client,
    error_of,
    events,
    model,
    run,
    says,
    silent,
)

pytestmark = pytest.mark.slow


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
        async with client(server).with_options(base_url=f"{server.url}/models/demo/v1") as ai:
            assert (await ai.models.retrieve("demo")).id == "demo"
        for path in ("/v1/models/nobody", "/models/demo/v1/models/team/demo-2", "/models/nobody/v1/models/nobody"):
            async with server.http.get(path) as response:
                assert (response.status, (await error_of(response))["code"]) == (404, "model_not_found")
        assert server.controller.sent == []

    run(tmp_path, silent, scenario)


@pytest.mark.parametrize("name", ["team/demo-2", "team%2Fdemo-2", "team%2fdemo-2"])
def test_a_name_with_a_slash_on_every_route(tmp_path: Path, name: str) -> None:
    async def scenario(server: Served) -> None:
        def ask(method: str, path: str, **body: Any) -> Any:
            return server.http.request(method, yarl.URL(server.url + path, encoded=True), json=body or None)

        async with ask("GET", f"/v1/models/{name}") as response:
            assert (await response.json())["id"] == "team/demo-2"
        async with ask("GET", f"/models/{name}/v1/models") as response:
            assert (await response.json())["data"][0]["id"] == "team/demo-2"
        async with ask("GET", f"/models/{name}/v1/models/{name}") as response:
            assert (await response.json())["id"] == "team/demo-2"
        messages = [{"role": "user", "content": "Hi"}]
        for body in ({"messages": messages}, {"messages": messages, "model": "team/demo-2"}):
            async with ask("POST", f"/models/{name}/v1/chat/completions", **body) as response:
                assert (response.status, (await response.json())["model"]) == (200, "team/demo-2")
        async with ask("POST", f"/models/{name}/v1/completions", prompt="x") as response:
            assert (await response.json())["model"] == "team/demo-2"

    run(tmp_path, says("hi"), scenario)


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
        assert 'serverless_llm_model_failed{model_name="demo"} 0.0' in text
        assert sum(step.tokens for step in server.gateway.metrics.traffic._steps) == 3
        server.gateway.receive(wire.Catalog([], True))
        assert '"demo"' not in await page(server)

    run(tmp_path, says("hi", cold=COLD), scenario)


def test_what_is_refused_before_any_worker_has_it_is_no_request_that_was_served(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        async with server.chat(max_tokens=256) as response:
            assert response.status == 400
        async with server.http.get("/metrics") as page:
            ends = [line for line in (await page.text()).splitlines() if line.startswith("vllm:request_success_total{")]
        assert ends == []
        assert sum(step.errors for step in server.gateway.metrics.traffic._steps) == 0

    run(tmp_path, silent, scenario)


def test_a_page_of_metrics_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, told = threading.Semaphore(0), threading.Event()
    make = Metrics.page

    def slow(metrics: Metrics) -> bytes:
        asked.release()
        assert told.wait(10)
        return make(metrics)

    monkeypatch.setattr(Metrics, "page", slow)

    async def scenario(server: Served) -> None:
        pages = [asyncio.create_task(server.http.get("/metrics").__aenter__()) for _ in range(3)]
        await asyncio.to_thread(asked.acquire)
        async with server.chat() as response:
            assert response.status == 200
        pages[0].cancel()
        told.set()
        for page in pages[1:]:
            async with await page as response:
                assert (response.status, "vllm:" in await response.text()) == (200, True)
        assert not asked.acquire(blocking=False)  # one page for all of them

    run(tmp_path, says("hi"), scenario)


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


def test_looking_at_the_status_leaves_no_line_unless_it_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(server: Served) -> None:
        async with server.http.get("/admin/status") as response:
            assert response.status == 200
        async with server.http.get("/admin/status", headers={"Host": "evil.example"}) as response:
            assert response.status == 403

    with caplog.at_level(logging.INFO):
        run(tmp_path, answering({}), scenario)
    lines = [record.getMessage() for record in caplog.records if record.name == "serverless_llm.request"]
    assert len(lines) == 1
    assert "status=403" in lines[0]


def test_what_is_asked_again_and_again_leaves_no_line_unless_it_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(server: Served) -> None:
        server.gateway.receive(wire.Catalog([], False))
        for path, status in (("/health", 200), ("/ready", 503), ("/metrics", 401)):
            async with server.http.get(path) as response:
                assert response.status == status
        async with server.http.get("/metrics", headers={"Authorization": "Bearer secret"}) as response:
            assert response.status == 200

    with caplog.at_level(logging.INFO):
        run(tmp_path, silent, scenario, GatewayOptions(keys=(full("secret"),), open_metrics=False))
    (line,) = [record.getMessage() for record in caplog.records if record.name == "serverless_llm.request"]
    assert "route=GET /metrics" in line
    assert "status=401" in line


def test_a_line_says_what_was_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def refuses(controller: Controller, message: wire.Message) -> None:
        if isinstance(message, wire.Ask):
            error = RequestError(400, "invalid_request_error", "no such thing", "source")
            controller.deliver(wire.Answer(message.id, error.status, msgspec.json.encode(error.body())))

    async def scenario(server: Served) -> None:
        async with server.chat(temperature=-1) as response:
            assert response.status == 400
        async with server.http.put("/admin/models/x", json={"source": "x"}) as response:
            assert response.status == 400
        async with server.chat(**{"a text\nwith lines": 1}) as response:
            assert response.status == 400

    with caplog.at_level(logging.INFO):
        run(tmp_path, refuses, scenario)
    lines = [record.getMessage() for record in caplog.records if record.name == "serverless_llm.request"]
    assert [line.partition(" param=")[2] for line in lines] == ["temperature", "source", ""]
    assert all("end=invalid_request_error" in line or "end=unsupported_parameter" in line for line in lines)


def test_what_a_request_names_forges_no_line_of_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(server: Served) -> None:
        url = yarl.URL(server.url + "/v1/models/x%0Astatus=200%1b[2J?key=canary", encoded=True)
        async with server.http.get(url) as response:
            assert response.status == 404

    with caplog.at_level(logging.INFO):
        run(tmp_path, silent, scenario)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "serverless_llm.request"]
    assert "route=GET /v1/models/x%0Astatus=200" in line
    assert line.isprintable()
    assert "canary" not in line


def answering(status: dict[str, Any]) -> Behaviour:
    """Says "hi" to every request, and `status` to operators."""
    say = says("hi")

    def on(controller: Controller, message: wire.Message) -> None:
        say(controller, message)
        if isinstance(message, wire.Ask):
            controller.deliver(wire.Answer(message.id, 200, msgspec.json.encode(status)))

    return on


def test_the_status_tells_of_traffic(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        async with server.chat() as response:
            await response.read()
        traffic = server.gateway.metrics.traffic.shown(time.monotonic() + STEP)
        assert sum(traffic["tokens_per_s"]) * STEP == 3
        assert sum(traffic["requests_per_s"]) * STEP == 1
        assert sum(traffic["errors_per_s"]) == 0
        assert any(traffic["first_token_p50_ms"]) and any(traffic["token_gap_p50_ms"])
        async with server.http.get("/admin/status") as response:
            status = await response.json()
        assert status["models"] == []
        assert status["traffic"].keys() == traffic.keys()

    run(tmp_path, answering({"models": []}), scenario)


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
        status = (await ask(server, "GET", "/admin/status"))[1]
        assert len(status.pop("traffic")["tokens_per_s"]) > 100
        assert status == {"verb": "status", "name": "", "body": "{}"}
        for verb in ("load", "unload", "pin"):
            answer = {"verb": verb, "name": "team/x", "body": "{}"}
            assert await ask(server, "POST", f"/admin/models/team/x/{verb}") == (200, answer)
        drained = {"verb": "drain", "name": "node0", "body": '{"drained": false}'}
        assert await ask(server, "POST", "/admin/nodes/node0/drain", b'{"drained": false}') == (200, drained)
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
                assert (await error_of(refused))["message"] == "the server is stopping"
                assert await ready.json() == {"ready": False, "problems": ["the server is stopping"]}
            server.gateway.abort("the server is stopping")
            rest = [event async for event in seen]
        assert rest[0]["error"]["message"] == "the server is stopping"
        await server.gateway.idle()
        assert server.controller.all(wire.Gone)[0].sequences == [sequence]

    run(tmp_path, begins, scenario)


def test_a_body_that_ends_when_the_server_stops_begins_nothing(tmp_path: Path) -> None:
    begun, stopping = asyncio.Event(), asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        yield b'{"model": "demo",'
        begun.set()
        await stopping.wait()
        yield b'"prompt": "x"}'

    async def scenario(server: Served) -> None:
        asking = asyncio.create_task(server.http.post("/v1/completions", data=slowly()).__aenter__())
        await begun.wait()
        async with server.http.get("/health"):  # by now its handler waits for the rest
            server.gateway.drain()
        stopping.set()
        async with await asking as response:
            assert (response.status, (await error_of(response))["code"]) == (503, "overloaded")

    run(tmp_path, says("a"), scenario)


def test_an_idle_gateway_stops_at_once(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        server.gateway.drain()
        await server.gateway.idle()

    run(tmp_path, silent, scenario)


def test_who_was_given_back_waits_and_has_not_begun(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        answer = asyncio.create_task(server.chat().__aenter__())
        sequence = (await server.controller.saw(wire.Prompted)).sequence
        server.controller.attach(sequence)
        await server.controller.saw(wire.Run)
        server.controller.deliver(wire.GivenBack(sequence))
        async with server.http.get("/metrics") as page:
            text = await page.text()
        assert 'vllm:num_requests_waiting{engine="",model_name="demo"} 1.0' in text
        assert 'vllm:num_requests_running{engine="n0/0",model_name="demo"}' not in text
        server.controller.attach(sequence, epoch=1, queue_ms=500.0)
        server.controller.tokens(sequence, [65], "length", epoch=1)
        (choice,) = server.gateway.live
        async with await answer as response:
            assert (await response.json())["metrics"]["queue_time_ms"] == 500.0
        assert choice.restarts == 0

    run(tmp_path, silent, scenario)
