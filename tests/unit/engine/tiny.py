"""Tiny random models for the engine's tests, and transformers as their oracle."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import torch

from serverless_llm.domain import FinishReason, Sampling
from serverless_llm.engine.architectures.registry import NATIVE
from serverless_llm.engine.config import Entries, ModelConfig
from serverless_llm.engine.engine import Engine
from serverless_llm.engine.sequence import SequenceStart

GREEDY = Sampling(temperature=0.0, max_tokens=12)
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
Tensors = dict[str, torch.Tensor]


MODEL_TYPES = {one.name: one.model_type for one in NATIVE}


def config_json(architecture: str = "LlamaForCausalLM", **keys: Any) -> dict[str, Any]:
    """A config.json of a model of a few hundred thousand weights; `keys` override."""
    base: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": MODEL_TYPES[architecture],
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "pad_token_id": None,
        "dtype": "float32",
    }
    return base | EXTRA.get(architecture, {}) | keys


GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 24, "sliding_window": 40, "head_dim": 16}
GEMMA |= {"tie_word_embeddings": True}
EXTRA: dict[str, dict[str, Any]] = {
    "MistralForCausalLM": {"sliding_window": None},
    "Gemma2ForCausalLM": GEMMA | {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 4.0},
    "Gemma3ForCausalLM": GEMMA | {"sliding_window_pattern": 3, "num_hidden_layers": 4, "rope_theta": 1e6},
    "OPTForCausalLM": {"ffn_dim": 96, "activation_function": "relu", "num_key_value_heads": 4, "dropout": 0.0},
    "MixtralForCausalLM": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "Qwen3MoeForCausalLM": {
        "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 36, "norm_topk_prob": True,
    },
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * pair for pair in range(8)],
    "long_factor": [2.0 + 0.5 * pair for pair in range(8)],
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": config_json(),
    "llama-all-heads": config_json(num_key_value_heads=4),
    "llama-one-kv-head": config_json(num_key_value_heads=1, head_dim=24),
    "llama-tied": config_json(tie_word_embeddings=True),
    "llama-bias": config_json(attention_bias=True, mlp_bias=True),
    "llama-llama3-rope": config_json(rope_scaling=LLAMA3_ROPE, rope_theta=500000.0),
    "llama-linear-rope": config_json(rope_scaling={"type": "linear", "factor": 2.0}),
    "llama-rope-parameters": config_json(rope_parameters={"rope_type": "default", "rope_theta": 5000.0}),
    "qwen3": config_json("Qwen3ForCausalLM"),
    "qwen3-tied": config_json("Qwen3ForCausalLM", tie_word_embeddings=True, head_dim=32),
    "qwen3-bias": config_json("Qwen3ForCausalLM", attention_bias=True),
    "qwen2": config_json("Qwen2ForCausalLM"),
    "qwen2-upper-windows": config_json(
        "Qwen2ForCausalLM", use_sliding_window=True, sliding_window=20, max_window_layers=1, tie_word_embeddings=True
    ),
    "mistral": config_json("MistralForCausalLM"),
    "mistral-window": config_json("MistralForCausalLM", sliding_window=24),
    "phi3": config_json("Phi3ForCausalLM", sliding_window=50),
    "phi3-partial": config_json("Phi3ForCausalLM", partial_rotary_factor=0.75),
    "phi3-longrope": config_json("Phi3ForCausalLM", original_max_position_embeddings=40, rope_scaling=LONGROPE),
    "olmo2": config_json("Olmo2ForCausalLM"),
    "olmo2-bias": config_json("Olmo2ForCausalLM", attention_bias=True, num_key_value_heads=4),
    "gemma2": config_json("Gemma2ForCausalLM"),
    "gemma2-uncapped": config_json("Gemma2ForCausalLM", attn_logit_softcapping=None, final_logit_softcapping=None),
    "gemma3": config_json("Gemma3ForCausalLM", rope_scaling={"rope_type": "linear", "factor": 8.0}),
    "gemma3-nested-rope": config_json(
        "Gemma3ForCausalLM",
        layer_types=["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
    ),
    "opt": config_json("OPTForCausalLM"),
    "opt-350m": config_json("OPTForCausalLM", do_layer_norm_before=False, word_embed_proj_dim=32),
    "opt-plain": config_json("OPTForCausalLM", enable_bias=False, tie_word_embeddings=True),
    "mixtral": config_json("MixtralForCausalLM"),
    "qwen3-moe": config_json("Qwen3MoeForCausalLM"),
    "qwen3-moe-dense-layer": config_json(
        "Qwen3MoeForCausalLM", norm_topk_prob=False, mlp_only_layers=[0], num_hidden_layers=3, attention_bias=True
    ),
    "llama-dynamic-rope": config_json(rope_scaling={"type": "dynamic", "factor": 4.0}),
    "llama-yarn-rope": config_json(rope_scaling=YARN),
    "qwen2-yarn-parameters": config_json(
        "Qwen2ForCausalLM",
        rope_parameters=YARN | {"rope_theta": 3e4, "mscale": 1.0, "mscale_all_dim": 0.6, "truncate": False},
    ),
    "llama-longrope": config_json(rope_parameters=LONGROPE | {"original_max_position_embeddings": 40, "factor": 8.0}),
}


def tensors_of(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensors:
    """Random weights, wide enough that attention decides what the model says."""
    random = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in config.tensors().items():
        noise = torch.randn(shape, generator=random)
        scale = 1.0 if "embed" in name else shape[-1] ** -0.5
        made[name] = (1 + 0.1 * noise if "norm" in name else 2 * scale * noise).to(dtype)
    return made


def entries_of(tensors: Mapping[str, torch.Tensor]) -> Entries:
    return {name: (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


def serve(engine: Engine, config: ModelConfig, tensors: Tensors, replica: int = 1, kv_floor: int = 0) -> None:
    """Places and activates a replica, as an uploader would in copy mode."""
    planned = engine.place(replica, config, entries_of(tensors), kv_floor)
    for dest in planned or ():
        raw = tensors[dest.tensor].contiguous().view(-1).view(torch.uint8)
        engine.arena[dest.offset : dest.offset + dest.stop - dest.start] = raw[dest.start : dest.stop]
    if planned is None:
        fill(engine, tensors, replica)
    engine.activate(replica, tensors)


def fill(engine: Engine, tensors: Tensors, replica: int = 1) -> None:
    """Writes what the device holds of a replica otherwise than its files."""
    for name, target in engine.targets(replica).items():
        target.copy_(tensors[name])


def prompt(length: int, seed: int = 0, vocab: int = 160) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, vocab, length)]


def start(
    sequence: int,
    tokens: list[int],
    sampling: Sampling = GREEDY,
    replica: int = 1,
    generated: Iterable[int] = (),
    epoch: int = 0,
) -> SequenceStart:
    past = np.array(list(generated), dtype=np.int32)
    return SequenceStart(sequence, epoch, replica, np.array(tokens, dtype=np.int32), past, sampling)


Outcome = tuple[list[int], FinishReason | None]


def drain(engine: Engine, steps: int = 10_000) -> dict[int, Outcome]:
    """Runs until nothing is left (or so many steps), invariants checked after each: tokens and finish by sequence."""
    told: dict[int, Outcome] = {}
    while engine.runnable and steps:
        steps -= 1
        for sequence, _, tokens, finish in engine.step().tokens:
            told[sequence] = (told.get(sequence, ([], None))[0] + tokens, finish)
        engine.check_invariants()
    return told


def oracle(config: dict[str, Any], tensors: Tensors) -> Any:
    """The transformers model of the same weights, float32."""
    import transformers

    config = deepcopy(config)  # transformers writes into its tables
    model_class = getattr(transformers, config["architectures"][0])
    # It softcaps nothing in its other implementations.
    model = model_class(model_class.config_class(**config | {"attn_implementation": "eager"})).float().eval()
    missing, unexpected = model.load_state_dict(packed({k: v.float() for k, v in tensors.items()}), strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


EXPERT = re.compile(r"(.*\.)(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
PACKED = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}


def packed(tensors: Tensors) -> Tensors:
    """The names that transformers has in memory for what checkpoints hold: experts are one tensor."""
    whole = {name.replace("block_sparse_moe.gate", "mlp.gate"): t for name, t in tensors.items()}
    parts: dict[tuple[str, str], list[torch.Tensor]] = {}
    for name in tensors:
        if found := EXPERT.match(name):
            parts.setdefault((found[1], PACKED[found[3]]), []).append(whole.pop(name))
    for (prefix, part), experts in parts.items():
        if part == "gate":
            both = [torch.cat(pair) for pair in zip(experts, parts[prefix, "up"], strict=True)]
            whole[f"{prefix}mlp.experts.gate_up_proj"] = torch.stack(both)
        elif part == "down":
            whole[f"{prefix}mlp.experts.down_proj"] = torch.stack(experts)
    return whole


@torch.no_grad()
def oracle_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    """float32 [len(tokens), V], every token seen by attention."""
    ids = torch.tensor([tokens])
    logits: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    return logits


def assert_near_oracle(
    model: Any, tokens: list[int], generated: list[int], tolerance: float = 1e-4, switch: int = 0
) -> None:
    """Teacher-forced: each chosen token's logit is within tolerance x max|logit| of the oracle's maximum.

    `switch`: tokens beyond which the model sees all of the text in another way; 0 where it never does.
    """
    whole, begin = tokens + generated, len(tokens) - 1
    rows = list(oracle_logits(model, whole)[begin:-1])
    for number in range(min(max(0, switch - begin), len(generated))):
        rows[number] = oracle_logits(model, whole[: len(tokens) + number])[-1]
    for row, token in zip(rows, generated, strict=True):
        assert row.max() - row[token] <= tolerance * row.abs().max()
