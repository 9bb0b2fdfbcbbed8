"""One row per error code, over HTTP through the official client: what brings it about, and what the client sees."""

from __future__ import annotations

import ast
import asyncio
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest

from serverless_llm import wire
from serverless_llm.gateway.keys import Key, digest
from serverless_llm.gateway.options import GatewayOptions
from tests.integration.scripted import Behaviour, Controller, Served, attaches, model, run, says, silent

pytestmark = pytest.mark.slow

KEYS = (Key("one", digest(b"secret")), Key("few", digest(b"scant"), concurrency=0))

PLAIN = GatewayOptions()


def rejects(status: int, code: str, after: float | None) -> Behaviour:
    def on(controller: Controller, message: wire.Message) -> None:
        if isinstance(message, wire.Arrive):
            controller.reject(message.sequence, status, code, after)

    return on


def fails(controller: Controller, message: wire.Message) -> None:
    attaches(controller, message)
    if isinstance(message, wire.Run):
        controller.tokens(message.sequence, [], "not_finite")


@dataclass(frozen=True)
class Row:
    """A request `asked` of a server that is so, and the error's status, `param` and `Retry-After` (None: no retry)."""

    code: str
    status: int
    kind: type[openai.APIStatusError]
    asked: dict[str, Any] = field(default_factory=dict)
    param: str | None = None
    retry: str | None = None
    on: Behaviour = silent
    options: GatewayOptions = PLAIN
    client: dict[str, Any] = field(default_factory=dict)
    state: str = "unloaded"
    base: str = "/v1"


BAD, LATE = openai.BadRequestError, openai.InternalServerError
ROWS = (
    Row("invalid_request_error", 400, BAD, {"temperature": "hot"}, "temperature"),
    Row("unsupported_parameter", 400, BAD, {"response_format": {"type": "json_object"}}, "response_format"),
    Row("context_length_exceeded", 400, BAD, {"max_tokens": 256}, "max_tokens"),
    Row("invalid_api_key", 401, openai.AuthenticationError, options=GatewayOptions(keys=KEYS)),
    Row("permission_denied", 403, openai.PermissionDeniedError,
        client={"default_headers": {"Origin": "http://elsewhere.example"}}),
    Row("model_not_found", 404, openai.NotFoundError, {"model": "nobody"}, "model"),
    Row("not_found", 404, openai.NotFoundError, base="/v2"),
    Row("method_not_allowed", 405, openai.APIStatusError, base="/v1/models"),
    Row("request_too_large", 413, openai.APIStatusError, {"user": "x" * 5000},
        options=GatewayOptions(body_limit=4096)),
    Row("rate_limit_exceeded", 429, openai.RateLimitError, retry="1", options=GatewayOptions(keys=KEYS),
        client={"api_key": "scant"}),
    Row("engine_error", 500, LATE, on=fails),
    Row("model_loading", 503, LATE, retry="8", on=silent, options=GatewayOptions(hold=0.05)),
    Row("overloaded", 503, LATE, retry="8", on=silent, options=GatewayOptions(hold=0.05), state="loaded"),
    Row("overloaded", 503, LATE, retry="60", on=rejects(503, "overloaded", 100.0)),
    Row("model_load_failed", 503, LATE, on=rejects(503, "model_load_failed", None)),
)  # fmt: skip
SOURCE = Path(__file__).resolve().parents[2] / "serverless_llm"
PLACES = {"RequestError": 0, "Fault": 0, "Rejected": 1, "Reject": 1, "reject": 2}  # of the status; the code is next
PASSED_ON = {(f"{one}status", f"{one}code") for one in ("", "error.", "message.", "reply.")}
PASSED_ON |= {("answer.status", "error.code")}
UNSEEN = {
    (400, "invalid_checkpoint"): "of deploys, for which the official client has no call",
    (499, "client_gone"): "nobody reads it",
    (499, "slow_reader"): "nobody reads it",
    ("CLIENT_GONE", "client_gone"): "nobody reads it",
    ("error.status", "invalid_request_error"): "aiohttp's own refusals, of what the official client does not do",
    ("response.status", "invalid_request_error"): "as the one before",
}


def errors(path: Path) -> Iterator[tuple[Any, Any]]:
    """Status and code of each error that the file makes: what they are, or what they are called there."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if name in PLACES:
                status, code = node.args[PLACES[name] :][:2]
                yield _shown(status), _shown(code)


def _shown(part: ast.expr) -> Any:
    return part.value if isinstance(part, ast.Constant) else ast.unparse(part)


def test_every_error_has_a_row() -> None:
    """Whoever adds one adds its row, or says why this client does not see it."""
    made = {error for path in SOURCE.rglob("*.py") for error in errors(path)}
    assert made - PASSED_ON == {(row.status, row.code) for row in ROWS} | UNSEEN.keys()


def test_every_row_is_in_the_documentation() -> None:
    page = (SOURCE.parent / "docs" / "completions.md").read_text()
    told = re.findall(r"^\| (\d{3}) \| `(\w+)` \|", page, re.MULTILINE)
    assert {(int(status), code) for status, code in told} == {(row.status, row.code) for row in ROWS}


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.code)
def test_an_error_is_what_the_client_knows_it_as(tmp_path: Path, row: Row, kind: str) -> None:
    async def scenario(server: Served) -> None:
        server.gateway.receive(wire.Catalog([model("demo", tmp_path / "demo", state=row.state)], True))
        asked: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], **row.asked}
        options: dict[str, Any] = {"base_url": f"{server.url}{row.base}", "api_key": "none", "max_retries": 0}
        options |= row.client
        error = await (_sync(options, asked) if kind == "sync" else _async(options, asked))
        assert isinstance(error, row.kind)
        assert (error.status_code, error.code, error.param) == (row.status, row.code, row.param)
        kind_of = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        assert error.type == kind_of.get(row.status, "invalid_request_error")
        headers = error.response.headers
        assert (headers.get("Retry-After"), headers.get("x-should-retry")) == (
            (None, "false") if row.retry is None else (row.retry, None)
        )
        assert error.request_id

    run(tmp_path, row.on, scenario, row.options)


async def _async(options: dict[str, Any], asked: dict[str, Any]) -> openai.APIStatusError:
    async with openai.AsyncOpenAI(**options) as ai:
        with pytest.raises(openai.APIStatusError) as caught:
            await ai.chat.completions.create(**asked)
    return caught.value


async def _sync(options: dict[str, Any], asked: dict[str, Any]) -> openai.APIStatusError:
    def ask() -> openai.APIStatusError:
        with openai.OpenAI(**options) as ai, pytest.raises(openai.APIStatusError) as caught:
            ai.chat.completions.create(**asked)
        return caught.value

    return await asyncio.to_thread(ask)


def test_a_client_with_retries_gets_its_answer(tmp_path: Path) -> None:
    """Refused once with a `Retry-After`, it asks again by itself."""
    refused: list[int] = []

    def on(controller: Controller, message: wire.Message) -> None:
        if isinstance(message, wire.Arrive) and not refused:
            refused.append(message.sequence)
            controller.reject(message.sequence, 503, "overloaded", 0.01)
        elif not (isinstance(message, wire.Prompted) and message.sequence in refused):
            answer(controller, message)

    answer: Callable[[Controller, wire.Message], None] = says("late")

    async def scenario(server: Served) -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=2) as ai:
            said = await ai.chat.completions.create(model="demo", messages=[{"role": "user", "content": "Hi"}])
        assert said.choices[0].message.content == "late"
        assert len(server.controller.all(wire.Arrive)) == 2

    run(tmp_path, on, scenario)
