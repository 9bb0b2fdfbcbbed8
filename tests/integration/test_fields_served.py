"""Every field over HTTP, through the official client, to the engine and back: see `field_rows`.

Streams are cut by two splitters of our own, too: line by line, and as load generators cut what a socket gives.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec
import openai
import pytest

from serverless_llm.demo.tasks import checkpoint_dir
from serverless_llm.demo.tokenizer import chat_text
from serverless_llm.gateway import openai as schema
from tests.integration.field_rows import MAX_TOKENS, PROMPT, ROWS, Row, Said
from tests.serving import Server, until

pytestmark = pytest.mark.slow


class Loop:
    """An event loop in a thread, with a client that lives there."""

    def __init__(self, url: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.client = openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=0)

    def run(self, work: Any) -> Any:
        future: Future[Any] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result(30)

    def close(self) -> None:
        self.run(self.client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@dataclass(frozen=True)
class Served:
    server: Server
    sync: openai.OpenAI
    loop: Loop


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("fields")
    shutil.copytree(checkpoint_dir("demo-count"), folder / "demo")
    settings = folder / "demo" / "tokenizer_config.json"
    text = json.loads(settings.read_text())
    text["chat_template"] = text["chat_template"].replace(
        "message['content'] -}}", "(before or '') + message['content'] -}}", 1
    )
    settings.write_text(json.dumps(text))
    options = ("--devices", "cpu:1", "--device-memory", "32MiB", "--dram", "64MiB")
    with Server(folder / "state", *options) as server:
        for name in ("demo", "team/demo-2"):
            server.put(f"/admin/models/{name}", {"source": str(folder / "demo")})
        loop = Loop(f"{server.url}/v1")
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as sync:
            yield Served(server, sync, loop)
        loop.close()


class Asking:
    """`field_rows.Ask` through one of the clients. Fields that it has no name for go through its `extra_body`."""

    def __init__(self, served: Served, kind: str, route: str) -> None:
        self.chat = route == "chat"
        self._served = served
        client: Any = served.sync if kind == "sync" else served.loop.client
        self._create = client.chat.completions.create if self.chat else client.completions.create
        self._run: Callable[[Any], Any] = (lambda made: made) if kind == "sync" else served.loop.run
        self._named = inspect.signature(self._create).parameters

    def about(self, prompt: str) -> dict[str, Any]:
        if self.chat:
            return {"messages": [{"role": "user", "content": prompt}]}
        return {"prompt": chat_text(prompt)}

    def stays(self, expected: Callable[[float], bool]) -> bool:
        def seen() -> bool:
            shown = self._served.server.get("/admin/models/demo")
            return not shown["running"] and expected(shown["until"] - time.time() if shown["until"] else math.inf)

        return until(seen, "the model's time to be another")

    def __call__(self, **fields: Any) -> Said:
        body = {"model": "demo", "max_tokens": MAX_TOKENS, **self.about(PROMPT), **fields}
        extra = {name: body.pop(name) for name in list(body) if name not in self._named}
        made = self._create(**body, extra_body=extra)
        if fields.get("stream") is not True:
            return _joined([self._run(made).to_dict()])
        return _joined([chunk.to_dict() for chunk in self._run(_listed(made) if inspect.isawaitable(made) else made)])


async def _listed(made: Any) -> list[Any]:
    return [chunk async for chunk in await made]


def _joined(parts: list[dict[str, Any]]) -> Said:
    """One answer of a whole body, or of all chunks of a stream."""
    choices: dict[int, dict[str, Any]] = {}
    for part in parts:
        for choice in part["choices"]:
            found = choices.setdefault(choice["index"], {"text": "", "finish": None, "logprobs": None})
            found["text"] += choice.get("text") or choice.get("message", choice.get("delta", {})).get("content") or ""
            found["finish"] = choice["finish_reason"] or found["finish"]
            told = choice.get("logprobs")
            if told and found["logprobs"]:
                for key, values in told.items():
                    found["logprobs"][key] = found["logprobs"][key] + values if values else values
            found["logprobs"] = found["logprobs"] or told
    return Said([choices[index] for index in sorted(choices)], parts[-1].get("usage"), parts[0]["model"])


CASES = [pytest.param(row, route, id=f"{route}-{row.name}") for row in ROWS for route in row.routes]


KINDS = {"chat": "sync", "text": "async"}  # clients, where one will do


def test_every_field_has_a_row_with_every_kind_of_value() -> None:
    for route, checks in (("chat", schema._CHAT), ("text", schema._COMPLETION)):
        rows = [row.name for row in ROWS if route in row.routes]
        assert len(rows) == len(set(rows))
        assert set(rows) == {*checks, *schema._NEUTRAL, *schema._WITHOUT_EFFECT}
    for row in ROWS:
        assert row.wrong or row.any_value, row.name
        assert row.outside or row.any_value or row.unbounded, row.name


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize(("row", "route"), CASES)
def test_a_field_that_is_used(served: Served, kind: str, row: Row, route: str) -> None:
    assert row.used(Asking(served, kind, route))


@pytest.mark.parametrize(("row", "route"), [case for case in CASES if not case.values[0].required])  # type: ignore[union-attr]
def test_a_field_that_is_neutral(served: Served, row: Row, route: str) -> None:
    ask = Asking(served, KINDS[route], route)
    plain = ask(**row.beside).outcome
    for value in (*row.neutral, *([None] if row.null else [])):
        assert ask(**row.beside, **{row.name: value}).outcome == plain, value


@pytest.mark.parametrize(("row", "route"), [case for case in CASES if not case.values[0].any_value])  # type: ignore[union-attr]
def test_a_field_of_a_wrong_type_or_out_of_range(served: Served, row: Row, route: str) -> None:
    ask = Asking(served, KINDS[route], route)
    for value in (*row.wrong, *row.outside):
        with pytest.raises(openai.APIStatusError) as caught:
            ask(**row.beside, **{row.name: value})
        error = caught.value
        unknown = (row.name, value) == ("model", "nobody")
        assert (error.status_code, error.code == "model_not_found") == (404 if unknown else 400, unknown), value
        assert error.code in (
            "invalid_request_error",
            "unsupported_parameter",
            "model_not_found",
            "context_length_exceeded",
        )
        assert str(error.param).startswith(row.name), value
        assert row.name in error.message, value
        assert error.response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    "name", ["reasoning_effort", "audio", "prediction", "chat_template", "temprature", "guided_json"]
)
@pytest.mark.parametrize("route", ["chat", "text"])
def test_a_field_that_nobody_knows(served: Served, route: str, name: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        Asking(served, "sync", route)(**{name: "low"})
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", name)


# --- streams through two splitters ---


def by_line(raw: list[bytes]) -> list[Any]:
    """As clients that read lines do."""
    lines = b"".join(raw).split(b"\n")
    return [msgspec.json.decode(line[6:]) for line in lines if line.startswith(b"data: {")]


def by_chunk(raw: list[bytes]) -> list[Any]:
    """As load generators do: what the socket gave, joined only where an event was cut."""
    events, rest = [], ""
    for chunk in raw:
        rest += chunk.decode()
        while "\n\n" in rest:
            event, rest = rest.split("\n\n", 1)
            data = event.removeprefix("data: ")
            if data != "[DONE]":
                events.append(msgspec.json.decode(data))
    assert rest == ""
    return events


@pytest.mark.parametrize("splitter", [by_line, by_chunk])
@pytest.mark.parametrize("more", [{}, {"n": 3, "temperature": 2, "seed": 4}], ids=["one", "three"])
@pytest.mark.parametrize("route", ["chat", "text"])
def test_streams_give_every_token(
    served: Served, route: str, more: dict[str, Any], splitter: Callable[[list[bytes]], list[Any]]
) -> None:
    ask = Asking(served, "sync", route)
    fields = more | {"max_tokens": 60, "logprobs": True if ask.chat else 0}
    body = {"model": "demo", **ask.about(PROMPT), **fields, "stream": True, "stream_options": {"include_usage": True}}
    path = "/v1/chat/completions" if ask.chat else "/v1/completions"

    async def raw() -> list[bytes]:
        async with aiohttp.ClientSession(served.server.url) as http, http.post(path, json=body) as response:
            assert response.headers["Content-Type"].startswith("text/event-stream")
            return [chunk async for chunk in response.content.iter_any()]

    seen = splitter(asyncio.run(raw()))
    said, expected = _joined(seen), ask(**fields)
    assert said == expected
    told = [choice["logprobs"]["content" if ask.chat else "tokens"] for choice in said.choices]
    ends = sum(choice["finish"] == "stop" for choice in said.choices)
    assert sum(map(len, told)) + ends == said.tokens


def test_a_killed_worker_changes_nothing(served: Served) -> None:
    """Penalties count the tokens of the dead worker's time, logprobs are told once, and every choice goes on."""
    body = {
        "model": "demo", "prompt": chat_text("why?"), "stream": True, "n": 2, "seed": 3, "temperature": 1.5,
        "max_tokens": 250, "ignore_eos": True, "min_p": 0.01, "presence_penalty": 1, "frequency_penalty": 0.5,
        "repetition_penalty": 1.3, "logit_bias": {"65": -1}, "logprobs": 1,
    }  # fmt: skip

    async def said(disturb: bool) -> Said:
        seen: list[Any] = []
        async with (
            aiohttp.ClientSession(served.server.url) as http,
            http.post("/v1/completions", json=body) as response,
        ):
            async for line in response.content:
                if line.startswith(b"data: {"):
                    seen.append(msgspec.json.decode(line[6:]))
                if disturb and len(seen) == 60:
                    (pid,) = [device["worker_pid"] for device in served.server.devices()]
                    os.kill(pid, signal.SIGKILL)
                    disturb = False
        return _joined(seen)

    undisturbed, disturbed = asyncio.run(said(disturb=False)), asyncio.run(said(disturb=True))
    assert undisturbed == disturbed
    assert [choice["finish"] for choice in disturbed.choices] == ["length", "length"]
    assert [len(choice["logprobs"]["tokens"]) for choice in disturbed.choices] == [250, 250]
    until(lambda: '"restarts": 2,' in (served.server.state / "head.log").read_text(), "its line, after the answer")
