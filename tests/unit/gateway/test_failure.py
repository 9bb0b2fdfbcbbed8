"""Error bodies and when to retry."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from serverless_llm import wire
from serverless_llm.errors import RequestError
from serverless_llm.gateway import failure


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "invalid_request_error"), (404, "invalid_request_error"), (429, "rate_limit_error"), (503, "server_error")],
)
def test_a_body_has_all_four_fields(status: int, kind: str) -> None:
    shown = RequestError(status, "code", "message", "param").body()
    assert shown == {"error": {"message": "message", "type": kind, "param": "param", "code": "code"}}


@pytest.mark.parametrize(("seconds", "header"), [(0.0, "1"), (0.2, "1"), (7.2, "8"), (60.0, "60"), (900.0, "60")])
def test_retry_after_is_whole_seconds_up_to_a_minute(seconds: float, header: str) -> None:
    assert failure.headers(RequestError(503, "x", "x", retry_after=seconds)) == {"Retry-After": header}


def test_a_useless_retry_is_said_to_be() -> None:
    assert failure.headers(RequestError(500, "x", "x")) == {"x-should-retry": "false"}


@pytest.mark.parametrize(
    ("retry_after", "retry", "shown"), [(3.0, True, 3.0), (None, True, 1.0), (3.0, False, None), (None, False, None)]
)
def test_what_the_controller_refuses(retry_after: float | None, retry: bool, shown: float | None) -> None:
    error = failure.from_rejection(wire.Rejected(1, 503, "overloaded", "m", retry_after, retry))
    assert (error.status, error.code, error.message, error.retry_after) == (503, "overloaded", "m", shown)


def test_clients_that_retry_by_status_are_never_misled() -> None:
    """409 and 408 make official clients ask again at once, whatever else is said."""
    sources = Path(failure.__file__).parents[1].rglob("*.py")
    told = r"\b40[89]\b|HTTPConflict|HTTPRequestTimeout"
    refused = [path.name for path in sources if re.search(told, path.read_text())]
    assert refused == []


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/v1/embeddings", "embeddings are not supported"),
        ("/v1/files/file-1/content", "files are not supported"),
        ("/v1/batches", "batches are not supported"),
        ("/v1/responses", "the responses API is not supported"),
        ("/v1/messages", "the messages API is not supported"),
        ("/models/a/b/v1/embeddings", "embeddings are not supported"),
        ("/v1/audio/speech", "audio is not supported"),
        ("/models/x", "there is no GET /models/x"),
        (
            "/chat/completions",
            "there is no GET /chat/completions; did you mean /v1/chat/completions? A base URL ends in /v1",
        ),
        ("/models", "did you mean /v1/models? A base URL ends in /v1"),
        ("/v1/chat/completion", "; did you mean '/v1/chat/completions'?"),
        ("/v1/teapots", "there is no GET /v1/teapots"),
    ],
)
def test_what_is_not_supported_is_named(path: str, said: str) -> None:
    error = failure.no_route("GET", path)
    assert (error.status, error.code) == (404, "not_found")
    assert error.message.endswith(said)


def test_an_unknown_model_is_named_in_short() -> None:
    assert failure.unknown_model("x" * 1_000_000, ["demo"]).message == f"the model '{'x' * 99}…' does not exist"
