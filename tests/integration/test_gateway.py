"""The gateway as clients see it: a real server on loopback, real clients, a scripted controller."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from serverless_llm import wire
from serverless_llm.demo.tokenizer import chat_tokens
from tests.integration.scripted import (
    COLD,
    CONTEXT,
    END,
    Served,
    attaches,
    begins,
    client,
    collect,
    decoded,
    events,
    run,
    says,
)

pytestmark = pytest.mark.slow


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
        phases = metrics["cold_start_phases"]
        waited = {name: phases[name] for name in ("load_queue_ms", "prefill_ms")}
        assert phases == COLD | waited
        parts = (*waited.values(), phases["load_disk_ms"], phases["load_upload_ms"])
        assert sum(parts) == pytest.approx(metrics["time_to_first_token_ms"], abs=0.01)

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


@pytest.mark.parametrize("asked", [{"stream": True}, {"stream": False}, {"max_tokens": CONTEXT}], ids=str)
def test_a_request_leaves_nothing_to_the_garbage_collector(tmp_path: Path, asked: dict[str, Any]) -> None:
    """Whose full passes would hold up the streams of others; nor does one that is refused, with all of its prompt."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
        assert alone.submit(left_to_the_collector, tmp_path, asked).result() == []


def left_to_the_collector(directory: Path, asked: dict[str, Any]) -> list[str]:
    """Collected after ten requests, in a process where nothing else ends."""

    async def scenario(server: Served) -> None:
        gc.collect()
        gc.set_debug(gc.DEBUG_SAVEALL)
        for _ in range(10):
            async with server.chat(**asked) as response:
                await response.read()
        gc.collect()

    gc.disable()
    run(directory, says("hello"), scenario)
    return [repr(one) for one in gc.garbage]


def test_a_chat_that_asks_for_no_length_may_end_where_memory_does(tmp_path: Path) -> None:
    """Whether its prompt can ever fit is asked with one token more."""

    async def scenario(server: Served) -> None:
        for asked in ({}, {"max_tokens": 7}):
            async with server.chat(**asked) as response:
                assert response.status == 200
        assert [one.max_tokens for one in server.controller.all(wire.Prompted)] == [1, 7]
        free, bound = server.controller.all(wire.Run)
        assert (free.max_tokens, free.open_end) == (CONTEXT - len(free.prompt) // 4, True)
        assert (bound.max_tokens, bound.open_end) == (7, False)

    run(tmp_path, says("a"), scenario)


def test_what_a_request_asks_of_sampling(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        asked = {"min_p": 0.1, "frequency_penalty": 1, "logit_bias": {"7": -100, "3": 2}, "min_tokens": 2}
        async with server.chat(**asked) as response:
            assert response.status == 200
        async with server.chat() as response:
            assert response.status == 200
        shaped, plain = server.controller.all(wire.Run)
        assert (shaped.min_p, shaped.shaping) == (0.1, wire.Shaping(0.0, 1.0, 1.0, [(3, 2.0), (7, -100.0)], 2))
        assert (plain.min_p, plain.shaping) == (0.0, None)

    run(tmp_path, says("a"), scenario)


def test_a_checkpoints_own_penalty_is_the_default(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        path = tmp_path / "demo" / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"repetition_penalty": 1.25}))
        async with server.chat() as first, server.chat(repetition_penalty=1) as second:
            assert (first.status, second.status) == (200, 200)
        default, neutral = server.controller.all(wire.Run)
        assert default.shaping == wire.Shaping(0.0, 0.0, 1.25, [], 0)
        assert neutral.shaping is None

    run(tmp_path, says("a"), scenario)


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
