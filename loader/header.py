"""A safetensors header, as untrusted input.

The file: 8 bytes little endian (the length n of the header), n bytes of JSON, then the tensors' bytes, gap-free and
without overlap to the end of the file (https://github.com/huggingface/safetensors, "Format"). Data that are misaligned
to their item size are legal.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any, NamedTuple, NoReturn

from serverless_llm.errors import CheckpointError

PREFIX = 8  # bytes before the JSON
MAX_HEADER = 100_000_000  # bytes of JSON; the reference implementation's limit
MAX_DIMENSION = 2**63 - 1  # what a tensor library can hold in a signed size
DTYPE_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


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
    length = int.from_bytes(prefix[:PREFIX], "little")
    if length > MAX_HEADER:
        raise CheckpointError(f"header of {length} bytes is over the limit of {MAX_HEADER}")
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
    fields = _decode(raw[PREFIX:begin])
    metadata = _metadata(fields.pop("__metadata__", None))
    tensors = sorted((_entry(name, value, begin) for name, value in fields.items()), key=lambda t: (t.start, t.end))
    _check_cover(tensors, begin, file_size)
    return Header(tuple(tensors), metadata, begin)


def _decode(raw: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise CheckpointError("header is nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(f"header is not JSON in UTF-8: {error}") from None
    if not isinstance(fields, dict):
        raise CheckpointError("header is not a JSON object")
    return fields


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise CheckpointError(f"header has the key {twice!r} twice")
    return fields


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _metadata(value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise CheckpointError("__metadata__ is not an object of strings")
    for key, text in value.items():
        _check_text(key)
        _check_text(text)
    return value


def _entry(name: str, value: Any, begin: int) -> TensorEntry:
    _check_text(name)
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise CheckpointError(f"tensor {name!r} is not an object with dtype, shape and data_offsets")
    dtype = value["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"tensor {name!r} has the unknown dtype {dtype!r}")
    shape = _sizes(value["shape"], f"shape of tensor {name!r}")
    offsets = _sizes(value["data_offsets"], f"data_offsets of tensor {name!r}")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"data_offsets of tensor {name!r} are not [begin, end]")
    _check_bytes(name, dtype, shape, offsets[1] - offsets[0])
    return TensorEntry(name, dtype, shape, begin + offsets[0], begin + offsets[1])


def _check_text(text: str) -> None:
    """JSON can smuggle half a surrogate pair, which no UTF-8 string holds, into a name."""
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise CheckpointError(f"header has the string {text!r}, which is not Unicode text")


def _sizes(value: Any, what: str) -> tuple[int, ...]:
    # type(): to isinstance, true is an int
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item <= MAX_DIMENSION for item in value):
        raise CheckpointError(f"{what} is not a list of integers of 0 ... 2^63 - 1")
    return tuple(value)


def _check_bytes(name: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> None:
    items = 1
    for size in shape:
        items *= size
        if items > MAX_DIMENSION:
            raise CheckpointError(f"shape {list(shape)} of tensor {name!r} overflows")
    if items * DTYPE_BITS[dtype] != nbytes * 8:
        raise CheckpointError(f"tensor {name!r} of {dtype} {list(shape)} does not fill its {nbytes} bytes")


def _check_cover(tensors: list[TensorEntry], begin: int, file_size: int) -> None:
    """Tensors, sorted by offset, must cover the file's data exactly."""
    if tensors and tensors[0].start != begin:
        raise CheckpointError(f"a gap before the first tensor {tensors[0].name!r}")
    for before, after in pairwise(tensors):
        if after.start != before.end:
            fault = "a gap between" if after.start > before.end else "an overlap of"
            raise CheckpointError(f"{fault} the tensors {before.name!r} and {after.name!r}")
    end = tensors[-1].end if tensors else begin
    if end != file_size:
        fault = "truncated: " if end > file_size else ""
        raise CheckpointError(f"{fault}tensors end at byte {end}, the file at {file_size}")
