"""Several choices of one request, echo and logprobs, message by message beside a scripted controller."""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from serverless_llm import wire
from serverless_llm.demo.tokenizer import chat_tokens
from serverless_llm.gateway.options import GatewayOptions
from serverless_llm.gateway.text_wire import Call
from tests.integration.scripted import (
    END,
    Controller,
    Served,
    attaches,
    client,
    decoded,
    error_of,
    events,
    model,
    run,
    says,
)

pytestmark = pytest.mark.slow


def scored(controller: Controller, sequence: int, tokens: Sequence[int], finish: str = "", epoch: int = 0) -> None:
    """Tokens with a logprob of -token / 100 each, the next higher token and the end beside it."""
    told = [(-token / 100, [token + 1, END], [-0.5, -7.0]) for token in tokens]
    controller.deliver(wire.Tokens([(sequence, epoch, list(tokens), finish)], {sequence: told}))


def by_index(seen: list[Any]) -> dict[int, list[Any]]:
    found: dict[int, list[Any]] = defaultdict(list)
    for event in seen:
        for choice in event["choices"]:
            found[choice["index"]].append(choice)
    return found


# --- n and several prompts ---


def test_n_choices_are_n_sequences_of_one_prompt(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        async with client(server) as ai:
            messages: Any = [{"role": "user", "content": "Hi"}]
            answer = await ai.chat.completions.create(model="demo", messages=messages, n=3, seed=9)
            again = await ai.chat.completions.create(model="demo", messages=messages, n=2, seed=9)
        assert [(choice.index, choice.message.content) for choice in answer.choices] == [
            (0, "ab"),
            (1, "ab"),
            (2, "ab"),
        ]
        assert len(again.choices) == 2
        usage = answer.usage
        assert usage is not None
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(chat_tokens("Hi")), 9)
        assert usage.total_tokens == usage.prompt_tokens + 9
        sent = server.controller.all(wire.Run)
        assert [one.sequence for one in sent] == [3 << 32 | number for number in range(1, 6)]
        seeds = [one.seed for one in sent]
        assert (len(set(seeds[:3])), seeds[0], seeds[3:]) == (3, 9, seeds[:2])
        assert all(0 <= seed < 1 << 63 for seed in seeds)

    run(tmp_path, says("ab"), scenario)


@pytest.mark.parametrize(
    ("asked", "param"),
    [({"prompt": "a", "n": 6}, "n"), ({"prompt": ["a", "b", "c"], "n": 2}, "n"), ({"prompt": ["a"] * 6}, "prompt")],
)
def test_more_choices_than_the_model_can_ever_take_are_refused_for_good(
    tmp_path: Path, asked: dict[str, Any], param: str
) -> None:
    async def scenario(server: Served) -> None:
        few = model("demo", tmp_path / "demo", max_concurrency=2, max_replicas=2, max_queue=1)
        server.gateway.receive(wire.Catalog([few], True))
        body = {"model": "demo", "max_tokens": 1}
        async with server.http.post("/v1/completions", json=body | asked) as response:
            error = await error_of(response)
            assert (response.status, error["code"], error["param"]) == (400, "invalid_request_error", param)
            limits = "max_concurrency 2, max_replicas 2, max_queue 1"
            assert error["message"] == f"demo takes at most 5 choices at a time ({limits}), this request has 6"
            assert response.headers["x-should-retry"] == "false"
            assert "Retry-After" not in response.headers
        assert server.controller.all(wire.Arrive) == []
        async with server.http.post("/v1/completions", json=body | {"prompt": "a", "n": 5}) as response:
            assert response.status == 200

    run(tmp_path, says("a", "length"), scenario)


