"""Requests made up from the published OpenAPI document, valid and not: never a 5xx, always what the document says.

What the document does not allow is refused.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import schemathesis
from hypothesis import given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from serverless_llm import wire
from serverless_llm.cluster.machine import Machine
from serverless_llm.cluster.policy import Policy
from serverless_llm.demo import tasks
from serverless_llm.gateway import openapi
from serverless_llm.node.head import Head
from serverless_llm.node.state import State
from tests.integration.scripted import Controller, Served, says, served

pytestmark = pytest.mark.slow

CHECKS = (
    not_a_server_error,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    negative_data_rejection,
)
ENDLESS = "/admin/events"  # streams until the client goes
EXAMPLES = max(25, settings().max_examples // 50)  # each is an HTTP request, and there are many routes
SCHEMA = schemathesis.openapi.from_dict(json.loads(openapi.document()))
OPERATIONS = [one.ok() for one in SCHEMA.get_all_operations() if isinstance(one, Ok) and one.ok().path != ENDLESS]
CASES = [(one, GenerationMode.POSITIVE) for one in OPERATIONS] + [
    (one, GenerationMode.NEGATIVE) for one in OPERATIONS if len(one.body)
]


class Desk:
    """Answers completions as a script says, and operators as a real head without agents does."""

    def __init__(self, kept: State, server: Served) -> None:
        self._speak = says("hi")
        self._server = server
        self.head = Head(kept, Machine(Policy()), [], self._deliver)

    def on(self, controller: Controller, message: wire.Message) -> None:
        if isinstance(message, wire.Ask):
            self.head.receive(message)
        else:
            self._speak(controller, message)

    def _deliver(self, message: wire.Message) -> None:
        if isinstance(message, wire.Answer):
            self._server.gateway.receive(message)


@contextmanager
def in_a_thread(folder: Path) -> Iterator[str]:
    """The URL of a gateway that serves on a loop of its own."""
    loop = asyncio.new_event_loop()
    stop, ready = asyncio.Event(), threading.Event()
    url: list[str] = []

    async def main() -> None:
        kept = State(folder / "state")
        async with served(folder, says("hi")) as server:
            desk = Desk(kept, server)
            server.controller.on = desk.on
            source = msgspec.json.encode({"source": str(tasks.checkpoint_dir("demo-count"))})
            await desk.head.restore({"demo": source})
            url.append(server.url)
            ready.set()
            await stop.wait()
        kept.close()

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()))
    thread.start()
    assert ready.wait(20)
    try:
        yield url[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(20)
        loop.close()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with in_a_thread(tmp_path_factory.mktemp("openapi")) as url:
        yield url


def come_further(case: Any) -> None:
    """Name a deployed model, not to delete it, and ask for no more than it and the script can."""
    if isinstance(case.body, dict) and "model" in case.body:
        case.body["model"] = "demo"
    for named in ("name", "id") if case.method != "DELETE" else ():
        if named in (case.path_parameters or {}):
            case.path_parameters[named] = "demo"
    if isinstance(case.body, dict):
        for name in ("max_tokens", "max_completion_tokens", "min_tokens", "logit_bias", "stop_token_ids", "logprobs",
                     "top_logprobs"):  # fmt: skip
            case.body.pop(name, None)


@pytest.mark.parametrize(("operation", "mode"), CASES, ids=lambda one: getattr(one, "label", None) or one.value)
def test_no_request_is_a_5xx_and_every_answer_is_as_described(url: str, operation: Any, mode: GenerationMode) -> None:
    @settings(max_examples=EXAMPLES)
    @given(case=operation.as_strategy(generation_mode=mode), known=st.booleans())
    def holds(case: Any, known: bool) -> None:
        if known and mode is GenerationMode.POSITIVE:  # else it might mend what is wrong
            come_further(case)
        case.call_and_validate(base_url=url, checks=list(CHECKS))

    holds()
