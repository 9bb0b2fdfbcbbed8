"""Logprobs as clients see them: each token's with the text that it begins, in the form of its route."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from serverless_llm import wire
from serverless_llm.gateway.detokenise import Detokeniser

Piece = Callable[[int], bytes]  # what one token stands for


class Scored(NamedTuple):
    """A token, the character of the generated text at which it begins, and its likelihood."""

    token: int
    start: int
    likelihood: wire.Likelihood


class Scores:
    """The tokens of one choice that wait for their text to be sent.

    A token that begins behind a stop string is never told of, nor is one whose text is held back.
    """

    def __init__(self) -> None:
        self._waiting: deque[Scored] = deque()
        self._decoded = self._sent = 0  # characters

    def feed(self, detokeniser: Detokeniser, tokens: Sequence[int], likelihoods: Sequence[wire.Likelihood]) -> str:
        """The text of `tokens`; `likelihoods` may have one more, of a stop id."""
        pieces = []
        for place, token in enumerate(tokens):
            self._waiting.append(Scored(token, self._decoded, likelihoods[place]))
            pieces.append(detokeniser.feed((token,)))
            self._decoded += len(pieces[-1])
        return "".join(pieces)

    def sent(self, characters: int) -> None:
        self._sent += characters

    def take(self, rest: bool) -> list[Scored]:
        """Tokens that begin in what was sent; with `rest` all."""
        waiting, taken = self._waiting, []
        while waiting and (rest or waiting[0].start < self._sent):
            taken.append(waiting.popleft())
        return taken


def _text(piece: bytes) -> str:
    """A token's name; bytes that are a part of a character are written out, so that no two look the same."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in piece)


def chat(scored: Sequence[Scored], piece: Piece) -> dict[str, Any]:
    """The form of /v1/chat/completions."""
    content = []
    for one in scored:
        logprob, tokens, logprobs = one.likelihood
        top = [_entry(piece(token), value) for token, value in zip(tokens, logprobs, strict=True)]
        content.append(_entry(piece(one.token), logprob) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def _entry(piece: bytes, logprob: float) -> dict[str, Any]:
    return {"token": _text(piece), "logprob": logprob, "bytes": list(piece)}


def text(scored: Sequence[Scored], piece: Piece) -> dict[str, Any]:
    """The form of /v1/completions: the token itself is always among the likeliest."""
    return {
        "tokens": [_text(piece(one.token)) for one in scored],
        "token_logprobs": [one.likelihood[0] for one in scored],
        "top_logprobs": [_likeliest(one, piece) for one in scored],
        "text_offset": [one.start for one in scored],
    }


def _likeliest(one: Scored, piece: Piece) -> dict[str, float]:
    logprob, tokens, logprobs = one.likelihood
    named: dict[str, float] = {}
    for token, value in (*zip(tokens, logprobs, strict=True), (one.token, logprob)):
        named.setdefault(_text(piece(token)), value)
    return named
