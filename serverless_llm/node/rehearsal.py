"""What every worker would otherwise do first, done once in the forkserver: a small model is placed, and says a token.

The first use of an operation costs a process milliseconds: a cold start should not pay them between its last byte and
its first token. So there is one model for each set of operations that native architectures have.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from serverless_llm.domain import Sampling
from serverless_llm.engine.config import ModelConfig
from serverless_llm.engine.engine import Engine
from serverless_llm.engine.sequence import SequenceStart

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"architectures": ["Gemma2ForCausalLM"], "sliding_window": 16},
    {"architectures": ["OPTForCausalLM"], "ffn_dim": 64},
    {
        "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
)  # fmt: skip
STORED = {"float32": ("F32", torch.float32), "bfloat16": ("BF16", torch.bfloat16)}


def rehearse() -> None:
    """One thread only: a pool of threads would not outlive the fork."""
    for dtype in STORED:
        for keys in KINDS:
            engine = Engine("cpu", budget=1 << 20)
            engine.warm()
            _run(engine, ModelConfig.parse(CONFIG | keys, dtype))


def _run(engine: Engine, model: ModelConfig) -> None:
    name, stored = STORED[model.dtype]
    engine.place(1, model, {tensor: (name, shape) for tensor, shape in model.tensors().items()}, kv_floor=0)
    engine.activate(1, {tensor: _view(shape, stored) for tensor, shape in model.tensors().items()})
    prompt, nothing = np.arange(20, dtype=np.int32), np.empty(0, np.int32)
    engine.add(SequenceStart(1, 1, 1, prompt, nothing, Sampling(temperature=0.0, max_tokens=2)))
    engine.add(SequenceStart(2, 1, 1, prompt, nothing, Sampling(temperature=1.0, max_tokens=2)))
    while engine.runnable:
        engine.step()


def _view(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros, made as the loader makes its views."""
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.frombuffer(bytearray(count), dtype=torch.uint8).view(dtype).view(shape)
