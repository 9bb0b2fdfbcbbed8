"""The published document says what the gateway does: every route, every field."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from serverless_llm import wire
from serverless_llm.gateway import openai, openapi
from serverless_llm.gateway.app import Gateway
from serverless_llm.gateway.text import TextPool
from serverless_llm.node.admin import DeployBody, PinBody

DOCUMENT: dict[str, Any] = json.loads(openapi.document())
UNDESCRIBED = {"/", "/agents/connect"}  # the dashboard's page; agents' own


def properties(path: str, method: str = "post") -> set[str]:
    body = DOCUMENT["paths"][path][method]["requestBody"]
    return set(body["content"]["application/json"]["schema"]["properties"])


@pytest.mark.parametrize("prefix", ["/v1", "/models/{name}/v1"])
def test_every_field_of_a_request_is_described(prefix: str) -> None:
    neutral = set(openai._NEUTRAL) | openai._WITHOUT_EFFECT
    assert properties(f"{prefix}/chat/completions") == set(openai._CHAT) | neutral
    assert properties(f"{prefix}/completions") == set(openai._COMPLETION) | neutral


def test_every_field_of_a_deploy_is_described() -> None:
    assert properties("/admin/models/{name}", "put") == set(DeployBody.__struct_fields__)
    assert properties("/admin/models/{name}/pin") == set(PinBody.__struct_fields__)


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
