"""Errors as the HTTP surface shows them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec

from serverless_llm import wire
from serverless_llm.errors import TRIED_AGAIN, RequestError, did_you_mean, shortened

MAX_RETRY_AFTER = 60  # official clients ignore larger ones

_FEATURES = {
    "assistants": "assistants",
    "audio": "audio",
    "batches": "batches",
    "containers": "containers",
    "conversations": "conversations",
    "detokenize": "detokenising",
    "edits": "edits",
    "embeddings": "embeddings",
    "evals": "evals",
    "files": "files",
    "fine_tuning": "fine-tuning",
    "images": "images",
    "messages": "the messages API",
    "moderations": "moderations",
    "pooling": "pooling",
    "realtime": "the realtime API",
    "rerank": "reranking",
    "responses": "the responses API",
    "score": "scoring",
    "threads": "threads",
    "tokenize": "tokenising",
    "uploads": "uploads",
    "vector_stores": "vector stores",
    "videos": "videos",
}  # what other servers have under /v1/

_ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/models")
_BARE = ("/chat/completions", "/completions", "/models")  # what clients ask for whose base URL lacks its end


def no_route(method: str, path: str) -> RequestError:
    """404: nothing is there; names the feature that other servers have there."""
    message = f"there is no {method} {path}"
    if path in _BARE:
        return RequestError(404, "not_found", f"{message}; did you mean /v1{path}? A base URL ends in /v1")
    _, found, rest = path.rpartition("/v1/")
    feature = _FEATURES.get(rest.partition("/")[0]) if found else None
    if feature:
        message += f": {feature} {'are' if feature.endswith('s') else 'is'} not supported"
    elif found:
        message += did_you_mean(path, _ROUTES)
    return RequestError(404, "not_found", message)


def no_method(method: str, path: str, allowed: Iterable[str]) -> RequestError:
    """405: something is there, for another method."""
    return RequestError(405, "method_not_allowed", f"{path} takes {', '.join(sorted(allowed))}, not {method}")


def invalid(message: str, param: str | None = None) -> RequestError:
    """400: the request cannot be understood or done."""
    return RequestError(400, "invalid_request_error", message, param)


def unsupported(param: str, message: str) -> RequestError:
    """400: this server does not do that."""
    return RequestError(400, "unsupported_parameter", message, param)


def unknown_model(name: str, known: Iterable[str]) -> RequestError:
    message = f"the model {shortened(name)!r} does not exist{did_you_mean(name, known)}"
    return RequestError(404, "model_not_found", message, "model")


def not_restored(info: wire.ModelInfo) -> RequestError:
    """503: it is deployed, and the controller does not know it since its files could not be read at a start."""
    message = f"the model {info.name!r} cannot be served: {info.error}; {TRIED_AGAIN}"
    return RequestError(503, "model_load_failed", message)


def from_rejection(message: wire.Rejected) -> RequestError:
    """What the controller refused; a retry that is useful has a `Retry-After`."""
    after = (message.retry_after or 1.0) if message.retry else None
    return RequestError(message.status, message.code, message.message, retry_after=after)


def encoded(error: RequestError) -> bytes:
    return msgspec.json.encode(error.body())


def headers(error: RequestError) -> dict[str, str]:
    """When to retry, or that a retry is useless; with 401, what is asked for."""
    if error.status == 401:
        return {"x-should-retry": "false", "WWW-Authenticate": "Bearer"}
    if error.retry_after is None:
        return {"x-should-retry": "false"}
    return {"Retry-After": str(retry_after(error.retry_after))}


def retry_after(seconds: float) -> int:
    """Whole seconds from 1 to 60."""
    return min(MAX_RETRY_AFTER, max(1, math.ceil(seconds)))
