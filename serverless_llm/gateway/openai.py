"""Request bodies of the OpenAI API: parsed once, checked whole, frozen.

Every field is honoured, accepted without effect, or a 400 that names it; nothing is dropped silently.
"""

from __future__ import annotations

import json
import reprlib
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from serverless_llm.errors import did_you_mean, shortened
from serverless_llm.gateway import fields
from serverless_llm.gateway.failure import invalid, unsupported

DEFAULT_COMPLETION_TOKENS = 16  # of /v1/completions, as everywhere
MAX_CHOICES = fields.MAX_PROMPTS  # of one request, all prompts together; the official API's bound of `n`


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """One request for text.

    Attributes:
        chat: whether it came to /v1/chat/completions; then `messages` is set, else `prompts`.
        max_tokens: None: the rest of the context, or of the device's memory.
        n: choices of each prompt.
        sampling: those of `fields.SAMPLING` that were given; the others are the checkpoint's.
        logprobs: None, or how many of the likeliest tokens are told of with each generated one.
        seed: the caller's, or drawn at arrival, so that a resumed sequence goes on with the same one.
        keep_alive: seconds, None: the model's own.
        choices: of all prompts.
    """

    chat: bool
    model: str | None
    messages: list[dict[str, Any]] | None
    prompts: list[fields.Prompt]
    n: int
    max_tokens: int | None
    sampling: dict[str, float]
    logit_bias: tuple[tuple[int, float], ...]
    min_tokens: int
    logprobs: int | None
    echo: bool
    seed: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    stream: bool
    include_usage: bool
    keep_alive: float | None
    variables: dict[str, Any]
    choices: int

    def forget(self) -> None:
        """The prompts are made: what they are made of is not kept for as long as the answer takes."""
        if self.messages is not None:
            self.messages.clear()
        self.prompts.clear()
        self.variables.clear()

    @property
    def subject(self) -> str:
        """The field that the prompt came in."""
        return "messages" if self.chat else "prompt"


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise invalid(f"{name} must be a string", name)
    return value


_COMMON: dict[str, fields.Check] = fields.SAMPLING | {
    "model": _text,
    "max_tokens": fields.whole(1, fields.MOST_TOKENS),
    "n": fields.whole(1, MAX_CHOICES),
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
    "logprobs": fields.boolean,
    "top_logprobs": fields.whole(0, 20),
}
_COMPLETION = _COMMON | {
    "prompt": fields.prompts,
    "logprobs": fields.whole(0, 5),
    "echo": fields.boolean,
    "best_of": fields.whole(1, MAX_CHOICES),
}

_WITHOUT_EFFECT = frozenset(
    ("user", "metadata", "store", "service_tier", "parallel_tool_calls", "prompt_cache_key", "safety_identifier")
)
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
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


class _Json(reprlib.Repr):
    """Values as their sender writes them, cut where they are long."""

    def repr_str(self, x: str, level: int) -> str:
        return json.dumps(x if len(x) <= self.maxstring else f"{x[: self.maxstring]}...", ensure_ascii=False)

    def repr_bool(self, x: bool, level: int) -> str:
        return json.dumps(x)

    def repr_NoneType(self, x: None, level: int) -> str:  # noqa: N802  reprlib calls it by the type's name
        return "null"


_in_json = _Json().repr


def _is_neutral(name: str, value: Any) -> bool:
    """Whether this value of a field that is not supported asks for nothing; `1` is not `true` here."""
    return any(
        value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in _NEUTRAL.get(name, ())
    )


def _not_supported(name: str, value: Any, known: Iterable[str]) -> str:
    if name in _NEUTRAL:
        return f"{name!r} {_in_json(value)} is not supported, only {' or '.join(map(_in_json, _NEUTRAL[name]))}"
    return f"{shortened(name)!r} is not supported{did_you_mean(name, known)}"


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
            raise unsupported(shortened(name), _not_supported(name, value, checks))
    return _request(given, chat)


def _request(given: dict[str, Any], chat: bool) -> CompletionRequest:
    _agree(given, chat)
    seed, n, prompts = given.get("seed"), given.get("n", 1), given.get("prompt", [])
    return CompletionRequest(
        chat=chat,
        model=given.get("model"),
        messages=given.get("messages"),
        prompts=prompts,
        n=n,
        max_tokens=_max_tokens(given, chat),
        sampling={name: given[name] for name in fields.SAMPLING if name in given},
        logit_bias=given.get("logit_bias", ()),
        min_tokens=given.get("min_tokens", 0),
        logprobs=_logprobs(given, chat),
        echo=given.get("echo", False),
        seed=secrets.randbits(63) if seed is None else seed & (2**63 - 1),
        stop=given.get("stop", ()),
        stop_token_ids=given.get("stop_token_ids", ()),
        ignore_eos=given.get("ignore_eos", False),
        stream=given.get("stream", False),
        include_usage=given.get("stream_options", False),
        keep_alive=given.get("keep_alive"),
        variables=given.get("chat_template_kwargs", {}),
        choices=n * (len(prompts) or 1),
    )


def _agree(given: dict[str, Any], chat: bool) -> None:
    """Fields that need, or exclude, one another."""
    required = "messages" if chat else "prompt"
    if required not in given:
        raise invalid(f"{required} is required", required)
    if "stream_options" in given and not given.get("stream"):
        raise invalid("stream_options needs stream: true", "stream_options")
    if given.get("top_logprobs") and not given.get("logprobs"):
        raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
    if given.get("echo") and "logprobs" in given:
        raise unsupported("echo", "logprobs of the prompt are not supported: echo and logprobs exclude one another")
    n = given.get("n", 1)
    if given.get("best_of", n) != n:
        raise unsupported("best_of", "best_of is supported only where it equals n")
    if n * len(given.get("prompt", ())) > MAX_CHOICES:
        raise invalid(f"a request has at most {MAX_CHOICES} choices, those of all prompts together", "prompt")


def _logprobs(given: dict[str, Any], chat: bool) -> int | None:
    asked = given.get("logprobs")
    if not chat or not asked:
        return None if chat else asked
    return int(given.get("top_logprobs", 0))


def _max_tokens(given: dict[str, Any], chat: bool) -> int | None:
    old, new = given.get("max_tokens"), given.get("max_completion_tokens")
    if old is not None and new is not None and old != new:
        raise invalid("max_tokens and max_completion_tokens differ", "max_completion_tokens")
    wanted = old if new is None else new
    return DEFAULT_COMPLETION_TOKENS if wanted is None and not chat else wanted
