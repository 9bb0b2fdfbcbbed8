"""What clients see of a cold start: heartbeats, phases, and the end of a hold."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from serverless_llm import wire
from serverless_llm.gateway.options import GatewayOptions
from tests.integration.scripted import (
    COLD,
    END,
    QUICK,
    Served,
    attaches,
    error_of,
    events,
    model,
    run,
    says,
    silent,
)

pytestmark = pytest.mark.slow


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
                "load_remote",
                "load_disk",
                "load_upload",
                "load",
                "prefill",
                "first_token",
            }
            assert timing["load_disk"] == "0.02"
            seen = [event async for event in events(response)]
        assert seen[-2]["metrics"]["cold_start_phases"]["load_disk_ms"] == 0.02
        assert seen[0]["choices"][0]["delta"]["content"]

    run(tmp_path, says("hi", cold=COLD), scenario)


def test_who_comes_during_a_load_waited_for_the_rest_of_it(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        async with server.chat() as response:
            metrics = (await response.json())["metrics"]
        phases = metrics["cold_start_phases"]
        assert phases["load_ms"] == 9e5
        assert phases["load_queue_ms"] == 0
        assert phases["load_remote_ms"] == 0
        total = phases["load_disk_ms"] + phases["load_upload_ms"] + phases["prefill_ms"]
        assert total == pytest.approx(metrics["cold_start_ms"], abs=0.01)

    run(tmp_path, says("hi", cold=COLD | {"load_disk_ms": 9e5, "load_ms": 9e5}), scenario)


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
    patient = replace(QUICK, hold=2.0)  # longer than a busy machine takes to begin

    async def scenario(server: Served) -> None:
        asking = asyncio.create_task(server.chat().__aenter__())
        sequence = (await server.controller.saw(wire.Run)).sequence
        server.controller.tokens(sequence, [65])
        passed = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(1.2 * patient.hold, passed.set_result, None)
        await passed
        server.controller.tokens(sequence, [66], "length")
        async with await asking as response:
            assert response.status == 200

    run(tmp_path, attaches, scenario, patient)
