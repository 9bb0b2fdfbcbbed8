"""Tensors to safetensors, byte for byte as the reference implementation writes them (`safetensors.torch`, 0.8).

The header is padded with spaces to whole 8 bytes, and tensors go from wide types to narrow ones, then by name: every
tensor lies aligned to its item size.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import torch

from serverless_llm.loader import header
from serverless_llm.loader.header import MANY_METADATA, MAX_METADATA, METADATA
from serverless_llm.loader.tied import duplicates, overlapping
from serverless_llm.loader.views import TORCH_DTYPES

ORDER = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E5M2FNUZ", "F8_E4M3FNUZ",
    "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "F4", "BOOL",
)  # fmt: skip
RANKS = {TORCH_DTYPES[name]: rank for rank, name in enumerate(ORDER)}


def save(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """The bytes of a safetensors file.

    Args:
        tensors: dense and contiguous, on any device, no two sharing memory.
        metadata: texts for the header.

    Raises:
        ValueError: no dict, a tensor that is none, sparse, not contiguous, or of a type that the format has not, or
            more metadata than are read again.
        RuntimeError: tensors share memory.
        TypeError: a name or an entry of the metadata is no string.
    """
    return b"".join(_parts(tensors, metadata))


def save_file(
    tensors: dict[str, torch.Tensor], filename: str | os.PathLike[str], metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file, which takes its name when it is complete: a process that dies leaves none that is cut.

    As with the reference it is not synced to the disk: a power failure soon after may leave a damaged one.

    Raises:
        ValueError, RuntimeError, TypeError: as `save`.
        OSError: it cannot be written; what was there before is there still.
    """
    path = Path(filename)
    parts = _parts(tensors, metadata)
    unfinished = path.parent / f".{uuid4().hex}.unfinished"
    try:
        with unfinished.open("xb") as file:
            for part in parts:
                file.write(part)
        unfinished.replace(path)
    except OSError as error:  # the caller knows no unfinished file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        unfinished.unlink(missing_ok=True)


def save_model(
    model: torch.nn.Module, filename: str, metadata: dict[str, str] | None = None, force_contiguous: bool = True
) -> None:
    """Saves a module's state. Of tensors that share memory one is saved; the metadata tell its name for each other.

    Args:
        force_contiguous: copy tensors that are not, instead of refusing them.

    Raises:
        ValueError, TypeError, OSError: as `save_file`.
        RuntimeError: tensors share memory, and none of them covers all of it.
    """
    state = model.state_dict()
    names = {gone: kept for kept, others in duplicates(state).items() for gone in others}
    state = {name: tensor for name, tensor in state.items() if name not in names}
    if names:
        metadata = names | (metadata or {})
    if force_contiguous:
        state = {name: tensor.contiguous() for name, tensor in state.items()}
    try:
        save_file(state, filename, metadata)
    except ValueError as error:
        raise ValueError(f"{error}; or save_model(..., force_contiguous=True)") from error


def _parts(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None) -> Iterator[bytes | memoryview]:
    """A file's header and its tensors' bytes; everything is checked before the first. One tensor of a device or of
    lazy values (`conj`) is copied at a time."""
    _check(tensors)
    ordered = sorted(tensors.items(), key=lambda item: (RANKS[item[1].dtype], item[0]))
    head = _header(ordered, metadata)

    def parts() -> Iterator[bytes | memoryview]:
        yield head
        for _, tensor in ordered:
            yield _content(tensor)

    return parts()


def _header(tensors: list[tuple[str, torch.Tensor]], metadata: dict[str, str] | None) -> bytes:
    entries = [
        (name, ORDER[RANKS[tensor.dtype]], _shape(tensor), tensor.numel() * tensor.itemsize) for name, tensor in tensors
    ]
    return header.encode(entries, None if metadata is None else _texts(metadata))


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """A header counts 4-bit numbers, torch counts pairs."""
    if tensor.dtype != torch.float4_e2m1fn_x2:
        return tuple(tensor.shape)
    *rows, last = tensor.shape
    return (*rows, last * 2)


def _texts(metadata: dict[str, str]) -> dict[str, str]:
    if not isinstance(metadata, dict):
        raise TypeError(f"metadata are a dict of strings, not {type(metadata).__name__}")
    if len(metadata) > MAX_METADATA:
        raise ValueError(MANY_METADATA)
    for key, text in metadata.items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise TypeError(f"metadata are strings by strings, not {key!r}: {text!r}")
    return metadata


def _content(tensor: torch.Tensor) -> memoryview:
    plain = tensor.detach().to("cpu").resolve_conj().resolve_neg()
    return plain.reshape(-1).view(torch.uint8).numpy().data


def _check(tensors: dict[str, torch.Tensor]) -> None:
    if not isinstance(tensors, dict):
        raise ValueError(f"expected a dict of tensors by name, not {type(tensors)}")  # noqa: TRY004
    for name, tensor in tensors.items():
        _check_tensor(name, tensor)
    if groups := overlapping(tensors):
        raise RuntimeError(f"tensors share memory: {groups}; save_model keeps one of each group, or clone them")
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"tensor {name!r} is not contiguous; call .contiguous() on it first")


def _check_tensor(name: str, tensor: torch.Tensor) -> None:
    if not isinstance(name, str):
        raise TypeError(f"names of tensors are strings, not {name!r}")
    if name == METADATA:
        raise ValueError(f"{METADATA!r} is no name for a tensor: the header has its metadata there")
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name!r} is no torch.Tensor but {type(tensor)}")  # noqa: TRY004
    if tensor.layout != torch.strided:
        raise ValueError(f"tensor {name!r} is sparse; .to_dense() makes one that can be saved, perhaps much larger")
    if tensor.dtype not in RANKS:
        raise ValueError(f"tensor {name!r} has the type {tensor.dtype}, which safetensors has not")
    if tensor.dtype == torch.float4_e2m1fn_x2 and not tensor.shape:
        raise ValueError(f"tensor {name!r} of {tensor.dtype} has no dimension: its header could not count it")
