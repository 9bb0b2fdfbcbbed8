"""A checkpoint into a module that has no weights yet, such as one made on the meta device."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Collection
from itertools import chain
from operator import attrgetter
from pathlib import Path

import torch

from serverless_llm.loader import manifest
from serverless_llm.loader.library import Device, home_of, iterate, local

log = logging.getLogger(__name__)

SHOWN = 4  # names of a kind in a message; arbitrary
RENAMED = (
    "; where transformers renames or fuses weights, give from_pretrained(None, config=..., state_dict=...) of the "
    "model's class what load_checkpoint returns"
)


def load_into(
    module: torch.nn.Module, directory: str | os.PathLike[str], device: Device = "cpu", strict: bool = True
) -> tuple[set[str], list[str]]:
    """Gives a module the tensors of a Hugging Face directory.

    They become its parameters and buffers: nothing is initialised first, and on the CPU nothing is copied, but for
    tensors of another type than the module's. Parameters that were one stay one, and so do buffers, unless the files
    have several of their names with different numbers: a warning tells that. Buffers that are in no checkpoint are made
    on `device`, where the module is one of transformers, which knows how.

    Args:
        module: on any device; of those on the meta device nothing was ever in memory.
        directory: or its URL, which is brought into the disk tier (docs/remote.md).
        device: where the module is to be. Of what is on the meta device, parameters that no checkpoint has stay there.

    Returns:
        Names that the module has and the checkpoint has not, and the other way round; both empty where `strict`.

    Raises:
        RuntimeError: `strict` and such names, shapes that differ, or buffers on the meta device that no checkpoint
            has, of a module that is none of transformers. Nothing of the module was changed.
        CheckpointError, ValueError: as `iterate`.
        TypeError: no module.
    """
    if not isinstance(module, torch.nn.Module):
        kind = type(module).__name__  # type: ignore[unreachable]
        raise TypeError(f"a torch.nn.Module is needed, then its checkpoint's directory; not {kind}")
    home = home_of(device)
    wanted = module.state_dict(keep_vars=True)
    with local(directory) as path:
        missing, unexpected = _compare(module, wanted, path, strict)
        state = {name: tensor.to(wanted[name].dtype) for name, tensor in iterate(path, device) if name in wanted}
    twins = _twins(module)
    rest = {name: parameter for name, parameter in module.named_parameters() if name in missing}
    state |= {name: parameter.detach().to(home) for name, parameter in rest.items() if not parameter.is_meta}
    module.load_state_dict(state, strict=False, assign=True)
    for names in twins:
        _tie(module, [name for name in names if name in state], [name for name in names if name not in state])
    _make_buffers(module, home)
    return missing, unexpected


def _compare(
    module: torch.nn.Module, wanted: dict[str, torch.Tensor], directory: Path, strict: bool
) -> tuple[set[str], list[str]]:
    """Names that do not fit, from headers alone."""
    found = {entry.name: entry.shape for file in manifest.weights(directory) for entry in file.header.tensors}
    tied = {name for names in _twins(module) if not found.keys().isdisjoint(names) for name in names}
    missing, unexpected = wanted.keys() - found.keys() - tied, [name for name in found if name not in wanted]
    given = found.keys() & wanted.keys()
    shapes = {name: (found[name], tuple(wanted[name].shape)) for name in given}
    odd = [
        f"{name}: {there} in the files, {here} in the module" for name, (there, here) in shapes.items() if there != here
    ]
    if odd or (strict and (missing or unexpected)):
        kinds = {"missing are": missing, "unknown": unexpected, "of other shapes": odd}
        faults = ", ".join(f"{kind} {_some(names)}" for kind, names in kinds.items() if names)
        raise RuntimeError(
            f"{directory} does not fit {type(module).__name__}: {faults}{RENAMED if _of_transformers(module) else ''}"
        )
    for name, buffer in module.named_buffers():
        if buffer.is_meta and name not in given | tied and not _of_transformers(module):
            raise RuntimeError(f"buffer {name} is on the meta device, and no checkpoint has it")
    return set(missing), unexpected


def _of_transformers(module: torch.nn.Module) -> bool:
    return hasattr(module, "initialize_weights")


def _some(names: Collection[str]) -> str:
    """The first few of names; experts have thousands."""
    rest = len(names) - SHOWN
    return f"{sorted(names)[:SHOWN]}" + (f" and {rest} more" if rest > 0 else "")


def _twins(module: torch.nn.Module) -> list[list[str]]:
    """Names of one parameter or buffer, where it has several."""
    names: dict[int, list[str]] = defaultdict(list)
    both = module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    for name, tensor in chain(*both):
        names[id(tensor)].append(name)
    return [several for several in names.values() if len(several) > 1]


def _tie(module: torch.nn.Module, given: list[str], others: list[str]) -> None:
    """One parameter or buffer of all these names, but for those that were given other numbers than the first."""
    first, *rest = [*given, *others]
    shared = attrgetter(first)(module)
    for name in rest:
        if name in given and not torch.equal(shared, attrgetter(name)(module)):
            log.warning("%s and %s differ in the files: they are not tied", first, name)
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, shared)


def _make_buffers(module: torch.nn.Module, device: torch.device) -> None:
    """Buffers that are in no checkpoint: those that are real move, those on the meta device are made."""
    moved: dict[torch.Tensor, torch.Tensor] = {}  # those that are one stay one
    for child in module.modules():
        for leaf, buffer in child.named_buffers(recurse=False, remove_duplicate=False):
            if buffer not in moved:
                moved[buffer] = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
            child._buffers[leaf] = moved[buffer]
    if any(buffer.is_meta for buffer in moved):
        for tensor in chain(module.parameters(), module.state_dict(keep_vars=True).values()):
            tensor._is_hf_initialized = True  # transformers leaves these as they are
        module.initialize_weights()  # type: ignore[operator]  # of transformers' PreTrainedModel
