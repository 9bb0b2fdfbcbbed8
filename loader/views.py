"""A file's bytes as tensors, in their place where they lie aligned."""

from __future__ import annotations

from typing import Any

import torch

from serverless_llm.errors import CheckpointError
from serverless_llm.loader.header import TensorEntry
from serverless_llm.loader.members import shown

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F4": torch.float4_e2m1fn_x2,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16, "BF16": torch.bfloat16,
    "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32,
    "I64": torch.int64, "U64": torch.uint64, "F64": torch.float64, "C64": torch.complex64,
}  # fmt: skip


def view(buffer: Any, entry: TensorEntry, base: int = 0) -> torch.Tensor:
    """A tensor of a file, with storage of its own bytes only.

    Args:
        buffer: the file from its byte `base` on, or the part of it that has the tensor: host memory, or a tensor of
            bytes on any device. It lives as long as its views.

    Returns:
        A view of the buffer, or a copy where the bytes are misaligned to their item size.

    Raises:
        CheckpointError: a type or a shape that torch has not.
    """
    dtype = TORCH_DTYPES.get(entry.dtype)
    if dtype is None:
        raise CheckpointError(f"tensor {shown(entry.name)} has the dtype {entry.dtype}, which has no tensor type")
    shape = shape_of(entry)
    if entry.start == entry.end:
        return torch.empty(shape, dtype=dtype, device=buffer.device if isinstance(buffer, torch.Tensor) else "cpu")
    first = entry.start - base
    if isinstance(buffer, torch.Tensor):
        first += int(buffer.storage_offset())
        raw = buffer.new_empty(0).set_(buffer.untyped_storage()[first : first + entry.nbytes])
    else:
        raw = torch.frombuffer(buffer, dtype=torch.uint8, count=entry.nbytes, offset=first)
    if raw.data_ptr() % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).view(shape)


def misaligned(entry: TensorEntry) -> bool:
    """Whether it cannot be viewed in its file, which begins at an aligned address."""
    dtype = TORCH_DTYPES.get(entry.dtype)
    return dtype is not None and entry.nbytes > 0 and entry.start % dtype.itemsize > 0


def shape_of(entry: TensorEntry) -> tuple[int, ...]:
    """The tensor's shape: torch counts pairs of 4-bit numbers, a header counts numbers.

    Raises:
        CheckpointError: a row ends within a pair.
    """
    if entry.dtype != "F4":
        return entry.shape
    *rows, last = entry.shape
    if last % 2:
        raise CheckpointError(f"tensor {shown(entry.name)} of F4 {list(entry.shape)} has rows that end within a byte")
    return (*rows, last // 2)
