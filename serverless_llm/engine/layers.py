"""One layer's weights, bound by name to what runs on them. Decided once, at load.

Shape letters as in `engine.model`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch

from serverless_llm.engine.architectures.description import Activation, Description, Norm, Product, QueryNorm
from serverless_llm.engine.kv_groups import Place
from serverless_llm.kernels.activation import (
    gelu_tanh_gate,
    plain_gelu_tanh_gate,
    plain_silu_gate,
    relu_gate,
    silu_gate,
)
from serverless_llm.kernels.norm import layer_norm, rms_norm, wide_rms_norm

Tensors = Mapping[str, torch.Tensor]
NormCall = Callable[[torch.Tensor], torch.Tensor]
Activate = Callable[..., torch.Tensor]  # gate and up, or up alone; overwrites the first

TILED_GATES: dict[Activation, Activate] = {
    Activation.SILU: silu_gate,
    Activation.GELU_TANH: gelu_tanh_gate,
    Activation.RELU: relu_gate,
}
PLAIN_GATES: dict[Activation, Activate] = {
    Activation.SILU: plain_silu_gate,
    Activation.GELU_TANH: plain_gelu_tanh_gate,
    Activation.RELU: relu_gate,
}


class Projection(NamedTuple):
    """`weight`: [in, out], the transposed view of what is stored."""

    weight: torch.Tensor
    bias: torch.Tensor | None


class Mlp(NamedTuple):
    """`up`: one fused projection, or one for each part of `widths`."""

    up: list[Projection]
    widths: list[int]
    down: Projection


class Layer(NamedTuple):
    """`qkv`: one fused projection, or one for each part. `mlps`: one, or all experts, and then `router` is there.

    Attributes:
        place: where its K and V are.
        local: it is turned by the local rotary embedding.
    """

    before_attention: NormCall | None
    after_attention: NormCall | None
    above_attention: NormCall | None
    before_mlp: NormCall | None
    after_mlp: NormCall | None
    above_mlp: NormCall | None
    query_norm: NormCall | None
    key_norm: NormCall | None
    qkv: list[Projection]
    output: Projection
    router: Projection | None
    mlps: list[Mlp]
    place: Place
    local: bool


def activation(config: Description, tiled: bool) -> Activate:
    """What stands between the products of an MLP."""
    if config.mlp_gated:
        return (TILED_GATES if tiled else PLAIN_GATES)[config.activation]
    assert config.activation is Activation.RELU, config.activation
    return torch.relu_


def bind_layer(config: Description, tensors: Tensors, number: int, place: Place, fused: bool) -> Layer:
    """`fused`: rows of one product are adjacent in one storage, and are multiplied at once."""
    layer = config.layer(number)
    normed = config.query_norm is not QueryNorm.NONE
    before_attention, after_attention, above_attention, before_mlp, after_mlp, above_mlp = (
        None if name is None else bind_norm(config, tensors, name) for name in layer.norms()
    )
    return Layer(
        before_attention=before_attention,
        after_attention=after_attention,
        above_attention=above_attention,
        before_mlp=before_mlp,
        after_mlp=after_mlp,
        above_mlp=above_mlp,
        query_norm=bind_norm(config, tensors, layer.query_norm) if normed else None,
        key_norm=bind_norm(config, tensors, layer.key_norm) if normed else None,
        qkv=bind(tensors, layer.qkv, fused),
        output=bind(tensors, layer.output, fused)[0],
        router=bind(tensors, layer.router, fused)[0] if layer.router else None,
        mlps=[
            Mlp(bind(tensors, mlp.up, fused), _widths(config, mlp.up), bind(tensors, mlp.down, fused)[0])
            for mlp in layer.mlps
        ],
        place=place,
        local=config.local_rope is not None and config.windows[number] > 0,
    )


def _widths(config: Description, up: Product) -> list[int]:
    parts = 2 if config.mlp_gated else 1
    return [sum(up.rows) // parts] * parts


def bind(tensors: Tensors, product: Product, fused: bool) -> list[Projection]:
    weights = [tensors[f"{name}.weight"] for name in product.names]
    biases = [tensors[f"{name}.bias"] for name in product.names] if product.bias else []
    if fused:
        weights, biases = [_adjacent(weights)], [_adjacent(biases)] if biases else []
    return [Projection(weight.t(), biases[n] if biases else None) for n, weight in enumerate(weights)]


def _adjacent(parts: list[torch.Tensor]) -> torch.Tensor:
    """One view over tensors whose rows follow each other in the arena."""
    rows = sum(part.shape[0] for part in parts)
    return parts[0].as_strided((rows, *parts[0].shape[1:]), parts[0].stride())


def bind_norm(config: Description, tensors: Tensors, name: str) -> NormCall:
    weight = tensors[f"{name}.weight"]
    if config.norm is Norm.LAYER:
        return partial(layer_norm, weight=weight, bias=tensors[f"{name}.bias"], eps=config.eps)
    if config.norm is Norm.ONE_PLUS:
        return partial(wide_rms_norm, weight=weight.float() + 1, eps=config.eps)
    if config.norm is Norm.WIDE:
        return partial(wide_rms_norm, weight=weight.float(), eps=config.eps)
    return partial(rms_norm, weight=weight, eps=config.eps)
