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
    """Encodes one stream. Its first data event, whichever it is, carries the role, once."""

    def __init__(self, identity: Identity, include_usage: bool) -> None:
        self._chat = identity.chat
        self._usage = {"usage": None} if include_usage else {}
        self._base = identity.fields(chunk=True)
        opening = _encode(self._base | self._usage)[:-1]
        if identity.chat:
            self._head = b"data: " + opening + b',"choices":[{"index":0,"delta":{"content":'
            self._tail = b'},"logprobs":null,"finish_reason":null}]}\n\n'
            self._empty = b"data: " + opening + b',"choices":[{"index":0,"delta":{' + self._tail
        else:
            self._head = b"data: " + opening + b',"choices":[{"index":0,"text":'
            self._tail = b',"logprobs":null,"finish_reason":null}]}\n\n'
            self._empty = self._head + b'""' + self._tail
        self._first = self._head.removesuffix(b'"content":') + b'"role":"assistant","content":'
        self._begun = not identity.chat

    def delta(self, text: str) -> bytes:
        if self._begun:
            return self._head + _encode(text) + self._tail
        self._begun = True
        return self._first + _encode(text) + self._tail

    def heartbeat(self) -> bytes:
        """An ordinary chunk without text."""
        return self._empty if self._begun else self.delta("")

    def last(self, finish: str, usage: dict[str, Any], metrics: dict[str, Any]) -> bytes:
        """The end of a complete stream: finish reason with metrics, usage where it was asked for, `[DONE]`."""
        opening = b"" if self._begun else self.delta("")
        content: dict[str, Any] = {"delta": {}} if self._chat else {"text": ""}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish}
        ends = [self._event({"choices": [choice], **self._usage, "metrics": metrics})]
        if self._usage:
            ends.append(self._event({"choices": [], "usage": usage}))
        return opening + b"".join(ends) + DONE

    def _event(self, fields: dict[str, Any]) -> bytes:
        return b"data: " + _encode(self._base | fields) + b"\n\n"


def failed(error: RequestError) -> bytes:
    """The end of a stream that fails after its headers left."""
    return b"data: " + failure.encoded(error) + b"\n\n" + DONE


def whole(identity: Identity, text: str, finish: str, usage: dict[str, Any], metrics: dict[str, Any]) -> bytes:
    """The body of an answer that does not stream."""
    content: dict[str, Any] = (
        {"message": {"role": "assistant", "content": text, "refusal": None}} if identity.chat else {"text": text}
    )
    choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish}
    return _encode(identity.fields(chunk=False) | {"choices": [choice], "usage": usage, "metrics": metrics})
