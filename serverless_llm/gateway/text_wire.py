"""What the gateway and its text processes say to one another: length-prefixed msgpack over pipes."""

from __future__ import annotations

import struct
from typing import Any

import msgspec

LENGTH = struct.Struct("<I")  # bytes of the body that follows


class Call(msgspec.Struct, frozen=True, array_like=True):
    """Turn one of `messages` (chat), `text` or `ids` (int32, little endian) into a prompt.

    With none of them the checkpoint's text files are checked, and the prompt is empty.

    Attributes:
        model: the deployed name, for messages.
        directory: the Hugging Face directory of the checkpoint; with `checkpoint` the key of what is cached.
        table: send the token table, too.
        variables: further variables for the template (`chat_template_kwargs`).
        echo: send the text of `ids`, too.
        context: tokens that the model takes; 0: any number.
    """

    model: str
    directory: str
    checkpoint: str
    messages: list[dict[str, Any]] | None = None
    text: str | None = None
    ids: bytes | None = None
    table: bool = False
    variables: dict[str, Any] = {}
    echo: bool = False
    context: int = 0


class Table(msgspec.Struct, frozen=True, array_like=True):
    """Token id -> the bytes it stands for: `blob[offsets[id]:offsets[id + 1]]`, empty for special tokens.

    Attributes:
        offsets: uint32, little endian, one more than there are ids.
        strip: leading spaces that the whole text loses.
        decoder: not empty: the bytes are those of the token itself (UTF-8), and this decoder of tokenizers, as JSON,
            makes text of several.
        special: names of the special tokens.
    """

    blob: bytes
    offsets: bytes
    strip: int
    decoder: bytes = b""
    special: dict[int, str] = {}


class Prompt(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """A tokenised prompt (int32, little endian) and what its checkpoint's files say about generation.

    `defaults`: of `fields.SAMPLING` what generation_config.json names. `chats`: there is a chat template. `text`: of
    token ids, where it was asked for.
    """

    ids: bytes
    defaults: dict[str, float]
    stop_ids: list[int]
    table: Table | None
    vocabulary_size: int
    chats: bool
    text: str = ""


class Fault(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """This prompt cannot be made. Fields as in `errors.RequestError`."""

    status: int
    code: str
    message: str
    param: str | None = None


Reply = Prompt | Fault

call_decoder = msgspec.msgpack.Decoder(Call)
reply_decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
encoder = msgspec.msgpack.Encoder()


def frame(message: Call | Reply) -> bytes:
    """The bytes of one message as they go through a pipe."""
    body = encoder.encode(message)
    return LENGTH.pack(len(body)) + body