def test_a_stream_interleaves_its_choices(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        controller, options = server.controller, {"include_usage": True}
        asking = asyncio.create_task(server.chat(stream=True, n=2, stream_options=options).__aenter__())
        one, two = (await controller.saw(wire.Run, 1)).sequence, (await controller.saw(wire.Run, 2)).sequence
        for sequence, token in ((two, "x"), (one, "a"), (two, "y"), (one, "b")):
            controller.tokens(sequence, [ord(token)])
            await asyncio.sleep(0)
        controller.tokens(two, [END], "stop")
        async with await asking as response:
            seen = events(response)
            before = [await anext(seen)]
            while before[-1]["choices"][0]["finish_reason"] is None:
                before.append(await anext(seen))
            controller.tokens(one, [ord("c")], "length")
            *after, last, done = [event async for event in seen]
        parts = by_index(before + after)
        texts = {index: "".join(part["delta"].get("content", "") for part in found) for index, found in parts.items()}
        assert texts == {0: "abc", 1: "xy"}
        for found in parts.values():
            assert [part["delta"].get("role") for part in found] == ["assistant"] + [None] * (len(found) - 1)
        assert {index: found[-1]["finish_reason"] for index, found in parts.items()} == {0: "length", 1: "stop"}
        assert sum(part["finish_reason"] is not None for found in parts.values() for part in found) == 2
        assert (last["choices"], last["usage"]["completion_tokens"], done) == ([], 6, "data: [DONE]")

    run(tmp_path, attaches, scenario)


def test_a_list_of_prompts_gives_choices_in_its_order(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        body: dict[str, Any] = {"model": "demo", "prompt": ["ab", [67]], "n": 2, "seed": 5}
        async with server.http.post("/v1/completions", json=body) as response:
            answer = await response.json()
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
        sent = server.controller.all(wire.Run)
        assert [decoded(one)[0] for one in sent] == [[*b"ab"], [*b"ab"], [67], [67]]
        assert sent[0].seed == sent[2].seed == 5
        assert sent[1].seed == sent[3].seed != 5
        assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 8, "total_tokens": 11}

    run(tmp_path, says("!"), scenario)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_stops_all_its_choices(tmp_path: Path, stream: bool) -> None:
    async def scenario(server: Served) -> None:
        asking = asyncio.create_task(server.chat(stream=stream, n=3).__aenter__())
        sequences = [(await server.controller.saw(wire.Run, count)).sequence for count in (1, 2, 3)]
        server.controller.tokens(sequences[1], [*b"x"], "length")
        if stream:
            (await asking).close()
        else:
            asking.cancel()
        assert await server.controller.saw(wire.Gone) == wire.Gone([sequences[0], sequences[2]], "client gone")

    run(tmp_path, attaches, scenario)


@pytest.mark.parametrize("stream", [True, False])
def test_one_choice_that_fails_ends_all(tmp_path: Path, stream: bool) -> None:
    async def scenario(server: Served) -> None:
        asking = asyncio.create_task(server.chat(stream=stream, n=2).__aenter__())
        one, two = (
            (await server.controller.saw(wire.Run, 1)).sequence,
            (await server.controller.saw(wire.Run, 2)).sequence,
        )
        server.controller.tokens(one, [], "not_finite")
        async with await asking as response:
            assert (response.status, (await error_of(response))["code"]) == (500, "engine_error")
        assert server.controller.all(wire.Gone) == [wire.Gone([two], "engine_error")]

    run(tmp_path, attaches, scenario)


def test_prompts_of_a_client_that_went_away_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Call] = []

    async def scenario(server: Served) -> None:
        prompt = server.text.prompt

        async def slow(call: Call, wanted: Callable[[], bool]) -> Any:
            read.append(call)
            asking.cancel()
            await server.controller.saw(wire.Gone)
            return await prompt(call, wanted)

        monkeypatch.setattr(server.text, "prompt", slow)
        body = {"model": "demo", "prompt": ["a", "b", "c"]}
        asking = asyncio.create_task(server.http.post("/v1/completions", json=body).__aenter__())
        assert len((await server.controller.saw(wire.Gone)).sequences) == 3
        await asyncio.wait([task for task in asyncio.all_tasks() if "_prepare" in repr(task)])

    run(tmp_path, attaches, scenario)
    assert [call.text for call in read] == ["a"]


