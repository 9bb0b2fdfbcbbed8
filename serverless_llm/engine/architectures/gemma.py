"""Gemma 2, and the text model of Gemma 3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from serverless_llm.engine.architectures.decoder import read_decoder, read_windows
from serverless_llm.engine.architectures.description import Description, Names, Norm, QueryNorm
from serverless_llm.engine.architectures.reader import Reader
from serverless_llm.engine.architectures.rope import rope_of
from serverless_llm.errors import CheckpointError
from serverless_llm.kernels.rope_kinds import Rope

NAMES = Names(
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)
KINDS = ("sliding_attention", "full_attention")


def gemma2(read: Reader) -> Description:
    made = _gemma(read, "Gemma2ForCausalLM", logit_cap=30.0)
    window = read.size_or_off("sliding_window", 4096)
    windows = read_windows(read, made.layers, window, lambda number: number % 2 == 0)
    return replace(made, score_cap=read.number_or_off("attn_logit_softcapping", 50.0), windows=windows)


def gemma3(read: Reader) -> Description:
    tables = read.table("rope_parameters")
    nested = bool(tables) and all(key in KINDS for key in tables)
    outer = read.having(rope_parameters=None) if nested else read
    made = _gemma(outer, "Gemma3ForCausalLM", logit_cap=0.0, theta=1e6)
    pattern = read.size("sliding_window_pattern", 6)
    window = read.size_or_off("sliding_window", 4096)
    local = rope_of(read, {}, made.head_dim, read.number("rope_local_base_freq", 10000.0))
    if nested:
        made = replace(made, rope=_rope(read, tables, "full_attention", made.head_dim, 1e6))
        local = _rope(read, tables, "sliding_attention", made.head_dim, 10000.0)
    if any(rope and rope.kind == "longrope" for rope in (made.rope, local)):
        raise CheckpointError("config.json: rope_type longrope is not supported in Gemma 3")
    windows = read_windows(read, made.layers, window, lambda number: bool((number + 1) % pattern))
    return replace(made, query_norm=QueryNorm.HEAD, local_rope=local, windows=windows)


def _rope(read: Reader, tables: Mapping[str, Any], kind: str, head_dim: int, theta: float) -> Rope:
    return rope_of(read, Reader(tables).table(kind), head_dim, theta)


def _gemma(read: Reader, architecture: str, logit_cap: float, theta: float = 1e4) -> Description:
    made = read_decoder(
        read, architecture, head_dim=256, theta=theta, tied=True, activation="hidden_activation",
        activates="gelu_pytorch_tanh",
    )  # fmt: skip
    if read.flag("use_bidirectional_attention"):
        read.refuse("use_bidirectional_attention")
    bias = read.flag("attention_bias")
    return replace(
        made,
        names=NAMES,
        qkv_bias=bias,
        output_bias=bias,
        norm=Norm.ONE_PLUS,
        embedding_scale=made.hidden**0.5,
        score_scale=read.number("query_pre_attn_scalar", 256) ** -0.5,
        logit_cap=read.number_or_off("final_logit_softcapping", logit_cap),
    )
