"""A checkpoint cut for tensor parallelism: read once, every device gets its share."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from serverless_llm.loader import manifest
from serverless_llm.loader.library import Device, home_of, iterate, local
from serverless_llm.loader.views import shape_of


def load_slices(
    directory: str | os.PathLike[str], devices: Sequence[Device], split: Callable[[str], int | None]
) -> list[dict[str, torch.Tensor]]:
    """The tensors of a Hugging Face directory, cut along one dimension each, for `devices` of one process.

    Every file is read once, in groups as `iterate` does, and each device is sent its own part of a tensor only.

    Args:
        directory: or its URL, which is brought into the disk tier (docs/remote.md).
        split: along which dimension a tensor of this name is cut into equal parts; None: every device gets all of it.

    Returns:
        One dict for each device, in their order; tensors are contiguous.

    Raises:
        ValueError: no device, one that is not there, or a tensor that cannot be cut so; names it, before anything is
            read.
        CheckpointError: as `iterate`.
    """
    if not devices:
        raise ValueError("there is no device to load slices for")
    homes = [home_of(device) for device in devices]
    slices: list[dict[str, torch.Tensor]] = [{} for _ in devices]
    with local(directory) as path:
        dims = _dims(path, split, len(devices))
        for name, tensor in iterate(path):
            dim = dims[name]
            parts = [tensor] * len(homes) if dim is None else tensor.chunk(len(homes), dim)
            for mine, part, home in zip(slices, parts, homes, strict=True):
                mine[name] = part.to(home, copy=True, memory_format=torch.contiguous_format)
    return slices


def _dims(directory: Path, split: Callable[[str], int | None], count: int) -> dict[str, int | None]:
    """The dimension of each tensor, known from headers."""
    dims = {}
    for entry in (entry for file in manifest.weights(directory) for entry in file.header.tensors):
        dim, shape = split(entry.name), shape_of(entry)
        if dim is not None and not -len(shape) <= dim < len(shape):
            raise ValueError(f"tensor {entry.name!r} of shape {list(shape)} has no dimension {dim}")
        if dim is not None and shape[dim] % count:
            raise ValueError(
                f"tensor {entry.name!r} of shape {list(shape)} cannot be cut into {count} equal parts"
                f" along dimension {dim}"
            )
        dims[entry.name] = dim
    return dims
