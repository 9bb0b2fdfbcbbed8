"""A checkpoint into a module that has no weights yet, such as one made on the meta device."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection
from itertools import chain
from pathlib import Path

import torch

from serverless_llm.loader import manifest
from serverless_llm.loader.library import Device, iterate

SHOWN = 4  # names of a kind in a message; arbitrary


def load_into(
    module: torch.nn.Module, directory: str | os.PathLike[str], device: Device = "cpu", strict: bool = True
) -> tuple[set[str], list[str]]:
    """Gives a module the tensors of a Hugging Face directory.

    They become its parameters and buffers: nothing is initialised first, and on the CPU nothing is copied, but for
    tensors of another type than the module's. Parameters that were one stay one. Buffers that are in no checkpoint are
    made on `device`, where the module is one of transformers, which knows how.

    Args:
        module: on any device; of those on the meta device nothing was ever in memory.
        device: where the module is to be. Of what is on the meta device, parameters that no checkpoint has stay there.

    Returns:
        Names that the module has and the checkpoint has not, and the other way round; both empty where `strict`.

    Raises:
        RuntimeError: `strict` and such names, shapes that differ, or buffers on the meta device that no checkpoint
            has, of a module that is none of transformers. Nothing of the module was changed.
        CheckpointError: as `iterate`.
    """
    wanted = module.state_dict(keep_vars=True)
    missing, unexpected = _compare(module, wanted, Path(directory), strict)
    twins = _twins(module)
    state = {name: tensor.to(wanted[name].dtype) for name, tensor in iterate(directory, device) if name in wanted}
    rest = {name: parameter for name, parameter in module.named_parameters() if name in missing}
    state |= {name: parameter.detach().to(device) for name, parameter in rest.items() if not parameter.is_meta}
    for names in twins:
        kept = next((name for name in names if name in state), None)
        if kept is not None:
            state |= {name: state[kept] for name in names}
    module.load_state_dict(state, strict=False, assign=True)
    for names in twins:
        _tie(module, names)
    _make_buffers(module, torch.device(device))
    return missing, unexpected


def _compare(
    module: torch.nn.Module, wanted: dict[str, torch.Tensor], directory: Path, strict: bool
) -> tuple[set[str], list[str]]:
    """Names that do not fit, from headers alone."""
    found = {entry.name: entry.shape for file in manifest.weights(directory) for entry in file.header.tensors}
    tied = {name for names in _twins(module) if not found.keys().isdisjoint(names) for name in names}
    missing, unexpected = wanted.keys() - found.keys() - tied, [name for name in found if name not in wanted]
    given = found.keys() & wanted.keys()
    odd = [name for name in given if tuple(wanted[name].shape) != found[name]]
    if odd or (strict and (missing or unexpected)):
        raise RuntimeError(
            f"{directory} does not fit {type(module).__name__}: missing are {_some(missing)}, unknown "
            f"{_some(unexpected)}, of other shapes {_some(odd)}; where transformers renames or fuses weights, give "
            "from_pretrained(None, config=..., state_dict=...) of the model's class what load_checkpoint returns"
        )
    for name, buffer in module.named_buffers():
        if buffer.is_meta and name not in given and not hasattr(module, "initialize_weights"):
            raise RuntimeError(f"buffer {name} is on the meta device, and no checkpoint has it")
    return set(missing), unexpected


def _some(names: Collection[str]) -> str:
    """The first few of names; experts have thousands."""
    rest = len(names) - SHOWN
    return f"{sorted(names)[:SHOWN]}" + (f" and {rest} more" if rest > 0 else "")


def _twins(module: torch.nn.Module) -> list[list[str]]:
    """Names of one parameter, where it has several."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return [several for several in names.values() if len(several) > 1]


def _tie(module: torch.nn.Module, names: list[str]) -> None:
    """Makes all of them the first one's parameter."""
    shared = module.get_parameter(names[0])
    for name in names[1:]:
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, shared)


def _make_buffers(module: torch.nn.Module, device: torch.device) -> None:
    """Buffers that are in no checkpoint: those that are real move, those on the meta device are made."""
    made = False
    for child in module.modules():
        for leaf, buffer in child.named_buffers(recurse=False):
            made |= buffer.is_meta
            child._buffers[leaf] = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
    if made:
        for tensor in chain(module.parameters(), module.state_dict(keep_vars=True).values()):
            tensor._is_hf_initialized = True  # transformers leaves these as they are
        module.initialize_weights()  # type: ignore[operator]  # of transformers' PreTrainedModel
