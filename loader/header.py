"""A safetensors header, as untrusted input.

The file: 8 bytes little endian (the length n of the header), n bytes of JSON, then the tensors' bytes, gap-free and
without overlap to the end of the file (https://github.com/huggingface/safetensors, "Format"). Data that are misaligned
to their item size are legal. Where this reader and the reference implementation differ is listed in docs/header.md.

Memory: values are read one at a time, so that a hostile header costs at most ten times its bytes and 256 KiB.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from operator import attrgetter
from typing import Any, NamedTuple

from serverless_llm.errors import CheckpointError
from serverless_llm.loader.members import Document, shown

PREFIX = 8  # bytes before the JSON
POINTER = b"version "  # how what git has in place of a large file begins; as a length it is over any limit
# How what torch.save writes begins: a zip since 1.6, before a pickle of protocol 2 to 5.
PICKLES = b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"
UNOPENED = "not opened, since unpickling runs code"
METADATA = "__metadata__"
MAX_HEADER = 100_000_000  # bytes of JSON; the reference implementation's limit
MAX_DIMENSION = 2**63 - 1  # what a tensor library can hold in a signed size
MAX_ENTRY = 4096  # characters of one tensor's entry; real ones have about a hundred
MAX_METADATA = 1024  # pairs; real files have from one to about a hundred
MANY_METADATA = f"__metadata__ has more than {MAX_METADATA} pairs"
DTYPE_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
FIELDS = {"dtype", "shape", "data_offsets"}


class TensorEntry(NamedTuple):
    """One tensor; its bytes are `file[start:end]`, counted from the file's first byte."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


class Header(NamedTuple):
    """A valid header: tensors in file order; `data_offset` is where the first one begins."""

    tensors: tuple[TensorEntry, ...]
    metadata: dict[str, str]
    data_offset: int


def data_offset(prefix: bytes, file_size: int) -> int:
    """Bytes of prefix and JSON together, from a file's first 8 bytes.

    Raises:
        CheckpointError: the file is too short, or the length is over the limit or the file's size.
    """
    if len(prefix) < PREFIX or file_size < PREFIX:
        raise CheckpointError(f"file of {file_size} bytes is too short for a safetensors header")
    if prefix.startswith(POINTER):
        raise CheckpointError("no safetensors file, but git's pointer to one: git lfs pull brings the file itself")
    length = int.from_bytes(prefix[:PREFIX], "little")
    if length > MAX_HEADER and prefix.startswith(PICKLES):
        raise CheckpointError(
            f"no safetensors file, but a pickle or a zip, as torch.save writes: {UNOPENED}; convert it to safetensors"
        )
    if length > MAX_HEADER:
        raise CheckpointError(
            f"header of {length} bytes is over the limit of {MAX_HEADER}: no safetensors file, or a damaged one"
        )
    if PREFIX + length > file_size:
        raise CheckpointError(f"header of {length} bytes reaches beyond the file's {file_size} bytes")
    return PREFIX + length


def parse(raw: bytes, file_size: int) -> Header:
    """The header in `raw`, a file's beginning that holds at least the whole header.

    Raises:
        CheckpointError: anything that untrusted input can do wrong.
    """
    begin = data_offset(raw, file_size)
    if len(raw) < begin:
        raise CheckpointError(f"header of {begin} bytes is cut to {len(raw)}")
    tensors, metadata = _read(_text(raw, begin), begin)
    _check_names(tensors)
    tensors.sort(key=attrgetter("end"))
    tensors.sort(key=attrgetter("start"))  # sorts are stable: by start, then by end, without a key object each
    _check_cover(tensors, begin, file_size)
    return Header(tuple(tensors), metadata, begin)


def encode(
    tensors: Iterable[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str] | None, alignment: int = PREFIX
) -> bytes:
    """The header of a file whose tensors follow in this order.

    Args:
        tensors: name, dtype as the format spells it, shape and bytes of each.
        metadata: None: the file has none.
        alignment: data begin at a multiple of so many bytes; the JSON is padded with spaces.
    """
    fields: dict[str, Any] = {} if metadata is None else {METADATA: metadata}
    offset = 0
    for name, dtype, shape, nbytes in tensors:
        fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(PREFIX + len(text)) % alignment)
    return len(text).to_bytes(PREFIX, "little") + text


