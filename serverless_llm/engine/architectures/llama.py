"""Llama and its nearest kin: Mistral, Qwen2, Qwen3, Phi-3, OLMo 2."""

from __future__ import annotations

from dataclasses import replace

from serverless_llm.engine.architectures.decoder import read_decoder, read_windows, same_windows, switched_window
from serverless_llm.engine.architectures.description import Description, Names, Norm, QueryNorm
from serverless_llm.engine.architectures.reader import Reader

PHI3 = Names(qkv=("self_attn.qkv_proj",), up=("mlp.gate_up_proj",))
ORIGINAL_CONTEXT = 4096  # of a Phi-3 that does not say
OLMO2 = Names(
    before_attention=None,
    after_attention="post_attention_layernorm",
    before_mlp=None,
    after_mlp="post_feedforward_layernorm",
)


def llama(read: Reader) -> Description:
    made = read_decoder(read, "LlamaForCausalLM")
    bias = read.flag("attention_bias")
    return replace(
        made,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=read.flag("mlp_bias"),
        windows=same_windows(read, made.layers, _unused_window(read)),
    )


def _unused_window(read: Reader) -> int:
    """Llama has no window; one that is named may only be switched off."""
    used, window = read.flag("use_sliding_window", default=True), read.get("sliding_window")
    if used and window is not None:
        read.refuse("sliding_window")
    return 0


def mistral(read: Reader) -> Description:
    made = read_decoder(read, "MistralForCausalLM")
    return replace(made, windows=same_windows(read, made.layers, read.size_or_off("sliding_window", 4096)))


def qwen2(read: Reader) -> Description:
    made = read_decoder(read, "Qwen2ForCausalLM")
    return replace(made, qkv_bias=True, windows=_upper_windows(read, made.layers))


def qwen3(read: Reader) -> Description:
    made = read_decoder(read, "Qwen3ForCausalLM", head_dim=128)
    bias = read.flag("attention_bias")
    windows = _upper_windows(read, made.layers)
    return replace(made, qkv_bias=bias, output_bias=bias, query_norm=QueryNorm.HEAD, windows=windows)


def _upper_windows(read: Reader, layers: int) -> tuple[int, ...]:
    """Qwen's: layers from `max_window_layers` on, if at all."""
    window = switched_window(read)
    first = read.size_or_zero("max_window_layers", 28)
    return read_windows(read, layers, window, lambda number: number >= first)


def phi3(read: Reader) -> Description:
    for code in read.table("auto_map").values():  # the hub's Phi-3 carries a copy of what transformers has
        if code not in ("configuration_phi3.Phi3Config", "modeling_phi3.Phi3ForCausalLM"):
            read.refuse("auto_map")
    made = read_decoder(_as_longrope(read), "Phi3ForCausalLM", eps=1e-5, partial=True)
    window = read.size_or_off("sliding_window", 0)
    return replace(made, names=PHI3, windows=same_windows(read, made.layers, window))


def _as_longrope(read: Reader) -> Reader:
    """The first Phi-3 called it otherwise, and transformers takes the original context from this one place."""
    tables = {key: dict(read.table(key)) for key in ("rope_scaling", "rope_parameters")}
    for table in tables.values():
        if table.get("rope_type", table.get("type")) in ("su", "yarn"):
            table["rope_type"] = "longrope"
    original = read.get("original_max_position_embeddings") or ORIGINAL_CONTEXT
    return read.having(**tables, original_max_position_embeddings=original)


def olmo2(read: Reader) -> Description:
    made = read_decoder(read, "Olmo2ForCausalLM", eps=1e-5)
    bias = read.flag("attention_bias")
    return replace(
        made,
        names=OLMO2,
        qkv_bias=bias,
        output_bias=bias,
        norm=Norm.WIDE,
        query_norm=QueryNorm.WHOLE,
        windows=same_windows(read, made.layers, 0),
    )
