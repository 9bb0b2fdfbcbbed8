"""Whole request bodies: every field is honoured, without effect, or refused by name."""

from __future__ import annotations

import gc
import math
import re
from array import array
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverless_llm.errors import RequestError
from serverless_llm.gateway import fields, openai, openapi
from serverless_llm.gateway.body import decode

CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


def refused(body: dict[str, Any], chat: bool = True) -> RequestError:
    with pytest.raises(RequestError) as caught:
        openai.parse(body, chat)
    assert caught.value.status == 400
    return caught.value


def test_a_chat_with_everything() -> None:
    body = CHAT | {
        "max_completion_tokens": 9, "temperature": 0, "top_p": 0.5, "top_k": 3, "seed": -1, "stop": "\n",
        "stream": True, "stream_options": {"include_usage": True}, "keep_alive": "-1", "ignore_eos": True,
        "stop_token_ids": [4], "chat_template_kwargs": {"a": 1}, "min_p": 0.1, "presence_penalty": 1,
        "frequency_penalty": -1, "repetition_penalty": 1.5, "logit_bias": {"7": 5, "3": -100}, "min_tokens": 2,
        "n": 3, "logprobs": True, "top_logprobs": 4,
    }  # fmt: skip
    assert openai.parse(body, chat=True) == openai.CompletionRequest(
        chat=True, model="m", messages=[{"role": "user", "content": "x"}], prompts=[], max_tokens=9,
        seed=2**63 - 1, stop=("\n",), stop_token_ids=(4,), ignore_eos=True, stream=True,
        include_usage=True, keep_alive=math.inf, variables={"a": 1},
        sampling={"temperature": 0.0, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "presence_penalty": 1.0,
                  "frequency_penalty": -1.0, "repetition_penalty": 1.5},
        logit_bias=((3, -100.0), (7, 5.0)), min_tokens=2,
        n=3, logprobs=4, echo=False, choices=3,
    )  # fmt: skip


def test_defaults() -> None:
    chat, text = openai.parse(dict(CHAT), chat=True), openai.parse({"prompt": "x"}, chat=False)
    assert (chat.max_tokens, chat.sampling, chat.stream, chat.keep_alive) == (None, {}, False, None)
    assert (text.max_tokens, text.model, text.prompts) == (16, None, ["x"])


def test_a_seed_is_drawn_for_each_request() -> None:
    seeds = {openai.parse(dict(CHAT), chat=True).seed for _ in range(8)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    "body",
    [
        {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "parallel_tool_calls": True},
        {"prompt_cache_key": "k", "safety_identifier": "s"},
        {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "n": 1, "logprobs": False},
        {"logit_bias": {}, "min_tokens": 0},
        {
            "tools": None,
            "anything": None,
            "temperature": None,
            "stop": None,
            "stream_options": None,
            "keep_alive": None,
        },
    ],
)
def test_accepted_without_effect(body: dict[str, Any]) -> None:
    parsed = openai.parse(CHAT | body | {"seed": 1}, chat=True)
    assert parsed == openai.parse(CHAT | {"seed": 1}, chat=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"), ("response_format", {"type": "json_object"}), ("echo", True),
        ("chat_template", "{{ x }}"),
        ("temprature", 1), ("prompt", "x"),
        ("reasoning_effort", "low"), ("messages_", []),
    ],
)  # fmt: skip
def test_anything_else_is_refused_by_name(name: str, value: Any) -> None:
    error = refused(CHAT | {name: value})
    assert (error.code, error.param) == ("unsupported_parameter", name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("temprature", "'temprature' is not supported; did you mean 'temperature'?"),
        ("max_token", "'max_token' is not supported; did you mean 'max_tokens'?"),
        ("reasoning_effort", "'reasoning_effort' is not supported"),
    ],
)
def test_a_misspelt_field_is_told_the_nearest(name: str, message: str) -> None:
    assert refused(CHAT | {name: 1}).message == message


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("echo", True, "true is not supported, only false"),
        ("best_of", 2, "2 is not supported, only 1"),
        ("suffix", 'a"b', r'"a\"b" is not supported, only ""'),
        ("suffix", "x" * 1000, f'"{"x" * 30}..." is not supported, only ""'),
        ("tool_choice", "required", '"required" is not supported, only "none" or "auto"'),
        ("functions", [{"strict": None}], '[{"strict": null}] is not supported, only []'),
        ("modalities", ["text", "é"], '["text", "é"] is not supported, only ["text"]'),
        ("response_format", {"type": "json_object"}, '{"type": "json_object"} is not supported, only {"type": "text"}'),
    ],
)
def test_a_value_that_is_not_supported_is_named_in_json_with_those_that_are(name: str, value: Any, said: str) -> None:
    assert refused(CHAT | {name: value}).message == f"'{name}' {said}"


LONG = "x" * 1_000_000


