"""Checks of single request fields. Each takes (value, name) and returns the value or raises 400 naming the field."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any, TypeAlias, TypeGuard

import msgspec

from serverless_llm.errors import ConfigurationError, RequestError, shortened
from serverless_llm.gateway.failure import invalid
from serverless_llm.quantities import LONGEST, parse_duration

Check = Callable[[Any, str], Any]
Prompt: TypeAlias = "str | array[int]"  # a text, or token ids (int32); Python 3.11 has no `array[int]` at run time

MAX_STOPS = 16  # arbitrary; the official API takes 4
MAX_STOP = 1024  # characters of one stop string; bounds what a stream holds back
MAX_PROMPT = 1 << 21  # token ids; over any context
MAX_PROMPTS = 128  # of one request
MAX_MESSAGES = 1 << 13  # of one conversation, and text parts of one of them; arbitrary
MAX_PARTS = 1 << 16  # text parts of one conversation; arbitrary
MAX_STOP_IDS = MAX_BIASES = 1024  # arbitrary; every frame that starts or moves the sequence carries them


def boolean(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise invalid(f"{name} must be true or false", name)
    return value


def whole(least: int, most: int) -> Check:
    """An integer within bounds."""

    def check(value: Any, name: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise invalid(f"{name} must be an integer from {least} to {most}", name)
        return value

    return check


def number(least: float, most: float, above: bool = False) -> Check:
    """A finite number from `least` (or above it) to `most`."""

    def check(value: Any, name: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise invalid(f"{name} must be a number", name)
        if not least <= value <= most or (above and value == least):
            start = "above" if above else "from"
            raise invalid(f"{name} must be {start} {least:g} to {most:g}", name)
        return float(value)

    return check


MOST_TOKENS = 1 << 30  # over any context
SAMPLING: dict[str, Check] = {
    "temperature": number(0.0, 2.0),
    "top_p": number(0.0, 1.0, above=True),
    "top_k": whole(-1, MOST_TOKENS),
    "min_p": number(0.0, 1.0),
    "presence_penalty": number(-2.0, 2.0),
    "frequency_penalty": number(-2.0, 2.0),
    "repetition_penalty": number(0.0, 100.0, above=True),  # the bound is arbitrary
}
NEUTRAL: dict[str, float] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
}


def stop_strings(value: Any, name: str) -> tuple[str, ...]:
    """One string or a list of them."""
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list):
        raise invalid(f"{name} must be a string or a list of strings, none of them empty", name)
    for stop in _few(listed, MAX_STOPS, name):
        if not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP:
            raise invalid(f"{name} must be strings of 1 to {MAX_STOP} characters", name)
    return tuple(listed)


def token_ids(value: Any, name: str) -> tuple[int, ...]:
    """A list of token ids; whether the vocabulary has them is seen later."""
    if not isinstance(value, list) or not all(is_token(token) for token in _few(value, MAX_STOP_IDS, name)):
        raise invalid(f"{name} must be a list of token ids", name)
    return tuple(value)


def _no_key(name: str, key: str) -> RequestError:
    place = f"{name}.{shortened(key)}"
    return invalid(f"{place} is not supported", place)


def _few(value: list[Any], most: int, name: str) -> list[Any]:
    """A list that is looked at entry by entry, while all streams wait."""
    if len(value) > most:
        raise invalid(f"{name} has {len(value)} entries, of at most {most}", name)
    return value


def logit_bias(value: Any, name: str) -> tuple[tuple[int, float], ...]:
    """Token id, as text, -> what is added to its logit; whether the vocabulary has it is seen later."""
    if not isinstance(value, dict):
        raise invalid(f"{name} must be an object", name)
    if len(value) > MAX_BIASES:
        raise invalid(f"{name} takes at most {MAX_BIASES} tokens", name)
    addend = number(-100.0, 100.0)
    biases = {}
    for key, entry in value.items():
        token = int(key) if key.isascii() and key.isdecimal() and len(key) <= 10 else -1
        if not is_token(token):
            raise invalid(f"{name}: {key[:20]!r} is no token id", name)
        biases[token] = addend(entry, name)
    return tuple(sorted(biases.items()))


def is_token(value: Any) -> TypeGuard[int]:
    """Whether it could be a token id of some vocabulary."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def keep_alive(value: Any, name: str) -> float:
    """Seconds: a number, or a duration such as "5m" or "1h30m"; -1 means for ever."""
    if isinstance(value, str) or (isinstance(value, int | float) and value < 0):
        try:
            return parse_duration(value)
        except ConfigurationError as error:
            raise invalid(f"{name}: {error}", name) from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < LONGEST:
        raise invalid(f'{name} must be seconds, a duration such as "5m", or -1 for ever', name)
    return float(value)


