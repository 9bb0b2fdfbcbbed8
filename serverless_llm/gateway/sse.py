"""Answers of the OpenAI API as bytes: stream chunks whose constant parts are encoded once, and whole bodies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from serverless_llm.errors import RequestError
from serverless_llm.gateway import failure

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
HEADERS = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Identity:
    """What every chunk and body of one answer repeats."""

    chat: bool
    request_id: str
    created: int  # unix time
    model: str

    def fields(self, chunk: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        name = f"{'chatcmpl' if self.chat else 'cmpl'}-{self.request_id}"
        return {"id": name, "object": kind, "created": self.created, "model": self.model}


class Chunks:
    """Encodes one choice of a stream. Its first data event, whichever it is, carries the role, once."""

    def __init__(self, identity: Identity, include_usage: bool, index: int = 0) -> None:
        self._chat = identity.chat
        self._index = index
        self._base = identity.fields(chunk=True) | ({"usage": None} if include_usage else {})
        opening = b"data: " + _encode(self._base)[:-1] + b',"choices":[{"index":%d,' % index
        close = b"}" if identity.chat else b""
        self._head = opening + (b'"delta":{"content":' if identity.chat else b'"text":')
        self._scored = close + b',"logprobs":'
        self._open = b',"finish_reason":null}]}\n\n'
        self._tail = self._scored + b"null" + self._open
        self._empty = self._head.removesuffix(b'"content":') + (b"" if identity.chat else b'""') + self._tail
        self._first = self._head.removesuffix(b'"content":') + b'"role":"assistant","content":'
        self._begun = not identity.chat

    def delta(self, text: str, logprobs: dict[str, Any] | None = None) -> bytes:
        tail = self._tail if logprobs is None else self._scored + _encode(logprobs) + self._open
        if self._begun:
            return self._head + _encode(text) + tail
        self._begun = True
        return self._first + _encode(text) + tail

    def heartbeat(self) -> bytes:
        """An ordinary chunk without text."""
        return self._empty if self._begun else self.delta("")

    def last(self, finish: str, metrics: dict[str, Any]) -> bytes:
        """The end of a complete choice: finish reason and metrics."""
        opening = b"" if self._begun else self.delta("")
        content: dict[str, Any] = {"delta": {}} if self._chat else {"text": ""}
        choice = {"index": self._index, **content, "logprobs": None, "finish_reason": finish}
        return opening + _event(self._base | {"choices": [choice], "metrics": metrics})


def _event(fields: dict[str, Any]) -> bytes:
    return b"data: " + _encode(fields) + b"\n\n"


def closing(identity: Identity, usage: dict[str, Any] | None) -> bytes:
    """The end of a complete stream: usage where it was asked for, `[DONE]`."""
    return (_event(identity.fields(chunk=True) | {"choices": [], "usage": usage}) if usage else b"") + DONE


def failed(error: RequestError) -> bytes:
    """The end of a stream that fails after its headers left."""
    return b"data: " + failure.encoded(error) + b"\n\n" + DONE


def choice(chat: bool, index: int, text: str, finish: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    """One choice of an answer that does not stream."""
    content: dict[str, Any] = (
        {"message": {"role": "assistant", "content": text, "refusal": None}} if chat else {"text": text}
    )
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}


def whole(identity: Identity, choices: list[dict[str, Any]], usage: dict[str, Any], metrics: dict[str, Any]) -> bytes:
    """The body of an answer that does not stream."""
    return _encode(identity.fields(chunk=False) | {"choices": choices, "usage": usage, "metrics": metrics})
