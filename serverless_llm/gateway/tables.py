"""Token tables: what bytes each token id stands for, so that a stream is detokenised by look-ups alone.

Loading a tokenizer holds the interpreter's lock for up to a second; so text processes load them, and the gateway,
which must not stall its streams, gets one of these instead.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import msgspec
from tokenizers import Tokenizer

from serverless_llm.errors import RequestError
from serverless_llm.gateway.text_wire import Table

# The gateway runs decoders that no table describes on its loop. These take a time in proportion to their input, and
# write no more; so do the other steps that `_bounded` accepts.
LINEAR = frozenset({"ByteFallback", "ByteLevel", "Fuse", "Metaspace", "WordPiece"})
MOST_STEPS = 16  # of such a decoder
LONGEST_TOKEN = 4096  # bytes, there
MOST_BYTES = 64 << 20  # of all tokens; arbitrary, ten times those of the largest vocabularies. The gateway holds them


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


def _bounded(step: dict[str, Any]) -> bool:
    """Whether a decoder's time and output are in proportion to its input, whatever that is."""
    kind = step["type"]
    if kind == "Replace":
        pattern = step["pattern"].get("String")  # a regular expression may take for ever
        return bool(pattern) and len(step["content"].encode()) <= len(pattern.encode())
    if kind == "Strip":
        return not step["stop"]  # tokenizers panics where a token is shorter than it says
    return kind in LINEAR or (kind == "BPEDecoder" and bool(step["suffix"]))


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for part in decoder["decoders"] for step in _steps(part)]
    return [decoder]


def token_table(tokenizer: Tokenizer) -> Table:
    """The table of a tokenizer.

    Raises:
        RequestError: its decoder, or its size, could keep the gateway busy.
    """
    decoder = None if tokenizer.decoder is None else json.loads(tokenizer.decoder.__getstate__())
    rule = None if decoder is None else _piece(decoder)
    if rule is None:
        return strings_table(tokenizer)
    return _table(tokenizer, *rule)


def strings_table(tokenizer: Tokenizer) -> Table:
    """The table for a decoder that must see a token's neighbours. Raises as `token_table`."""
    state = b"null" if tokenizer.decoder is None else tokenizer.decoder.__getstate__()
    steps = _steps(json.loads(state))
    table = _table(tokenizer, str.encode, 0)
    refused = [step["type"] for step in steps if not _bounded(step)]
    if refused or len(steps) > MOST_STEPS or _longest(table) > LONGEST_TOKEN:
        fault = f"{refused[0]} in its tokenizer's decoder is" if refused else "so long a decoder or token is"
        raise RequestError(500, "engine_error", f"{fault} not supported")
    return msgspec.structs.replace(table, decoder=state)


def _longest(table: Table) -> int:
    offsets = array("I", table.offsets)
    return max((end - start for start, end in pairwise(offsets)), default=0)


def _table(tokenizer: Tokenizer, to_bytes: Callable[[str], bytes], strip: int) -> Table:
    added = tokenizer.get_added_tokens_decoder().items()
    special = {number: token.content for number, token in added if token.special}
    tokens = {number: token for token, number in tokenizer.get_vocab(with_added_tokens=True).items()}
    pieces = [
        to_bytes(tokens[number]) if number in tokens and number not in special else b""
        for number in range(max(tokens, default=-1) + 1)
    ]
    offsets = array("I", [0])
    for piece in pieces:
        offsets.append(offsets[-1] + len(piece))
    if offsets[-1] + sum(map(len, special.values())) + 4 * len(offsets) > MOST_BYTES:
        raise RequestError(500, "engine_error", f"a vocabulary of more than {MOST_BYTES >> 20} MiB is not supported")
    return Table(b"".join(pieces), offsets.tobytes(), strip, special=special)
