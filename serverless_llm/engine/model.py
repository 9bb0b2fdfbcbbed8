"""A decoder: one step's tokens in, logits out. The weights are views, bound by name.

Shape letters: T rows of the step (tokens, padded to whole tiles in deterministic mode), H hidden, A heads, G KV heads,
D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from serverless_llm.domain import BLOCK_TOKENS
from serverless_llm.engine.architectures.description import QueryNorm
from serverless_llm.engine.arena import Arena
from serverless_llm.engine.config import ModelConfig
from serverless_llm.engine.layers import Layer, Mlp, Projection, Tensors, activation, bind_layer, bind_norm
from serverless_llm.engine.rotary import Rotary
from serverless_llm.kernels.activation import soft_cap
from serverless_llm.kernels.attention import Scores
from serverless_llm.kernels.experts import mix, route
from serverless_llm.kernels.linear import padded, tiled_linear
from serverless_llm.kernels.rope import rotate, rotate_part

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
Attention = Callable[..., torch.Tensor]
Angles = tuple[torch.Tensor, torch.Tensor]


class StepInput(NamedTuple):
    """One batch on the device.

    Attributes:
        ids: int64 [T].
        position: int64 [T], rows in the model's table of positions.
        length: one past the highest position.
        tokens: rows of T that are tokens, the others are padding.
        slots: for each of the model's KV groups: int64 [tokens], where each token's K of its first layer goes, in rows
            of one token in the arena.
        drawn: int64, the rows whose logits are wanted, padded like T.
        attend: for each of the model's views: (q [T, A, D], arena as `kernels.attention` sees it, number of a layer
            in a block, its `sinks_A` if it has some) -> [T, A * D].
    """

    ids: torch.Tensor
    position: torch.Tensor
    length: int
    tokens: int
    slots: list[torch.Tensor]
    drawn: torch.Tensor
    attend: list[Attention]


def plain_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """As `tiled_linear`, in one product of any number of rows."""
    return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)


class Model:
    """One model bound to its weights and to the arena where its KV lies.

    Args:
        tensors: every tensor of the config, in the served dtype, on the arena's device.
        fused: rows of QKV and of gate-up are adjacent in one storage, and are multiplied at once.
        tiled: deterministic mode.

    Attributes:
        views: what its layers attend to.
        scores: how attention scores are made.
    """

    def __init__(self, config: ModelConfig, tensors: Tensors, arena: Arena, fused: bool, tiled: bool) -> None:
        names = config.names
        self.config = config
        self.tiled = tiled
        self.views = config.kv_groups.views()
        self.scores = Scores(config.score_scale, config.score_cap)
        self._linear: Linear = tiled_linear if tiled else plain_linear
        self._activate = activation(config, tiled)
        self._embedding = tensors[f"{names.embedding}.weight"]
        self._positions = tensors[f"{names.positions}.weight"] if names.positions else None
        self._inward, self._outward = (
            Projection(tensors[f"{name}.weight"].t(), None) if name else None for name in (names.inward, names.outward)
        )
        self._head = Projection(tensors[f"{names.embedding if config.tied else names.head}.weight"].t(), None)
        self._norm = bind_norm(config, tensors, names.last_norm) if names.last_norm else None
        self._layers = [
            bind_layer(config, tensors, number, place, fused) for number, place in enumerate(config.kv_groups.places)
        ]
        self._widths = [heads * config.head_dim for heads in (config.heads, config.kv_heads, config.kv_heads)]
        self._whole = config.query_norm is QueryNorm.WHOLE
        dtype, width = DTYPES[config.dtype], config.kv_heads * config.head_dim
        # The reference rounds the scale to the served dtype.
        self._scale = float(torch.tensor(config.embedding_scale, dtype=dtype))
        self._kv = arena.rows(dtype, 2, BLOCK_TOKENS, config.kv_heads, config.head_dim)
        self._kv_tokens = self._kv.view(-1, width)
        self._rotaries = [Rotary(rope, self._kv) for rope in (config.rope, config.local_rope) if rope]
        self._rotate = rotate if config.rope and config.rope.dim == config.head_dim else rotate_part

    @torch.inference_mode()
    def forward(self, step: StepInput) -> torch.Tensor:
        """Runs all layers over the step's tokens and writes their KV; float32 logits [rows of `drawn`, V]."""
        angles = [rotary.angles(step.position, step.length) for rotary in self._rotaries]
        x = self._embed(step)
        for layer in self._layers:
            group, slot = layer.place
            said = x if layer.before_attention is None else layer.before_attention(x)
            q, k, v = self._qkv(said, layer)
            if angles:
                cosine, sine = angles[layer.local]
                q, k = self._rotate(q, cosine, sine), self._rotate(k, cosine, sine)
            self._store(k[: step.tokens], v[: step.tokens], step.slots[group] + 2 * BLOCK_TOKENS * slot)
            said = self._linear(step.attend[group](q, self._kv, slot), *layer.output)
            x = (said if layer.after_attention is None else layer.after_attention(said)).add_(x)
            x = x if layer.above_attention is None else layer.above_attention(x)
            said = x if layer.before_mlp is None else layer.before_mlp(x)
            said = self._mlp(said, layer.mlps[0]) if layer.router is None else self._mixture(said, layer, step.tokens)
            x = (said if layer.after_mlp is None else layer.after_mlp(said)).add_(x)
            x = x if layer.above_mlp is None else layer.above_mlp(x)
        if not step.drawn.numel():
            return x.new_empty(0, self.config.vocab, dtype=torch.float32)
        return self._logits(x.index_select(0, step.drawn))

    def _embed(self, step: StepInput) -> torch.Tensor:
        x = self._embedding.index_select(0, step.ids)
        if self._scale != 1:
            x.mul_(self._scale)
        if self._inward is not None:
            x = self._linear(x, *self._inward)
        if self._positions is not None:
            x.add_(self._positions.index_select(0, step.position + self.config.position_offset))
        return x

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        if self._norm is not None:
            x = self._norm(x)
        if self._outward is not None:
            x = self._linear(x, *self._outward)
        logits = self._linear(x, *self._head).float()
        return soft_cap(logits, self.config.logit_cap) if self.config.logit_cap else logits

    def _qkv(self, x: torch.Tensor, layer: Layer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = self._project(x, layer.qkv, self._widths)
        size = self.config.head_dim
        if layer.query_norm is None or layer.key_norm is None:
            return q.reshape(-1, self.config.heads, size), k.reshape(-1, self.config.kv_heads, size), v
        if self._whole:
            q, k = layer.query_norm(q), layer.key_norm(k)
        q, k = q.reshape(-1, self.config.heads, size), k.reshape(-1, self.config.kv_heads, size)
        return (q, k, v) if self._whole else (layer.query_norm(q), layer.key_norm(k), v)

    def _mlp(self, x: torch.Tensor, mlp: Mlp) -> torch.Tensor:
        return self._linear(self._activate(*self._project(x, mlp.up, mlp.widths)), *mlp.down)

    def _mixture(self, x: torch.Tensor, layer: Layer, tokens: int) -> torch.Tensor:
        """The layer's experts, for the rows that are tokens."""
        assert self.config.experts and layer.router
        each, normalised = self.config.experts.each, self.config.experts.normalised
        routes = route(self._linear(x, *layer.router)[:tokens], each, normalised)
        return mix(x, routes, len(layer.mlps), partial(self._expert, layer.mlps))

    def _expert(self, mlps: list[Mlp], number: int, x: torch.Tensor) -> torch.Tensor:
        rows = len(x)
        if self.tiled and rows % padded(1):
            x = torch.cat((x, x.new_zeros(padded(rows) - rows, x.shape[1])))
        return self._mlp(x, mlps[number])[:rows]

    def _project(self, x: torch.Tensor, projections: list[Projection], widths: list[int]) -> list[torch.Tensor]:
        outs = [self._linear(x, *projection) for projection in projections]
        return outs if len(outs) == len(widths) else list(outs[0].split_with_sizes(widths, dim=-1))

    def _store(self, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        width = self._kv_tokens.shape[1]
        self._kv_tokens.index_copy_(0, slots, k.reshape(-1, width))
        self._kv_tokens.index_copy_(0, slots + BLOCK_TOKENS, v.reshape(-1, width))
