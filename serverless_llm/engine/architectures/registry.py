"""From a config.json to the architecture that it names: the one place that knows which decoders are native."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from serverless_llm.engine.architectures import gemma, llama, mixtures, opt
from serverless_llm.engine.architectures.description import Description
from serverless_llm.engine.architectures.reader import Reader
from serverless_llm.errors import CheckpointError


class Architecture(NamedTuple):
    """A decoder that the engine computes itself. `read`: config.json to its description, or CheckpointError."""

    name: str
    model_type: str
    read: Callable[[Reader], Description]


NATIVE = (
    Architecture("LlamaForCausalLM", "llama", llama.llama),
    Architecture("MistralForCausalLM", "mistral", llama.mistral),
    Architecture("Qwen2ForCausalLM", "qwen2", llama.qwen2),
    Architecture("Qwen3ForCausalLM", "qwen3", llama.qwen3),
    Architecture("Phi3ForCausalLM", "phi3", llama.phi3),
    Architecture("Olmo2ForCausalLM", "olmo2", llama.olmo2),
    Architecture("Gemma2ForCausalLM", "gemma2", gemma.gemma2),
    Architecture("Gemma3ForCausalLM", "gemma3_text", gemma.gemma3),
    Architecture("OPTForCausalLM", "opt", opt.opt),
    Architecture("MixtralForCausalLM", "mixtral", mixtures.mixtral),
    Architecture("Qwen3MoeForCausalLM", "qwen3_moe", mixtures.qwen3_moe),
)

# Keys of config.json that change the mathematics where they are set, in one architecture or another. One that the
# architecture at hand does not read must not be set. (Not so biases: the tensors themselves tell of them.)
FOREIGN = (
    "quantization_config", "compression_config", "auto_map", "attn_logit_softcapping", "final_logit_softcapping",
    "query_pre_attn_scalar", "logit_scale", "logits_scaling", "embedding_multiplier", "residual_multiplier",
    "attention_multiplier", "num_experts", "num_local_experts", "n_routed_experts", "no_rope_layers", "scale_depth",
    "scale_emb", "use_mrope", "vision_config", "audio_config", "kv_lora_rank", "q_lora_rank", "num_kv_shared_layers",
    "use_qk_norm", "qk_layernorm", "sliding_window", "layer_types", "use_bidirectional_attention", "clip_qkv",
    "attention_chunk_size", "attention_sinks", "alibi", "parallel_attn", "use_parallel_residual", "multi_query",
    "is_encoder_decoder", "add_cross_attention", "n_shared_experts",
    "shared_expert_intermediate_size", "first_k_dense_replace", "rope_interleaved", "scale_attn_by_inverse_layer_idx",
    "nope_layer_interval", "mamba_d_state", "ssm_state_size", "residual_scale", "lm_head_bias", "pruned_heads",
    "partial_rotary_factor", "rotary_pct", "rope_local_base_freq",
)  # fmt: skip


def native(config: Mapping[str, Any]) -> Architecture | None:
    """The native architecture that config.json names, None where it is another or none."""
    names, kind = config.get("architectures"), config.get("model_type")
    for one in NATIVE:
        if names == [one.name] or (names is None and kind == one.model_type):
            return one
    return None


def describe(config: Mapping[str, Any]) -> Description:
    """The mathematics that config.json asks for.

    Raises:
        CheckpointError: names the key that is missing, malformed, or asks for mathematics that is not here.
    """
    architecture = native(config)
    if architecture is None:
        names = ", ".join(one.name for one in NATIVE)
        asked = config.get("architectures")
        raise CheckpointError(
            f"config.json: architectures {asked!r} is not served, only {names}, and most decoders of transformers"
        )
    if config.get("model_type", architecture.model_type) != architecture.model_type:
        raise CheckpointError(
            f"config.json: model_type {config['model_type']!r} is not that of {architecture.name}, which is "
            f"{architecture.model_type}"
        )
    read = Reader(config)
    description = architecture.read(read)
    if config.get("is_causal") is False:
        read.refuse("is_causal")
    for key in FOREIGN:
        if key not in read.used and config.get(key) not in (None, False, {}, []):
            read.refuse(key)
    return description
