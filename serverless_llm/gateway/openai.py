"""Request bodies of the OpenAI API: parsed once, checked whole, frozen.

Every field is honoured, accepted without effect, or a 400 that names it; nothing is dropped silently.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

import msgspec

from serverless_llm.gateway import fields
from serverless_llm.gateway.failure import invalid, unsupported

DEFAULT_COMPLETION_TOKENS = 16  # of /v1/completions, as everywhere


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """One request for text.

    Attributes:
        chat: whether it came to /v1/chat/completions; then `messages` is set, else `prompt`.
        max_tokens: None: the rest of the context.
        sampling: those of `fields.SAMPLING` that were given; the others are the checkpoint's.
        seed: the caller's, or drawn at arrival, so that a resumed sequence goes on with the same one.
        keep_alive: seconds, None: the model's own.
    """

    chat: bool
    model: str | None
    messages: list[dict[str, Any]] | None
    prompt: str | tuple[int, ...] | None
    max_tokens: int | None
    sampling: dict[str, float]
    logit_bias: tuple[tuple[int, float], ...]
    min_tokens: int
    seed: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    stream: bool
    include_usage: bool
    keep_alive: float | None
    variables: dict[str, Any]


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise invalid(f"{name} must be a string", name)
    return value


_COMMON: dict[str, fields.Check] = fields.SAMPLING | {
    "model": _text,
    "max_tokens": fields.whole(1, fields.MOST_TOKENS),
    "min_tokens": fields.whole(0, fields.MOST_TOKENS),
    "logit_bias": fields.logit_bias,
    "seed": fields.whole(-(2**63), 2**63 - 1),
    "stop": fields.stop_strings,
    "stop_token_ids": fields.token_ids,
    "ignore_eos": fields.boolean,
    "stream": fields.boolean,
    "stream_options": fields.stream_options,
    "keep_alive": fields.keep_alive,
}
_CHAT = _COMMON | {
    "messages": fields.messages,
    "max_completion_tokens": fields.whole(1, fields.MOST_TOKENS),
    "chat_template_kwargs": fields.variables,
}
_COMPLETION = _COMMON | {"prompt": fields.prompt}

_WITHOUT_EFFECT = frozenset(
    ("user", "metadata", "store", "service_tier", "parallel_tool_calls", "prompt_cache_key", "safety_identifier")
)
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}


def _is_neutral(name: str, value: Any) -> bool:
    """Whether this value of a field that is not supported asks for nothing; `1` is not `true` here."""
    return any(
        value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in _NEUTRAL.get(name, ())
    )


def decode(raw: bytes) -> dict[str, Any]:
    """A body's JSON object.

    Raises:
        RequestError: not JSON, or not an object.
    """
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise invalid(f"the body is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise invalid("the body must be a JSON object")
    return body


def parse(body: dict[str, Any], chat: bool) -> CompletionRequest:
    """The request of one body.

    Raises:
        RequestError: 400 naming the field.
    """
    checks = _CHAT if chat else _COMPLETION
    given: dict[str, Any] = {}
    for name, value in body.items():
        if value is None or name in _WITHOUT_EFFECT:
            continue
        check = checks.get(name)
        if check is not None:
            given[name] = check(value, name)
        elif not _is_neutral(name, value):
            raise unsupported(name)
    return _request(given, chat)


def _request(given: dict[str, Any], chat: bool) -> CompletionRequest:
    required = "messages" if chat else "prompt"
    if required not in given:
        raise invalid(f"{required} is required", required)
    if "stream_options" in given and not given.get("stream"):
        raise invalid("stream_options needs stream: true", "stream_options")
    seed = given.get("seed")
    return CompletionRequest(
        chat=chat,
        model=given.get("model"),
        messages=given.get("messages"),
        prompt=given.get("prompt"),
        max_tokens=_max_tokens(given, chat),
        sampling={name: given[name] for name in fields.SAMPLING if name in given},
        logit_bias=given.get("logit_bias", ()),
        min_tokens=given.get("min_tokens", 0),
        seed=secrets.randbits(63) if seed is None else seed & (2**63 - 1),
        stop=given.get("stop", ()),
        stop_token_ids=given.get("stop_token_ids", ()),
        ignore_eos=given.get("ignore_eos", False),
        stream=given.get("stream", False),
        include_usage=given.get("stream_options", False),
        keep_alive=given.get("keep_alive"),
        variables=given.get("chat_template_kwargs", {}),
    )


def _max_tokens(given: dict[str, Any], chat: bool) -> int | None:
    old, new = given.get("max_tokens"), given.get("max_completion_tokens")
    if old is not None and new is not None and old != new:
        raise invalid("max_tokens and max_completion_tokens differ", "max_completion_tokens")
    wanted = old if new is None else new
    return DEFAULT_COMPLETION_TOKENS if wanted is None and not chat else wanted
