"""Mixtures of experts: Mixtral and Qwen3-MoE."""

from __future__ import annotations

from dataclasses import replace

from serverless_llm.engine.architectures.decoder import read_decoder, same_windows, switched_window
from serverless_llm.engine.architectures.description import Description, Experts, Names, QueryNorm
from serverless_llm.engine.architectures.reader import MOST_PARTS, Reader
from serverless_llm.errors import CheckpointError

MIXTRAL = Names(
    router="block_sparse_moe.gate",
    expert_up=("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3"),
    expert_down="block_sparse_moe.experts.{}.w2",
)
QWEN3 = Names(
    router="mlp.gate",
    expert_up=("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj"),
    expert_down="mlp.experts.{}.down_proj",
)


def mixtral(read: Reader) -> Description:
    made = read_decoder(read, "MixtralForCausalLM", eps=1e-5, theta=1e6)
    window = read.size_or_off("sliding_window", 0)
    count = read.size("num_local_experts", read.size("num_experts", 8, most=MOST_PARTS), most=MOST_PARTS)
    each = _each(read, count, 2)
    experts = Experts(count, each, made.intermediate, normalised=True)
    return replace(made, names=MIXTRAL, experts=experts, windows=same_windows(read, made.layers, window))


def qwen3_moe(read: Reader) -> Description:
    made = read_decoder(read, "Qwen3MoeForCausalLM")
    window = switched_window(read)
    bias = read.flag("attention_bias")
    count = read.size("num_experts", read.size("num_local_experts", 128, most=MOST_PARTS), most=MOST_PARTS)
    experts = Experts(
        count,
        _each(read, count, 8),
        read.size("moe_intermediate_size", 768),
        normalised=read.flag("norm_topk_prob"),
        dense=_dense(read, made.layers),
    )
    return replace(
        made,
        names=QWEN3,
        qkv_bias=bias,
        output_bias=bias,
        query_norm=QueryNorm.HEAD,
        experts=experts,
        windows=same_windows(read, made.layers, window),
    )


def _each(read: Reader, count: int, default: int) -> int:
    each = read.size("num_experts_per_tok", default)
    if each > count:
        raise CheckpointError(f"config.json: num_experts_per_tok {each} is more than the {count} experts")
    return each


def _dense(read: Reader, layers: int) -> frozenset[int]:
    listed = read.get("mlp_only_layers") or []
    if not isinstance(listed, list) or any(type(number) is not int for number in listed):
        raise CheckpointError(f"config.json: mlp_only_layers must be a list of layers, not {listed!r}")
    step = read.size("decoder_sparse_step", 1)
    return frozenset(number for number in range(layers) if number in listed or (number + 1) % step)
