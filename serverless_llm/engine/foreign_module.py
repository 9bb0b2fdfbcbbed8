"""A module of transformers on our weights, where they lie; and its linear layers on tiles. An extra: `transformers`.

Weights are views: those that transformers packs into one tensor already lie so, see `config.ForeignConfig`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from serverless_llm.engine.architectures import foreign
from serverless_llm.engine.architectures.reader import Reader
from serverless_llm.engine.config import ForeignConfig
from serverless_llm.engine.layers import Tensors
from serverless_llm.engine.model import DTYPES
from serverless_llm.errors import CheckpointError
from serverless_llm.kernels.linear import padded, tiled_linear

os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")  # there is nothing to wait for, and `InPlace` sees this thread
COPIED = 64  # of so many bytes of weights transformers may copy one: what it wants in another dtype


class InPlace(TorchFunctionMode):
    """Leaves weights where they are while transformers loads them; of neighbours that it joins it makes a view."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func is torch.Tensor.to and given.pop("device", None) and not given and len(args) == 1:
            return args[0]
        joined = join(*args, **given, new=func is torch.stack) if func in (torch.stack, torch.cat) else None
        return func(*args, **given) if joined is None else joined


def join(tensors: Sequence[torch.Tensor], dim: int = 0, *, new: bool) -> torch.Tensor | None:
    """What `torch.cat`, with a `new` dimension `torch.stack`, makes of tensors, as a view; None where there is none."""
    first = tensors[0]
    shape, strides = [*map(int, first.shape)], list(first.stride())
    steps = {after.storage_offset() - before.storage_offset() for before, after in pairwise(tensors)}
    if len(steps) != 1 or any(_kind(tensor) != _kind(first) for tensor in tensors):
        return None
    step = int(steps.pop())
    if new:
        shape.insert(dim, len(tensors))
        strides.insert(dim, step)
    elif step == shape[dim] * strides[dim]:
        shape[dim] *= len(tensors)
    else:
        return None
    return first.as_strided(shape, strides) if step > 0 else None


def _kind(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.untyped_storage().data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def bound(config: ForeignConfig, tensors: Tensors, device: torch.device, attention: str) -> Any:
    """The module of transformers whose parameters are `tensors` themselves.

    Args:
        attention: the name of its attention function, to transformers.

    Raises:
        CheckpointError: it needs other tensors, or a copy of them.
    """
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    kind = config.values["model_type"]
    # Which kernels run is for us to say, not for a checkpoint: such a key may name code to download.
    values = {key: value for key, value in config.values.items() if not key.endswith("_implementation")}
    settings = CONFIG_MAPPING[kind].from_dict(transformers.PreTrainedConfig._decode_special_floats(values))
    foreign.check(Reader(settings.to_dict()))  # now with transformers' defaults
    with InPlace():
        module, told = getattr(transformers, config.architecture).from_pretrained(
            None,
            config=settings,
            state_dict=dict(tensors),
            dtype=DTYPES[config.dtype],
            attn_implementation=attention,
            output_loading_info=True,
        )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        for name in sorted(map(str, told[what])):
            raise CheckpointError(f"tensor {name} is one of the {what.replace('_', ' ')} of {config.architecture}")
    _refuse_copies(config, module, tensors)
    for module_buffers in module.modules():
        for name, buffer in module_buffers.named_buffers(recurse=False):
            module_buffers._buffers[name] = buffer.to(device)
    return module.eval()


def _refuse_copies(config: ForeignConfig, module: Any, tensors: Tensors) -> None:
    ours = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    copied = {
        name: parameter.nbytes
        for name, parameter in module.named_parameters()
        if parameter.untyped_storage().data_ptr() not in ours
    }
    if sum(copied.values()) * COPIED > sum(tensor.nbytes for tensor in tensors.values()):
        raise CheckpointError(
            f"{config.architecture}: transformers wants a copy of {next(iter(copied))}, which is not supported"
        )


def tile(module: Any) -> None:
    """Lets a linear layer run on tiles, where their rows are known not to depend on one another."""
    if type(module) is torch.nn.Linear:
        weight_t = module.weight.t()
    elif type(module) is Conv1D:
        weight_t = module.weight
    else:
        return
    if weight_t.shape[0] % 4 == 0:
        module.forward = partial(_on_tiles, weight_t, module.bias)


def _on_tiles(weight_t: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    missing = padded(len(rows)) - len(rows)
    whole = torch.cat((rows, rows.new_zeros(missing, rows.shape[1]))) if missing else rows
    return tiled_linear(whole.contiguous(), weight_t, bias)[: len(rows)].view(*x.shape[:-1], -1)
