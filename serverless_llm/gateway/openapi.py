"""The OpenAPI 3.1 document of every route (`GET /openapi.json`), kept by hand; tests hold it to the field tables."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec

from serverless_llm.domain import MAX_COUNT, MAX_SOURCE
from serverless_llm.gateway import fields
from serverless_llm.quantities import ENDLESS

JSON = dict[str, Any]

NAME: JSON = {"type": "string", "pattern": r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$"}
_TOKENS: JSON = {"type": "integer", "minimum": 1, "maximum": 1 << 30}
_IDS: JSON = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": (1 << 31) - 1}}
_KEEP_ALIVE: JSON = {
    "type": ["number", "string"],
    "exclusiveMaximum": 10**12,
    "anyOf": [{"minimum": 0}, {"const": -1}],  # of a number
    "pattern": rf"^\s*({ENDLESS.pattern}|[0-9]+(\.[0-9]+)?|([0-9]+(\.[0-9]+)?\s*(ms|[smhd])\s*)+)\s*$",
    "description": 'Seconds, or "5m"; -1: for ever.',
}


def _number(least: float, most: float, above: bool = False) -> JSON:
    return {"type": "number", ("exclusiveMinimum" if above else "minimum"): least, "maximum": most}


def _whole(least: int, most: int) -> JSON:
    return {"type": "integer", "minimum": least, "maximum": most}


def _only(*values: Any) -> JSON:
    return {"enum": list(values), "description": "Not supported; accepted where it asks for nothing."}


_UNNAMED: JSON = {"type": "null"}  # what else an object holds: null is as good as nothing
_ANYTHING: JSON = {"description": "Without effect, whatever it is."}
_TEXT_PART: JSON = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": _UNNAMED,
}
_MESSAGE: JSON = {
    "type": "object",
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant"]},
        "content": {"type": ["string", "array"], "items": _TEXT_PART, "maxItems": fields.MAX_MESSAGES},
        "name": {"type": ["string", "null"]},
        **{name: _only([], None) for name in fields.EMPTY},
    },
    "required": ["role", "content"],
    "additionalProperties": _UNNAMED,
}
_UNUSED: JSON = {
    "user": _ANYTHING,
    "metadata": _ANYTHING,
    "store": _ANYTHING,
    "service_tier": _ANYTHING,
    "parallel_tool_calls": _ANYTHING,
    "prompt_cache_key": _ANYTHING,
    "safety_identifier": _ANYTHING,
    "tools": _only([]),
    "tool_choice": _only("none", "auto"),
    "functions": _only([]),
    "function_call": _only("none", "auto"),
    "response_format": _only({"type": "text"}),
    "modalities": _only(["text"]),
}
_COMMON: JSON = {
    "model": NAME | {"description": "May be left out on the endpoint of one model."},
    "max_tokens": _TOKENS,
    "n": _whole(1, 128),
    "min_tokens": _whole(0, 1 << 30),
    "temperature": _number(0, 2),
    "top_p": _number(0, 1, above=True),
    "top_k": _whole(-1, 1 << 30),
    "min_p": _number(0, 1),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "repetition_penalty": _number(0, 100, above=True),
    "logit_bias": {
        "type": "object",
        "propertyNames": {"pattern": r"^[0-9]{1,10}$"},
        "additionalProperties": _number(-100, 100),
        "maxProperties": 1024,
    },
    "seed": {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
    "stop": {
        "type": ["string", "array"],
        "minLength": 1,
        "maxLength": 1024,
        "items": {"type": "string", "minLength": 1, "maxLength": 1024},
        "maxItems": 16,
    },
    "stop_token_ids": _IDS | {"maxItems": 1024},
    "ignore_eos": {"type": "boolean"},
    "stream": {"type": "boolean"},
    "stream_options": {
        "type": "object",
        "properties": {"include_usage": {"type": ["boolean", "null"]}, "include_obfuscation": _only(False, None)},
        "additionalProperties": False,
        "description": "Needs stream: true.",
    },
    "keep_alive": _KEEP_ALIVE,
} | _UNUSED
_CHAT: JSON = _COMMON | {
    "messages": {"type": "array", "minItems": 1, "maxItems": fields.MAX_MESSAGES, "items": _MESSAGE},
    "max_completion_tokens": _TOKENS,
    "chat_template_kwargs": {"type": "object", "propertyNames": {"not": {"enum": list(fields.RESERVED)}}},
    "logprobs": {"type": "boolean"},
    "top_logprobs": _whole(0, 20) | {"description": "Needs logprobs: true."},
    "best_of": _only(1),
    "echo": _only(False),
    "suffix": _only(""),
}
_PROMPT_IDS: JSON = _IDS | {"minItems": 1, "maxItems": fields.MAX_PROMPT}
_COMPLETION: JSON = _COMMON | {
    "prompt": {
        "anyOf": [
            {"type": "string"},
            _PROMPT_IDS,
            {"type": "array", "items": {"anyOf": [{"type": "string"}, _PROMPT_IDS]}, "minItems": 1, "maxItems": 128},
        ],
        "description": "A text, token ids, or a list of either.",
    },
    "logprobs": _whole(0, 5),
    "echo": {"type": "boolean", "description": "Not together with logprobs."},
    "best_of": _whole(1, 128) | {"description": "Only where it equals n."},
    "suffix": _only(""),
    "top_logprobs": _only(0),
}
_SPEC: JSON = {
    "source": {"type": "string", "maxLength": MAX_SOURCE, "description": "A directory on the server, absolute."},
    "dtype": {"enum": ["auto", "float32", "bfloat16"]},
    "keep_alive": _KEEP_ALIVE | {"type": ["number", "string", "null"]},
    "min_replicas": _whole(0, MAX_COUNT),
    "max_replicas": _whole(1, MAX_COUNT),
    "max_concurrency": _whole(1, MAX_COUNT),
    "max_queue": _whole(0, MAX_COUNT),
    "context": _whole(1, MAX_COUNT) | {"type": ["integer", "null"]},
    "pinned": {"type": "boolean"},
    "verify": {"enum": ["off", "sample", "full"]},
}


def _nullable(properties: JSON) -> JSON:
    """As clients send them: null is as good as nothing."""
    return {name: {"anyOf": [schema, {"type": "null"}]} for name, schema in properties.items()}


def _body(properties: JSON, *required: str, null: bool = False) -> JSON:
    shown = _nullable(properties) | {name: properties[name] for name in required} if null else properties
    unnamed = _UNNAMED if null else False
    schema = {"type": "object", "properties": shown, "required": list(required), "additionalProperties": unnamed}
    return {"content": {"application/json": {"schema": schema}}, "required": bool(required)}


def _object(**properties: Any) -> JSON:
    return {"type": "object", "properties": properties, "required": list(properties)}


_STATUS = _object(
    value={"enum": ["unloaded", "loading", "loaded", "failed"]},
    tier={"enum": ["remote", "disk", "dram", "device"]},
    progress={"type": "number"},
    error={"type": ["string", "null"]},
)
_MODEL = _object(
    id=NAME, object={"const": "model"}, created={"type": "integer"}, owned_by={"type": "string"},
    max_model_len={"type": "integer"}, status=_STATUS,
)  # fmt: skip
_ROW = _object(
    name=NAME,
    source=_SPEC["source"],
    url={"type": "string", "description": "That the directory was brought from; empty where there is none."},
)
_USAGE = _object(
    prompt_tokens={"type": "integer"}, completion_tokens={"type": "integer"}, total_tokens={"type": "integer"}
)
_ANSWER = _object(
    id={"type": "string"}, object={"type": "string"}, created={"type": "integer"}, model=NAME,
    choices={"type": "array", "items": {"type": "object"}}, usage=_USAGE, metrics={"type": "object"},
)  # fmt: skip
_ERROR = _object(
    error=_object(
        message={"type": "string"}, type={"type": "string"}, param={"type": ["string", "null"]}, code={"type": "string"}
    )
)
_FAILS: JSON = {
    "default": {
        "description": "An error; Retry-After where a retry is useful, else x-should-retry: false.",
        "content": {"application/json": {"schema": _ERROR}},
    }
}


def _route(summary: str, scope: str, schema: JSON | None, *, body: JSON | None = None, **more: Any) -> JSON:
    """One operation. `schema`: of its JSON answer. `scope`: of the key; "": none is needed."""
    content = {"application/json": {"schema": schema}} if schema else {}
    operation: JSON = {
        "summary": summary,
        "tags": [scope or "open"],
        "security": [{"key": []}, {}] if scope else [],
        "responses": {"200": {"description": "Done.", "content": content | more.pop("content", {})}} | _FAILS,
    }
    return operation | ({"requestBody": body} if body else {}) | more


def _named(name: str) -> JSON:
    """A model's name in the path."""
    return {"name": name, "in": "path", "required": True, "schema": NAME, "description": "A slash may be %2F."}