def test_a_prompt_at_fault_ends_the_others(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        body = {"model": "demo", "prompt": ["a", "b" * 300]}
        async with server.http.post("/v1/completions", json=body) as response:
            assert (response.status, (await error_of(response))["code"]) == (400, "context_length_exceeded")
        assert len(server.controller.all(wire.Arrive)) == 2
        assert [len(one.sequences) for one in server.controller.all(wire.Gone)] == [2]

    run(tmp_path, attaches, scenario)


# --- echo ---


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("prompt", ["Grü", [*"Grü".encode()]], ids=["text", "ids"])
def test_echo(tmp_path: Path, prompt: Any, stream: bool) -> None:
    async def scenario(server: Served) -> None:
        async with client(server) as ai:
            ask: Any = ai.completions.create
            answer = await ask(model="demo", prompt=prompt, echo=True, stream=stream, stop="ü", n=2)
            pieces = [piece async for piece in answer] if stream else [answer]
        texts: dict[int, str] = defaultdict(str)
        for piece in pieces:
            for choice in piece.choices:
                texts[choice.index] += choice.text
        assert texts == {0: "Grüße", 1: "Grüße"}

    run(tmp_path, says("ße"), scenario, GatewayOptions(unread_limit=4))  # the prompt comes at once, and does not count


# --- logprobs ---


def test_logprobs_of_a_chat(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        async with client(server) as ai:
            messages: Any = [{"role": "user", "content": "Hi"}]
            ask = ai.chat.completions.create(model="demo", messages=messages, logprobs=True, top_logprobs=2)
            asking = asyncio.create_task(ask)
            sent = await server.controller.saw(wire.Run)
            scored(server.controller, sent.sequence, [65, *"ü".encode(), END], "stop")
            answer = await asking
        assert sent.logprobs == 2
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        assert [entry.token for entry in logprobs.content] == ["A", "\\xc3", "\\xbc"]
        assert [entry.logprob for entry in logprobs.content] == [-0.65, -1.95, -1.88]
        assert bytes(byte for entry in logprobs.content for byte in entry.bytes or ()).decode() == "Aü"
        first = [(top.token, top.logprob) for top in logprobs.content[0].top_logprobs]
        assert first == [("B", -0.5), ("<|end|>", -7.0)]

    run(tmp_path, attaches, scenario)


def test_logprobs_of_a_text(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        async with client(server) as ai:
            asking = asyncio.create_task(ai.completions.create(model="demo", prompt="x", logprobs=2))
            sent = await server.controller.saw(wire.Run)
            scored(server.controller, sent.sequence, [*b"abc"], "length")
            logprobs = (await asking).choices[0].logprobs
        assert logprobs is not None
        assert (sent.logprobs, logprobs.tokens, logprobs.text_offset) == (2, ["a", "b", "c"], [0, 1, 2])
        assert logprobs.token_logprobs == [-0.97, -0.98, -0.99]
        assert logprobs.top_logprobs is not None
        assert logprobs.top_logprobs[0] == {"b": -0.5, "<|end|>": -7.0, "a": -0.97}

    run(tmp_path, attaches, scenario)


@pytest.mark.parametrize("route", ["chat", "text"])
def test_streamed_logprobs_go_with_their_text_over_a_restart(tmp_path: Path, route: str) -> None:
    """Held back with it, cut with it, and told once: the sequence goes on elsewhere in between."""

    async def scenario(server: Served) -> None:
        controller = server.controller
        body: dict[str, Any] = {"model": "demo", "stream": True, "stop": ["END"]}
        if route == "chat":
            path, more = "chat/completions", {"messages": [{"role": "user", "content": "x"}], "logprobs": True}
        else:
            path, more = "completions", {"prompt": "x", "logprobs": 0}
        asking = asyncio.create_task(server.http.post(f"/v1/{path}", json=body | more).__aenter__())
        sequence = (await controller.saw(wire.Run)).sequence
        for byte in "aü E".encode():
            scored(controller, sequence, [byte])
            await asyncio.sleep(0)
        controller.attach(sequence, epoch=1)
        again = await controller.saw(wire.Run, 2)
        assert (decoded(again)[1], again.logprobs) == ([*"aü E".encode()], 0)
        scored(controller, sequence, [*b"X"], epoch=0)
        for byte in b"NEN":
            scored(controller, sequence, [byte], epoch=1)
            await asyncio.sleep(0)
        scored(controller, sequence, [*b"D!"], epoch=1)
        async with await asking as response:
            seen = [event["choices"][0] async for event in events(response) if not isinstance(event, str)]
        text, told, starts = "", b"", []
        for choice in seen:
            text += choice["text"] if route == "text" else choice["delta"].get("content", "")
            for entry in (choice["logprobs"] or {}).get("content", ()):
                told += bytes(entry["bytes"])
            starts += (choice["logprobs"] or {}).get("text_offset", [])
        assert text == "aü EN"
        assert told == ("aü EN".encode() if route == "chat" else b"")
        assert starts == ([] if route == "chat" else [0, 1, 1, 2, 3, 4])
        assert seen[-1]["finish_reason"] == "stop"

    run(tmp_path, attaches, scenario)


def test_tokens_without_text_are_told_at_the_end(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        asking = asyncio.create_task(server.chat(stream=True, logprobs=True, ignore_eos=True).__aenter__())
        sequence = (await server.controller.saw(wire.Run)).sequence
        scored(server.controller, sequence, [65])
        async with await asking as response:
            coming = events(response)
            seen = [(await anext(coming))["choices"][0]]
            scored(server.controller, sequence, [END], "length")
            seen += [event["choices"][0] async for event in coming if not isinstance(event, str)]
        told = [entry["token"] for choice in seen for entry in (choice["logprobs"] or {}).get("content", ())]
        assert told == ["A", "<|end|>"]

    run(tmp_path, attaches, scenario)


@pytest.mark.parametrize("logprobs", [None, False])
def test_nothing_is_asked_of_the_worker_without_need(tmp_path: Path, logprobs: bool | None) -> None:
    async def scenario(server: Served) -> None:
        async with server.chat(logprobs=logprobs, top_logprobs=0) as response:
            assert (await response.json())["choices"][0]["logprobs"] is None
        assert server.controller.all(wire.Run)[0].logprobs is None

    run(tmp_path, says("a"), scenario)


# --- min_tokens ---


def test_no_stop_string_ends_what_is_too_short(tmp_path: Path) -> None:
    async def scenario(server: Served) -> None:
        asking = asyncio.create_task(server.chat(stop=["a"], min_tokens=3).__aenter__())
        sent = await server.controller.saw(wire.Run)
        for byte in b"aabbaab":
            server.controller.tokens(sent.sequence, [byte])
        async with await asking as response:
            choice = (await response.json())["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("aabb", "stop")
        assert sent.shaping == wire.Shaping(0.0, 0.0, 1.0, [], 3)
        assert math.isclose(sent.min_p, 0.0)

    run(tmp_path, attaches, scenario)