def stream_options(value: Any, name: str) -> bool:
    """Whether a last chunk carries the usage."""
    if not isinstance(value, dict):
        raise invalid(f"{name} must be an object", name)
    for key, entry in value.items():
        if key not in ("include_usage", "include_obfuscation") or (key == "include_obfuscation" and entry):
            raise _no_key(name, key)
        if entry is not None:
            boolean(entry, f"{name}.{key}")
    return bool(value.get("include_usage"))


RESERVED = ("messages", "tools", "documents", "chat_template", "add_generation_prompt")


def variables(value: Any, name: str) -> dict[str, Any]:
    """`chat_template_kwargs`: never what the server itself gives the template, nor a template."""
    if not isinstance(value, dict):
        raise invalid(f"{name} must be an object", name)
    for key in RESERVED:
        if key in value:
            raise invalid(f"{name}.{key} cannot be given", f"{name}.{key}")
    try:
        msgspec.msgpack.encode(value)  # as it will go to a text process
    except OverflowError:
        raise invalid(f"{name} holds an integer of more than 64 bits", name) from None
    except RecursionError:
        raise invalid(f"{name} is nested too deeply", name) from None
    return value


def prompts(value: Any, name: str) -> list[Prompt]:
    """A text, token ids, or a list of such."""
    listed = value if isinstance(value, list) and not _are_tokens(value, name) else [value]
    if not listed:
        raise invalid(f"{name} must not be empty", name)
    return [_prompt(one, name) for one in _few(listed, MAX_PROMPTS, name)]


def _are_tokens(value: list[Any], name: str) -> bool:
    """Whether all could be token ids, and are some; without a step of the interpreter for each of so many."""
    return set(map(type, _few(value, MAX_PROMPT, name))) == {int} and min(value) >= 0 and max(value) < 2**31


def _prompt(value: Any, name: str) -> Prompt:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and _are_tokens(value, name):
        return array("i", value)
    raise invalid(f"{name} must be a string, a list of token ids, or a list of such, none of them empty", name)


_ROLES = ("system", "developer", "user", "assistant")
EMPTY = ("refusal", "annotations", "audio", "function_call", "tool_calls", "reasoning_content")  # [] is nothing


def messages(value: Any, name: str) -> list[dict[str, Any]]:
    """The conversation, as a template reads it: role, content, and the name where one is given."""
    if not isinstance(value, list) or not value:
        raise invalid(f"{name} must be a list with at least one message", name)
    parts = sum(map(_parts, _few(value, MAX_MESSAGES, name)))
    if parts > MAX_PARTS:
        raise invalid(f"{name} have {parts} text parts, of at most {MAX_PARTS}", name)
    return [_message(entry, f"{name}[{index}]") for index, entry in enumerate(value)]


def _parts(message: Any) -> int:
    content = message.get("content") if isinstance(message, dict) else None
    return len(content) if isinstance(content, list) else 0


def _message(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise invalid(f"{name} must be an object", name)
    role = value.get("role")
    if role not in _ROLES:
        raise invalid(f"{name}.role must be one of {', '.join(_ROLES)}", f"{name}.role")
    message = {"role": role, "content": _content(value.get("content"), f"{name}.content")}
    for key, entry in value.items():
        if key in message or entry is None or (key in EMPTY and entry == []):
            continue
        if key != "name" or not isinstance(entry, str):
            raise _no_key(name, key)
        message[key] = entry
    return message


def _content(value: Any, name: str) -> str | list[dict[str, str]]:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise invalid(f"{name} must be a string or a list of text parts", name)
    return [_part(part, name, index) for index, part in enumerate(_few(value, MAX_MESSAGES, name))]


def _part(value: Any, name: str, index: int) -> dict[str, str]:
    if not isinstance(value, dict) or value.get("type") != "text" or not isinstance(value.get("text"), str):
        raise invalid(f'{name}[{index}] must be {{"type": "text", "text": "..."}}', f"{name}[{index}]")
    for key, entry in value.items():
        if key not in ("type", "text") and entry is not None:
            raise _no_key(f"{name}[{index}]", key)
    return {"type": "text", "text": value["text"]}
