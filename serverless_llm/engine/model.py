"""Llama and Qwen3: one step's tokens in, logits out. The weights are views, bound by name.

Shape letters: T rows of the step (tokens, padded to whole tiles in deterministic mode), H hidden, A heads, G KV heads,
D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812

from serverless_llm.domain import BLOCK_TOKENS
from serverless_llm.engine.arena import Arena
from serverless_llm.engine.config import EMBEDDING, HEAD, ModelConfig
from serverless_llm.kernels.linear import silu_gate, tiled_linear
from serverless_llm.kernels.norm import rms_norm
from serverless_llm.kernels.rope import frequencies, rotate, table

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROPE_CHUNK = 1024  # positions by which the tables grow: a fixed shape, so that a position's bits never change

Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
Attention = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


class Projection(NamedTuple):
    """`weight`: [in, out], the transposed view of what is stored."""

    weight: torch.Tensor
    bias: torch.Tensor | None


class Layer(NamedTuple):
    """`qkv` and `gate_up` are one fused projection each, or one for each part."""

    input_norm: torch.Tensor
    qkv: list[Projection]
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    output: Projection
    post_norm: torch.Tensor
    gate_up: list[Projection]
    down: Projection


class StepInput(NamedTuple):
    """One batch on the device.

    Attributes:
        ids, position: int64 [T].
        length: one past the highest position.
        tokens: rows of T that are tokens, the others are padding.
        slots: int64 [tokens], where each token's K of layer 0 goes, in rows of one token in the arena.
        drawn: int64, the rows whose logits are wanted, padded like T.
        attend: (q [T, A, D], arena as `kernels.attention` sees it, layer) -> [T, A * D].
    """

    ids: torch.Tensor
    position: torch.Tensor
    length: int
    tokens: int
    slots: torch.Tensor
    drawn: torch.Tensor
    attend: Attention


def plain_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """As `tiled_linear`, in one product of any number of rows."""
    return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)


def plain_gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate).mul_(up)


class Model:
    """One model bound to its weights and to the arena where its KV lies.

    Args:
        tensors: every tensor of the config, in the served dtype, on the arena's device.
        fused: QKV and gate-up rows are adjacent in one storage, and are multiplied at once.
        tiled: deterministic mode.
    """

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, torch.Tensor], arena: Arena, fused: bool, tiled: bool
    ) -> None:
        self.config = config
        self.tiled = tiled
        self._linear: Linear = tiled_linear if tiled else plain_linear
        self._gate = silu_gate if tiled else plain_gate
        self._embedding = tensors[EMBEDDING]
        self._head = Projection(tensors[EMBEDDING if config.tied else HEAD].t(), None)
        self._norm = tensors["model.norm.weight"]
        self._layers = [_bind(config, tensors, f"model.layers.{n}.", fused) for n in range(config.layers)]
        dtype, width = DTYPES[config.dtype], config.kv_heads * config.head_dim
        self._kv = arena.rows(dtype, 2, BLOCK_TOKENS, config.kv_heads, config.head_dim)
        self._kv_tokens = self._kv.view(-1, width)
        rope = config.rope
        self._frequency = frequencies(
            rope.theta, config.head_dim, rope.kind, rope.factor, rope.low_freq_factor, rope.high_freq_factor,
            rope.original_context,
        )  # fmt: skip
        empty = self._kv.new_empty(0, config.head_dim)
        self._cosine, self._sine = empty, empty

    @torch.inference_mode()
    def forward(self, step: StepInput) -> torch.Tensor:
        """Runs all layers over the step's tokens and writes their KV; float32 logits [rows of `drawn`, V]."""
        config = self.config
        cosine, sine = self._angles(step.position, step.length)
        x = self._embedding.index_select(0, step.ids)
        for number, layer in enumerate(self._layers):
            q, k, v = self._qkv(rms_norm(x, layer.input_norm, config.rms_eps), layer)
            q, k = rotate(q, cosine, sine), rotate(k, cosine, sine)
            self._store(k, v, step, number)
            x = self._linear(step.attend(q, self._kv, number), *layer.output).add_(x)
            x = self._mlp(rms_norm(x, layer.post_norm, config.rms_eps), layer).add_(x)
        if not step.drawn.numel():
            return x.new_empty(0, config.vocab, dtype=torch.float32)
        last = rms_norm(x.index_select(0, step.drawn), self._norm, config.rms_eps)
        return self._linear(last, *self._head).float()

    def _qkv(self, x: torch.Tensor, layer: Layer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        config = self.config
        heads = (config.heads, config.kv_heads, config.kv_heads)
        parts = self._project(x, layer.qkv, [count * config.head_dim for count in heads])
        q, k, v = (part.reshape(-1, count, config.head_dim) for part, count in zip(parts, heads, strict=True))
        if layer.q_norm is not None and layer.k_norm is not None:
            return rms_norm(q, layer.q_norm, config.rms_eps), rms_norm(k, layer.k_norm, config.rms_eps), v
        return q, k, v

    def _mlp(self, x: torch.Tensor, layer: Layer) -> torch.Tensor:
        gate, up = self._project(x, layer.gate_up, [self.config.intermediate] * 2)
        return self._linear(self._gate(gate, up), *layer.down)

    def _project(self, x: torch.Tensor, projections: list[Projection], widths: list[int]) -> list[torch.Tensor]:
        outs = [self._linear(x, *projection) for projection in projections]
        return outs if len(outs) == len(widths) else list(outs[0].split_with_sizes(widths, dim=-1))

    def _store(self, k: torch.Tensor, v: torch.Tensor, step: StepInput, layer: int) -> None:
        width = self._kv_tokens.shape[1]
        slots = step.slots + 2 * BLOCK_TOKENS * layer
        self._kv_tokens.index_copy_(0, slots, k[: step.tokens].reshape(-1, width))
        self._kv_tokens.index_copy_(0, slots + BLOCK_TOKENS, v[: step.tokens].reshape(-1, width))

    def _angles(self, position: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and signed sine, [T, 1, D]."""
        while self._cosine.shape[0] < length:
            cosine, sine = table(self._frequency, self._cosine.shape[0], ROPE_CHUNK)
            self._cosine = torch.cat((self._cosine, cosine.to(self._cosine)))
            self._sine = torch.cat((self._sine, sine.to(self._sine)))
        return self._cosine.index_select(0, position)[:, None], self._sine.index_select(0, position)[:, None]


def _bind(config: ModelConfig, tensors: Mapping[str, torch.Tensor], prefix: str, fused: bool) -> Layer:
    def projections(*names: str) -> list[Projection]:
        weights = [tensors[f"{prefix}{name}.weight"] for name in names]
        biases = [tensors[f"{prefix}{name}.bias"] for name in names if f"{prefix}{name}.bias" in tensors]
        if fused:
            weights, biases = [_adjacent(weights)], [_adjacent(biases)] if biases else []
        return [Projection(weight.t(), biases[n] if biases else None) for n, weight in enumerate(weights)]

    norm = f"{prefix}self_attn.%s_norm.weight"
    return Layer(
        input_norm=tensors[f"{prefix}input_layernorm.weight"],
        qkv=projections("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        q_norm=tensors[norm % "q"] if config.qk_norm else None,
        k_norm=tensors[norm % "k"] if config.qk_norm else None,
        output=projections("self_attn.o_proj")[0],
        post_norm=tensors[f"{prefix}post_attention_layernorm.weight"],
        gate_up=projections("mlp.gate_proj", "mlp.up_proj"),
        down=projections("mlp.down_proj")[0],
    )


def _adjacent(parts: list[torch.Tensor]) -> torch.Tensor:
    """One view over tensors whose rows follow each other in the arena."""
    rows = sum(part.shape[0] for part in parts)
    return parts[0].as_strided((rows, *parts[0].shape[1:]), parts[0].stride())