_EVENTS: JSON = {  # each event as an object, as OpenAPI's tools read them
    "text/event-stream": {
        "schema": {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    }
}


def _inference(prefix: str, parameters: list[JSON]) -> JSON:
    """The OpenAI API, of all models or at the endpoint of one."""
    model = () if parameters else ("model",)
    listed = _object(object={"const": "list"}, data={"type": "array", "items": _MODEL})
    chat = _body(_CHAT, *model, "messages", null=True)
    text = _body(_COMPLETION, *model, "prompt", null=True)
    routes: JSON = {
        f"{prefix}/chat/completions": {
            "post": _route("Answer a conversation.", "inference", _ANSWER, body=chat, content=_EVENTS)
        },
        f"{prefix}/completions": {"post": _route("Continue a text.", "inference", _ANSWER, body=text, content=_EVENTS)},
        f"{prefix}/models": {"get": _route("Deployed models, loaded or not.", "inference", listed)},
        f"{prefix}/models/{{id}}": {"get": _route("One model.", "inference", _MODEL, parameters=[_named("id")])},
    }
    return {path: item | ({"parameters": parameters} if parameters else {}) for path, item in routes.items()}


def _operations() -> JSON:
    """Everything that operators ask."""
    name = [_named("name")]
    answer: JSON = {"type": "object"}
    recent = {"name": "recent", "in": "query", "schema": _whole(0, 256), "description": "Of the past, told first."}
    pin = _body({"pinned": {"type": "boolean"}})
    drain = _body({"drained": {"type": "boolean"}})
    node = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
    model = "/admin/models/{name}"
    return {
        model: {
            "parameters": name,
            "put": _route("Deploy, or replace what is there.", "admin", _ROW, body=_body(_SPEC, "source")),
            "get": _route("One model.", "admin", _ROW),
            "delete": _route("Take a model away.", "admin", answer),
        },
        f"{model}/load": {"parameters": name, "post": _route("Start a replica now.", "admin", _ROW)},
        f"{model}/unload": {"parameters": name, "post": _route("Free its devices.", "admin", _ROW)},
        f"{model}/pin": {"parameters": name, "post": _route("Never evict it, or do again.", "admin", _ROW, body=pin)},
        "/admin/status": {"get": _route("Models, nodes, devices, starts, traffic.", "admin", answer)},
        "/admin/nodes": {"get": _route("Nodes with their devices, replicas and sequences.", "admin", answer)},
        "/admin/nodes/{name}/drain": {
            "parameters": node,
            "post": _route("Take everything off a node, or use it again.", "admin", answer, body=drain),
        },
        "/admin/events": {
            "get": _route("The control plane's events.", "admin", None, content=_EVENTS, parameters=[recent])
        },
    }


def _open() -> JSON:
    ready = _object(ready={"type": "boolean"}, problems={"type": "array", "items": {"type": "string"}})
    page: JSON = {"text/plain": {"schema": {"type": "string"}}}
    not_ready = {"503": {"description": "Not now.", "content": {"application/json": {"schema": ready}}}}
    readiness = _route("Accepting requests.", "", ready)
    readiness["responses"] = not_ready | readiness["responses"]
    return {
        "/health": {"get": _route("Alive.", "", _object(status={"const": "ok"}))},
        "/ready": {"get": readiness},
        "/metrics": {"get": _route("Prometheus.", "inference", None, content=page)},
        "/openapi.json": {"get": _route("This document.", "", {"type": "object"})},
    }


def _version() -> str:
    try:
        return version("serverless-llm")
    except PackageNotFoundError:  # run from a clone
        return "0"


@cache
def document() -> bytes:
    """The document as JSON."""
    paths = _inference("/v1", []) | _inference("/models/{name}/v1", [_named("name")]) | _operations() | _open()
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {
                "title": "serverless-llm",
                "version": _version(),
                "description": "Many language models on few devices: the OpenAI API, and what operators need.",
            },
            "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
            "paths": paths,
        }
    )
