"""The published document says what the gateway does: every route, every field."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverless_llm import wire
from serverless_llm.domain import MAX_COUNT, MAX_SOURCE
from serverless_llm.errors import RequestError
from serverless_llm.gateway import openai, openapi
from serverless_llm.gateway.app import Gateway
from serverless_llm.gateway.text import TextPool
from serverless_llm.node.admin import DeployBody, PinBody, spec_of
from tests.integration.field_rows import ROWS

DOCUMENT: dict[str, Any] = json.loads(openapi.document())
MESSAGES = [{"role": "user", "content": "x"}]
UNDESCRIBED = {"/"}  # the dashboard's page


def properties(path: str, method: str = "post") -> set[str]:
    body = DOCUMENT["paths"][path][method]["requestBody"]
    return set(body["content"]["application/json"]["schema"]["properties"])


@pytest.mark.parametrize("prefix", ["/v1", "/models/{name}/v1"])
def test_every_field_of_a_request_is_described(prefix: str) -> None:
    neutral = set(openai._NEUTRAL) | openai._WITHOUT_EFFECT
    assert properties(f"{prefix}/chat/completions") == set(openai._CHAT) | neutral
    assert properties(f"{prefix}/completions") == set(openai._COMPLETION) | neutral


def schema(path: str, method: str = "post") -> dict[str, Any]:
    body = DOCUMENT["paths"][path][method]["requestBody"]
    found: dict[str, Any] = body["content"]["application/json"]["schema"]
    return found


ROUTES: dict[bool, tuple[Any, dict[str, Any]]] = {
    True: (jsonschema_rs.validator_for(schema("/v1/chat/completions")), {"model": "m", "messages": MESSAGES}),
    False: (jsonschema_rs.validator_for(schema("/v1/completions")), {"model": "m", "prompt": "x"}),
}
BESIDE: dict[tuple[bool, str], dict[str, Any]] = {
    (True, "top_logprobs"): {"logprobs": True},
    (True, "stream_options"): {"stream": True},
    (False, "stream_options"): {"stream": True},
}
SHAPES: list[dict[str, Any]] = [
    *({"role": role, "content": "x"} for role in ("user", "developer", "tool", None)),
    *({"role": "user", "content": content} for content in (None, [], 5, ["x"], [{"type": "text"}])),
    *({"role": "user", "content": [{"type": "text", "text": "x", **more}]} for more in ({"a": None}, {"a": 1})),
    *(
        {"role": "assistant", "content": "x", name: value}
        for name in ("name", "refusal", "tool_calls", "other")
        for value in (None, [], "x", [{"id": "1"}])
    ),
]
APART = ("model", "messages", "best_of")  # the last depends on `n`
VALUES: dict[str, list[Any]] = {
    row.name: [*row.neutral, *row.wrong, *row.outside, None] for row in ROWS if row.name not in APART
} | {"messages": [[shape] for shape in SHAPES], "other": [None, 1]}
TEXTS = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=3)
FRACTIONS = st.floats(-5, 5).filter(lambda number: number % 1 != 0)  # 1.0 is an integer to JSON Schema, and not to us
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 200) | FRACTIONS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=4,
)


def agrees(chat: bool, name: str, value: Any) -> None:
    """A body with this field is taken just if the document describes it."""
    validator, plain = ROUTES[chat]
    body = plain | BESIDE.get((chat, name), {}) | {name: value}
    try:
        openai.parse(body, chat)
        taken = True
    except RequestError:
        taken = False
    assert validator.is_valid(body) == taken, (name, value)


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("name", VALUES)
def test_what_the_document_describes_is_what_is_taken(chat: bool, name: str) -> None:
    for value in VALUES[name]:
        agrees(chat, name, value)


@given(st.booleans(), st.sampled_from(sorted(VALUES)), JSON)
def test_of_any_value_too(chat: bool, name: str, value: Any) -> None:
    agrees(chat, name, value)


def test_every_field_of_a_deploy_is_described() -> None:
    assert properties("/admin/models/{name}", "put") == set(DeployBody.__struct_fields__)
    assert properties("/admin/models/{name}/pin") == set(PinBody.__struct_fields__)


COUNTS = ("min_replicas", "max_replicas", "max_concurrency", "max_queue", "context")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("source", ("/a" * MAX_SOURCE)[:length]) for length in (MAX_SOURCE, MAX_SOURCE + 1)),
        *((name, value) for name in COUNTS for value in (-1, 0, 1, MAX_COUNT, MAX_COUNT + 1)),
    ],
)
def test_a_deploy_within_the_bounds_that_the_document_states_is_taken(name: str, value: int | str) -> None:
    body = {"source": "/a", "max_replicas": MAX_COUNT, name: value}
    try:
        spec_of("m", json.dumps(body).encode(), 300.0, ())
        taken = True
    except RequestError:
        taken = False
    assert jsonschema_rs.is_valid(schema("/admin/models/{name}", "put"), body) == taken


def test_every_route_is_described() -> None:
    def nobody(_message: wire.Message) -> None:
        raise AssertionError

    async def main() -> set[tuple[str, str]]:
        app = Gateway(nobody, TextPool(1), generation=1).application()
        routes = {(route.method, route.resource.canonical) for route in app.router.routes() if route.resource}
        return {(method.lower(), path) for method, path in routes if method != "HEAD"}

    served = asyncio.run(main())
    methods = {"get", "put", "post", "delete"}
    described = {(method, path) for path, item in DOCUMENT["paths"].items() for method in item if method in methods}
    assert {
        (method, path) for method, path in served if path not in UNDESCRIBED and "dashboard" not in path
    } == described


def test_the_document_is_openapi() -> None:
    assert DOCUMENT["openapi"] == "3.1.0"
    for item in DOCUMENT["paths"].values():
        for method, operation in item.items():
            if method != "parameters":
                assert operation["responses"].keys() >= {"200", "default"}
                assert operation["summary"]
