"""Chunks and bodies, byte by byte where clients are picky."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverless_llm.errors import RequestError
from serverless_llm.gateway import sse

CHAT = sse.Identity(True, "r1", 1700000000, 'team/"m"')
TEXT = sse.Identity(False, "r1", 1700000000, "m")
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def events(raw: bytes) -> list[Any]:
    """The decoded data events; `[DONE]` as it is."""
    assert raw.endswith(b"\n\n")
    blocks = raw[:-2].split(b"\n\n")
    assert all(block.startswith(b"data: ") and b"\n" not in block for block in blocks)
    return ["DONE" if block == b"data: [DONE]" else msgspec.json.decode(block[6:]) for block in blocks]


def test_a_chat_stream() -> None:
    chunks = sse.Chunks(CHAT, include_usage=False)
    first, beat, second = (events(raw)[0] for raw in (chunks.delta("a\n"), chunks.heartbeat(), chunks.delta("b")))
    base = {"id": "chatcmpl-r1", "object": "chat.completion.chunk", "created": 1700000000, "model": 'team/"m"'}
    open_choice = {"index": 0, "logprobs": None, "finish_reason": None}
    assert first == base | {"choices": [open_choice | {"delta": {"role": "assistant", "content": "a\n"}}]}
    assert beat == base | {"choices": [open_choice | {"delta": {}}]}
    assert second == base | {"choices": [open_choice | {"delta": {"content": "b"}}]}
    last, done = events(chunks.last("stop", {"x": 1}) + sse.closing(CHAT, None))
    assert last == base | {"choices": [open_choice | {"delta": {}, "finish_reason": "stop"}], "metrics": {"x": 1}}
    assert done == "DONE"


@pytest.mark.parametrize("identity", [CHAT, TEXT], ids=["chat", "text"])
def test_with_usage_every_chunk_has_it_null_and_a_last_one_carries_it(identity: sse.Identity) -> None:
    chunks = sse.Chunks(identity, include_usage=True)
    *others, last, done = events(
        chunks.heartbeat() + chunks.delta("a") + chunks.last("length", {}) + sse.closing(identity, USAGE)
    )
    assert [event["usage"] for event in others] == [None, None, None]
    assert (last["choices"], last["usage"], done) == ([], USAGE, "DONE")


def test_the_first_event_carries_the_role_once_whichever_it_is() -> None:
    for opening in ("heartbeat", "delta", "last"):
        chunks = sse.Chunks(CHAT, include_usage=False)
        openings: dict[str, Callable[[], bytes]] = {
            "heartbeat": chunks.heartbeat,
            "delta": partial(chunks.delta, "x"),
            "last": bytes,
        }
        raw = openings[opening]()
        seen = events(raw + chunks.last("stop", {}) + sse.closing(CHAT, None))[:-1]
        assert [event["choices"][0]["delta"].get("role") for event in seen] == ["assistant"] + [None] * (len(seen) - 1)
        assert len(seen) == 2


def test_a_text_stream() -> None:
    chunks = sse.Chunks(TEXT, include_usage=False)
    beat, delta, last, _done = events(
        chunks.heartbeat() + chunks.delta("a") + chunks.last("stop", {}) + sse.closing(TEXT, None)
    )
    assert [event["choices"][0]["text"] for event in (beat, delta, last)] == ["", "a", ""]
    assert (delta["object"], delta["id"], last["choices"][0]["finish_reason"]) == ("text_completion", "cmpl-r1", "stop")


@given(st.text())
def test_any_text_survives(text: str) -> None:
    for identity in (CHAT, TEXT):
        choice = events(sse.Chunks(identity, include_usage=False).delta(text))[0]["choices"][0]
        assert (choice["delta"]["content"] if identity.chat else choice["text"]) == text


@pytest.mark.parametrize("identity", [CHAT, TEXT], ids=["chat", "text"])
def test_logprobs_come_with_their_text_and_every_chunk_names_its_choice(identity: sse.Identity) -> None:
    chunks = sse.Chunks(identity, include_usage=False, index=3)
    seen = events(chunks.delta("a", {"content": []}) + chunks.delta("b") + chunks.heartbeat() + chunks.last("stop", {}))
    choices = [event["choices"][0] for event in seen]
    assert [choice["index"] for choice in choices] == [3] * 4
    assert [choice["logprobs"] for choice in choices] == [{"content": []}, None, None, None]


def test_a_failure_in_mid_stream() -> None:
    error = RequestError(500, "engine_error", "why")
    assert events(sse.failed(error)) == [
        {"error": {"message": "why", "type": "server_error", "param": None, "code": "engine_error"}},
        "DONE",
    ]


def test_whole_bodies() -> None:
    chat = msgspec.json.decode(sse.whole(CHAT, [sse.choice(True, 0, "hi", "stop", None)], USAGE, {"x": 1}))
    text = msgspec.json.decode(sse.whole(TEXT, [sse.choice(False, 1, "hi", "length", {"a": 1})], USAGE, {}))
    assert chat["object"] == "chat.completion"
    assert chat["choices"][0]["message"] == {"role": "assistant", "content": "hi", "refusal": None}
    assert (chat["usage"], chat["metrics"]) == (USAGE, {"x": 1})
    assert (text["choices"][0]["index"], text["choices"][0]["logprobs"]) == (1, {"a": 1})
    assert (text["object"], text["choices"][0]["text"], text["choices"][0]["finish_reason"]) == (
        "text_completion",
        "hi",
        "length",
    )