@pytest.mark.parametrize(
    "change",
    [
        {LONG: 1},
        {"stream": True, "stream_options": {LONG: True}},
        {"messages": [{"role": "user", "content": "x", LONG: 1}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", LONG: 1}]}]},
        {"keep_alive": LONG},
        {"tools": [{"type": LONG}]},
    ],
    ids=["field", "stream_options", "message", "part", "keep_alive", "tools"],
)
def test_no_error_is_as_long_as_what_it_is_about(change: dict[str, Any]) -> None:
    error = refused(CHAT | change)
    assert "xxx" in error.message
    assert len(error.message) + len(error.param or "") < 500


def test_fields_of_one_route_only() -> None:
    assert refused({"prompt": "x", "messages": []}, chat=False).param == "messages"
    assert refused({"prompt": "x", "max_completion_tokens": 5}, chat=False).param == "max_completion_tokens"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": "m"}, "messages"),
        (CHAT | {"model": 5}, "model"),
        (CHAT | {"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
        (CHAT | {"stream_options": {"include_usage": True}}, "stream_options"),
        (CHAT | {"top_logprobs": 2}, "top_logprobs"),
        (CHAT | {"top_logprobs": 2, "logprobs": False}, "top_logprobs"),
        (CHAT | {"max_tokens": 0}, "max_tokens"),
        (CHAT | {"temperature": 2.5}, "temperature"),
        (CHAT | {"seed": 2**63}, "seed"),
    ],
)
def test_what_contradicts_or_is_missing(body: dict[str, Any], param: str) -> None:
    assert refused(body).param == param


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": "m"}, "prompt"),
        ({"prompt": "x", "echo": True, "logprobs": 0}, "echo"),
        ({"prompt": "x", "best_of": 2}, "best_of"),
        ({"prompt": "x", "best_of": 1, "n": 2}, "best_of"),
        ({"prompt": ["x"] * 65, "n": 2}, "prompt"),
        ({"prompt": "x", "logprobs": True}, "logprobs"),
        ({"prompt": "x", "logprobs": 6}, "logprobs"),
        ({"prompt": "x", "top_logprobs": 2}, "top_logprobs"),
    ],
)
def test_what_a_text_request_cannot_have(body: dict[str, Any], param: str) -> None:
    assert refused(body, chat=False).param == param


def test_choices() -> None:
    text = openai.parse({"prompt": ["a", [1, 2]], "n": 3, "best_of": 3, "logprobs": 0}, chat=False)
    assert (text.prompts, text.n, text.choices, text.logprobs) == (["a", array("i", [1, 2])], 3, 6, 0)
    chat = [openai.parse(CHAT | body, chat=True) for body in ({}, {"n": 2}, {"logprobs": True}, {"logprobs": False})]
    assert [one.choices for one in chat] == [1, 2, 1, 1]
    assert [one.logprobs for one in chat] == [None, None, 0, None]


def bounded() -> list[tuple[str, dict[str, Any], fields.Check]]:
    """Numbers of both routes: name, what the published document says, and the check of the field."""
    document = msgspec.json.decode(openapi.document())
    found = []
    for path, checks in (("chat/completions", openai._CHAT), ("completions", openai._COMPLETION)):
        body = document["paths"][f"/v1/{path}"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        for name, check in checks.items():
            schema = body["properties"][name]
            schema = schema.get("anyOf", [schema])[0]
            if schema.get("type") in ("integer", "number"):
                found.append((name, schema, check))
    return found


def test_the_published_bounds_are_those_of_the_checks() -> None:
    assert len(bounded()) > 20
    for name, schema, check in bounded():
        step = 1 if schema["type"] == "integer" else 1e-6
        above = "exclusiveMinimum" in schema
        least, most = schema["exclusiveMinimum" if above else "minimum"], schema["maximum"]
        within = [most, least + step if above else least]
        assert [check(value, name) for value in within] == within
        for value in (most + step, least if above else least - step):
            with pytest.raises(RequestError):
                check(value, name)


def test_the_documentation_names_every_field() -> None:
    page = (Path(__file__).parents[3] / "docs" / "completions.md").read_text()
    named = set(re.findall(r"`(\w+)`", page))
    assert {*openai._CHAT, *openai._COMPLETION, *openai._NEUTRAL, *openai._WITHOUT_EFFECT} <= named


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b'"x"', b'{"a": NaN}', b'{"a": 1e999}', b'{"a": "\xff"}', b'{"a": "\\ud800"}', b"[" * 100_000],
)
def test_a_body_that_is_no_json_object(raw: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        decode(raw)
    assert (caught.value.status, caught.value.code) == (400, "invalid_request_error")
    assert gc.isenabled()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from(sorted({*openai._CHAT, *openai._NEUTRAL, "other"}))


@given(st.dictionaries(NAMES, JSON, max_size=4), st.booleans())
def test_no_body_does_worse_than_400(body: dict[str, Any], chat: bool) -> None:
    try:
        parsed = openai.parse(body, chat)
    except RequestError as error:
        assert error.status == 400
    else:
        assert parsed.messages is not None or parsed.prompts