def _text(raw: bytes, begin: int) -> str:
    try:
        return str(memoryview(raw)[PREFIX:begin], "utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"header is not UTF-8: {error.reason} at byte {error.start}") from None


def _read(text: str, begin: int) -> tuple[list[TensorEntry], dict[str, str]]:
    document = Document(text, "header")
    tensors: list[TensorEntry] = []
    metadata: list[dict[str, str]] = []

    def member(name: str, at: int) -> int:
        if name != METADATA:
            entry, end = _entry(name, text, at, begin)
            tensors.append(entry)
            return end
        if metadata:
            raise CheckpointError(f"header has the key {METADATA!r} twice")
        pairs, end = _metadata(document, at)
        metadata.append(pairs)
        return end

    end = document.object(0, "header", member)
    if end < len(text):
        raise document.broken("something follows", end)
    return tensors, metadata[0] if metadata else {}


# --- what the members mean ---


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise CheckpointError("a tensor's entry has the same field twice")
    return fields


ENTRY = json.JSONDecoder(object_pairs_hook=_unique)


def _metadata(document: Document, at: int) -> tuple[dict[str, str], int]:
    if document.text.startswith("null", at):
        return {}, at + 4
    pairs: dict[str, str] = {}

    def member(key: str, at: int) -> int:
        if key in pairs:
            raise CheckpointError(f"__metadata__ has the key {shown(key)} twice")
        if len(pairs) == MAX_METADATA:
            raise CheckpointError(MANY_METADATA)
        pairs[key], end = document.string(at)
        return end

    return pairs, document.object(at, METADATA, member)


def _entry(name: str, text: str, at: int, begin: int) -> tuple[TensorEntry, int]:
    """The tensor whose entry begins at `at`, and where that ends."""
    window = text[at : at + MAX_ENTRY]
    try:
        value, length = ENTRY.raw_decode(window)
    except RecursionError:
        raise CheckpointError(f"tensor {shown(name)} is nested too deeply") from None
    except ValueError as error:
        raise _broken(name, window, error) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"tensor {shown(name)} is not an object")
    if value.keys() != FIELDS:
        odd = "lacks" if FIELDS - value.keys() else "has more than"
        raise CheckpointError(f"tensor {shown(name)} {odd} dtype, shape and data_offsets")
    if "-" in window[:length]:  # a minus, and the one number that it may stand before
        raise CheckpointError(f"tensor {shown(name)} has a negative number")
    return _checked(name, value, begin), at + length


def _broken(name: str, window: str, error: ValueError) -> CheckpointError:
    if len(window) == MAX_ENTRY:
        return CheckpointError(f"the entry of tensor {shown(name)} is longer than {MAX_ENTRY} characters")
    return CheckpointError(f"header is not JSON: in the entry of tensor {shown(name)}: {error}")


def _checked(name: str, value: dict[str, Any], begin: int) -> TensorEntry:
    dtype = value["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"tensor {shown(name)} has the unknown dtype {shown(str(dtype))}")
    shape = _sizes(value["shape"], f"shape of tensor {shown(name)}")
    start, *end = _sizes(value["data_offsets"], f"data_offsets of tensor {shown(name)}") or (0,)
    if len(end) != 1 or start > end[0]:
        raise CheckpointError(f"data_offsets of tensor {shown(name)} are not [begin, end]")
    _check_bytes(name, dtype, shape, end[0] - start)
    # one string for each dtype, not one for each tensor
    return TensorEntry(name, sys.intern(dtype), shape, begin + start, begin + end[0])


def _sizes(value: Any, what: str) -> tuple[int, ...]:
    # type(): to isinstance, true is an int
    if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
        raise CheckpointError(f"{what} is not a list of integers from 0")
    if any(item > MAX_DIMENSION for item in value):
        raise CheckpointError(f"{what} has a number over 2^63 - 1")
    return tuple(value)


def _check_bytes(name: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> None:
    """Sizes beside a 0 count, too: no tensor library can hold such a shape's strides."""
    items = 1
    for size in shape:
        items *= size or 1
        if items > MAX_DIMENSION:
            raise CheckpointError(f"shape {list(shape)} of tensor {shown(name)} overflows")
    bits = 0 if 0 in shape else items * DTYPE_BITS[dtype]
    if bits != nbytes * 8:
        raise CheckpointError(f"tensor {shown(name)} of {dtype} {list(shape)} does not fill its {nbytes} bytes")


def _check_names(tensors: list[TensorEntry]) -> None:
    """Sorts by name: a set of a hostile header's names would take more memory than its tensors."""
    tensors.sort(key=attrgetter("name"))
    for before, after in pairwise(tensors):
        if before.name == after.name:
            raise CheckpointError(f"header has the key {shown(after.name)} twice")


def _check_cover(tensors: list[TensorEntry], begin: int, file_size: int) -> None:
    """Tensors, sorted by offset, must cover the file's data exactly."""
    if tensors and tensors[0].start != begin:
        raise CheckpointError(f"a gap before the first tensor {shown(tensors[0].name)}")
    for before, after in pairwise(tensors):
        if after.start != before.end:
            fault = "a gap between" if after.start > before.end else "an overlap of"
            raise CheckpointError(f"{fault} the tensors {shown(before.name)} and {shown(after.name)}")
    end = tensors[-1].end if tensors else begin
    if end != file_size:
        fault, remedy = ("truncated: ", ": copy or download it again") if end > file_size else ("", "")
        raise CheckpointError(f"{fault}tensors end at byte {end}, the file at {file_size}{remedy}")
