"""Token tables: what bytes each token id stands for, so that a stream is detokenised by look-ups alone.

Loading a tokenizer holds the interpreter's lock for up to a second; so text processes load them, and the gateway,
which must not stall its streams, gets one of these instead.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer

from serverless_llm.gateway.text_wire import Table

WHOLE = Table(b"", b"", 0)  # a decoder that this module does not know: texts are decoded by the tokenizer itself


def byte_of_character() -> dict[str, int]:
    """Byte-level vocabularies' printable character -> the byte that it stands for (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return {chr(byte if byte in printable else next(spare)): byte for byte in range(256)}


def _byte_level(token: str, table: dict[str, int]) -> bytes:
    if all(character in table for character in token):
        return bytes(table[character] for character in token)
    return token.encode()  # an added token outside the table stands for itself, as in tokenizers' decoder


def _byte_fallback(token: str, mark: str, content: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.replace(mark, content).encode()


def _sentencepiece(steps: list[dict[str, Any]]) -> tuple[Callable[[str], bytes], int] | None:
    """The `Replace, ByteFallback, Fuse[, Strip]` chain that SentencePiece checkpoints carry."""
    kinds = [step["type"] for step in steps]
    if kinds[:3] != ["Replace", "ByteFallback", "Fuse"] or kinds[3:] not in ([], ["Strip"]):
        return None
    mark, content = steps[0]["pattern"].get("String"), steps[0]["content"]
    strip: dict[str, Any] = steps[3] if kinds[3:] else {"content": " ", "start": 0, "stop": 0}
    if not mark or strip["content"] != " " or strip["stop"]:
        return None
    return (lambda token: _byte_fallback(token, mark, content)), int(strip["start"])


def _piece(decoder: dict[str, Any]) -> tuple[Callable[[str], bytes], int] | None:
    """How one token becomes bytes, and how many leading spaces the whole text loses."""
    if decoder["type"] == "ByteLevel":
        table = byte_of_character()
        return (lambda token: _byte_level(token, table)), 0
    return _sentencepiece(decoder["decoders"]) if decoder["type"] == "Sequence" else None


def token_table(tokenizer: Tokenizer) -> Table:
    """The table of a tokenizer; `WHOLE` where no table can say what its decoder does."""
    decoder = tokenizer.decoder
    rule = _piece(json.loads(decoder.__getstate__())) if decoder is not None else None
    if rule is None:
        return WHOLE
    to_bytes, strip = rule
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    tokens = {number: token for token, number in tokenizer.get_vocab(with_added_tokens=True).items()}
    pieces = [
        to_bytes(tokens[number]) if number in tokens and number not in special else b""
        for number in range(max(tokens, default=-1) + 1)
    ]
    offsets = array("I", [0])
    for piece in pieces:
        offsets.append(offsets[-1] + len(piece))
    return Table(b"".join(pieces), offsets.tobytes(), strip)
