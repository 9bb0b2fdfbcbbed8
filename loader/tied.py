"""Tensors that share memory: a file holds each byte once, so one name of several is kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping

import torch


def storage_ptr(tensor: torch.Tensor) -> int:
    """Address of the tensor's storage; 0 where there is none."""
    return tensor.untyped_storage().data_ptr()


def storage_size(tensor: torch.Tensor) -> int:
    """Bytes of the tensor's storage."""
    return tensor.untyped_storage().nbytes()


def overlapping(tensors: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Groups of two or more names whose tensors, from first to last byte, overlap one another."""
    homes: dict[tuple[torch.device, int, int], list[tuple[int, int, str]]] = defaultdict(list)
    for name, tensor in tensors.items():
        if tensor.device.type != "meta" and tensor.numel():
            begin = tensor.data_ptr()
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            home = tensor.device, storage_ptr(tensor), storage_size(tensor)
            homes[home].append((begin, begin + (last + 1) * tensor.itemsize, name))
    groups = [group for areas in homes.values() for group in _runs(sorted(areas))]
    return [group for group in groups if len(group) > 1]


def _runs(areas: list[tuple[int, int, str]]) -> list[list[str]]:
    """Names of sorted (begin, end, name), those together that are without a gap."""
    groups: list[list[str]] = []
    reach = 0
    for begin, end, name in areas:
        if not groups or begin >= reach:
            groups.append([])
        groups[-1].append(name)
        reach = max(reach, end)
    return groups


def duplicates(tensors: Mapping[str, torch.Tensor], preferred: Collection[str] = ()) -> dict[str, list[str]]:
    """Which names to leave out: the name that is kept -> the others that show parts of it.

    Kept is the first name, by the alphabet, of those that cover their whole storage; one of `preferred` goes before.

    Raises:
        RuntimeError: none of a group covers its whole storage.
    """
    left_out = {}
    for group in overlapping(tensors):
        whole = sorted(name for name in group if _is_whole(tensors[name]))
        if not whole:
            raise RuntimeError(
                f"the tensors {sorted(group)} share memory and none covers its whole storage, so there is none to keep"
                " in their stead; clone those that are to be saved"
            )
        kept = next((name for name in whole if name in preferred), whole[0])
        left_out[kept] = sorted(name for name in group if name != kept)
    return left_out


def _is_whole(tensor: torch.Tensor) -> bool:
    return tensor.data_ptr() == storage_ptr(tensor) and tensor.numel() * tensor.itemsize == storage_size(tensor)
