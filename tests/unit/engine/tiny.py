"""Tiny random models for the engine's tests, and transformers as their oracle."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from serverless_llm.domain import FinishReason, Sampling
from serverless_llm.engine.config import Entries, ModelConfig
from serverless_llm.engine.engine import Engine
from serverless_llm.engine.sequence import SequenceStart

GREEDY = Sampling(temperature=0.0, max_tokens=12)
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
Tensors = dict[str, torch.Tensor]


def config_json(architecture: str = "LlamaForCausalLM", **keys: Any) -> dict[str, Any]:
    """A config.json of a model of a few hundred thousand weights; `keys` override."""
    base: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": "qwen3" if architecture == "Qwen3ForCausalLM" else "llama",
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
        "dtype": "float32",
    }
    return base | keys


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
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
    engine.activate(replica, tensors if planned is None else None)


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

    model_class = getattr(transformers, config["architectures"][0])
    model = model_class(model_class.config_class(**config)).float().eval()
    missing, unexpected = model.load_state_dict({k: v.float() for k, v in tensors.items()}, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


@torch.no_grad()
def oracle_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    """float32 [len(tokens), V], every token seen by attention."""
    ids = torch.tensor([tokens])
    logits: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    return logits


def assert_near_oracle(model: Any, tokens: list[int], generated: list[int], tolerance: float = 1e-4) -> None:
    """Teacher-forced: each chosen token's logit is within tolerance x max|logit| of the oracle's maximum."""
    logits = oracle_logits(model, tokens + generated)[len(tokens) - 1 : -1]
    for row, token in zip(logits, generated, strict=True):
        assert row.max() - row[token] <= tolerance * row.abs().max()
