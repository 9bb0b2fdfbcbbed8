"""Shapes of well-known models that can be served, and the tensors that each consists of.

A shape is the hub's `config.json` less its token ids (those are the byte-level tokenizer's, see `tokenizer.py`).
The `tiny-*` shapes are for tests: a few hundred kB each, and weights wide enough (`initializer_range`) that
attention decides what a random model says.
"""

import difflib
from typing import Any, NamedTuple

from serverless_llm.demo.tokenizer import VOCABULARY
from serverless_llm.engine.architectures.description import Norm
from serverless_llm.engine.architectures.registry import NATIVE
from serverless_llm.engine.config import ModelConfig

Shape = dict[str, Any]


class TensorShape(NamedTuple):
    """A tensor of a checkpoint; `fill`: what all its numbers are, None where they are random."""

    name: str
    shape: tuple[int, ...]
    fill: float | None = None


MODEL_TYPES = {one.name: one.model_type for one in NATIVE}


def _decoder(architecture: str, hidden: int, intermediate: int, layers: int, heads: tuple[int, int]) -> Shape:
    """What all shapes share; `heads` are those of queries and of keys and values."""
    return {
        "architectures": [architecture],
        "model_type": MODEL_TYPES[architecture],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "use_cache": True,
    }


def _llama(hidden: int, intermediate: int, layers: int, heads: tuple[int, int], **keys: Any) -> Shape:
    common = {
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    return _decoder("LlamaForCausalLM", hidden, intermediate, layers, heads) | common | keys


def _llama3(hidden: int, intermediate: int, layers: int, heads: tuple[int, int], factor: float, **keys: Any) -> Shape:
    """Llama 3.1 and 3.2: context stretched from 8,192 tokens by the `llama3` rule of rotary scaling."""
    scaling = {
        "factor": factor,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    common = {
        "max_position_embeddings": 131072,
        "rope_scaling": scaling,
        "rope_theta": 500000.0,
        "vocab_size": 128256,
    }
    return _llama(hidden, intermediate, layers, heads, **(common | keys))


def _qwen3(hidden: int, intermediate: int, layers: int, heads: tuple[int, int], **keys: Any) -> Shape:
    """Qwen3: Llama with a norm on each query and key head, and a head size of its own."""
    common = {
        "attention_bias": False,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
    return _decoder("Qwen3ForCausalLM", hidden, intermediate, layers, heads) | common | keys


def _mistral(hidden: int, intermediate: int, layers: int, heads: tuple[int, int], **keys: Any) -> Shape:
    common = {"max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    return _decoder("MistralForCausalLM", hidden, intermediate, layers, heads) | common | keys


def _qwen2(hidden: int, intermediate: int, layers: int, heads: tuple[int, int], **keys: Any) -> Shape:
    common = {
        "max_position_embeddings": 32768,
        "max_window_layers": layers,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
    return _decoder("Qwen2ForCausalLM", hidden, intermediate, layers, heads) | common | keys


def _phi3(hidden: int, intermediate: int, layers: int, heads: tuple[int, int], **keys: Any) -> Shape:
    common = {
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": 2047,
        "tie_word_embeddings": False,
        "vocab_size": 32064,
    }
    return _decoder("Phi3ForCausalLM", hidden, intermediate, layers, heads) | common | keys


def _olmo2(hidden: int, intermediate: int, layers: int, heads: tuple[int, int], **keys: Any) -> Shape:
    common = {
        "attention_bias": False,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "vocab_size": 100352,
    }
    return _decoder("Olmo2ForCausalLM", hidden, intermediate, layers, heads) | common | keys


def _gemma(architecture: str, hidden: int, intermediate: int, layers: int, heads: tuple[int, int]) -> Shape:
    """What both generations share; their head, unlike that of others, is always tied."""
    return _decoder(architecture, hidden, intermediate, layers, heads) | {
        "attention_bias": False,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }


def _gemma2(hidden: int, intermediate: int, layers: int, heads: tuple[int, int], **keys: Any) -> Shape:
    common = {
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "max_position_embeddings": 8192,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "vocab_size": 256000,
    }
    return _gemma("Gemma2ForCausalLM", hidden, intermediate, layers, heads) | common | keys


def _gemma3(hidden: int, intermediate: int, layers: int, heads: tuple[int, int], **keys: Any) -> Shape:
    common = {
        "max_position_embeddings": 32768,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "vocab_size": 262144,
    }
    return _gemma("Gemma3ForCausalLM", hidden, intermediate, layers, heads) | common | keys


def _opt(hidden: int, layers: int, heads: int, **keys: Any) -> Shape:
    common = {
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "dropout": 0.1,
        "ffn_dim": 4 * hidden,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "vocab_size": 50272,
        "word_embed_proj_dim": hidden,
    }
    return _decoder("OPTForCausalLM", hidden, 4 * hidden, layers, (heads, heads)) | common | keys


def _mixtral(hidden: int, intermediate: int, layers: int, heads: tuple[int, int], **keys: Any) -> Shape:
    common = {
        "max_position_embeddings": 32768,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    }
    return _decoder("MixtralForCausalLM", hidden, intermediate, layers, heads) | common | keys


def _qwen3_moe(hidden: int, intermediate: int, layers: int, heads: tuple[int, int], **keys: Any) -> Shape:
    common = {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    }
    qwen3 = _qwen3(hidden, intermediate, layers, heads)
    return qwen3 | _decoder("Qwen3MoeForCausalLM", hidden, intermediate, layers, heads) | common | keys


_TINY: dict[str, Any] = {
    "head_dim": 16,
    "initializer_range": 0.125,
    "max_position_embeddings": 2048,
    "vocab_size": VOCABULARY,
}
_TINY_GEMMA = _TINY | {"query_pre_attn_scalar": 16, "sliding_window": 64}
_TINY_SIZES = (64, 128, 2, (4, 2))
_TINY_SCALING = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 256,
    "rope_type": "llama3",
}

_TINY_LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0 + pair / 16 for pair in range(8)],
    "long_factor": [1.0 + pair for pair in range(8)],
}

SHAPES: dict[str, Shape] = {
    "gemma-2-2b": _gemma2(2304, 9216, 26, (8, 4)),
    "gemma-2-9b": _gemma2(3584, 14336, 42, (16, 8)),
    "gemma-3-270m": _gemma3(640, 2048, 18, (4, 1)),
    "gemma-3-1b": _gemma3(1152, 6912, 26, (4, 1)),
    "llama-2-7b": _llama(4096, 11008, 32, (32, 32), max_position_embeddings=4096, vocab_size=32000),
    "llama-3-8b": _llama(
        4096, 14336, 32, (32, 8), max_position_embeddings=8192, rope_theta=500000.0, vocab_size=128256
    ),
    "llama-3.1-8b": _llama3(4096, 14336, 32, (32, 8), 8.0),
    "llama-3.1-70b": _llama3(8192, 28672, 80, (64, 8), 8.0),
    "llama-3.2-1b": _llama3(2048, 8192, 16, (32, 8), 32.0, head_dim=64, tie_word_embeddings=True),
    "llama-3.2-3b": _llama3(3072, 8192, 28, (24, 8), 32.0, head_dim=128, tie_word_embeddings=True),
    "mistral-7b-v0.1": _mistral(4096, 14336, 32, (32, 8), rope_theta=10000.0, sliding_window=4096, vocab_size=32000),
    "mistral-7b-v0.3": _mistral(4096, 14336, 32, (32, 8), rope_theta=1000000.0, sliding_window=None, vocab_size=32768),
    "mixtral-8x7b": _mixtral(4096, 14336, 32, (32, 8)),
    "olmo-2-7b": _olmo2(4096, 11008, 32, (32, 32)),
    "opt-125m": _opt(768, 12, 12),
    "opt-350m": _opt(1024, 24, 16, do_layer_norm_before=False, word_embed_proj_dim=512),
    "opt-1.3b": _opt(2048, 24, 32),
    "phi-3-mini-4k": _phi3(3072, 8192, 32, (32, 32)),
    "qwen2.5-0.5b": _qwen2(896, 4864, 24, (14, 2), tie_word_embeddings=True),
    "qwen2.5-7b": _qwen2(3584, 18944, 28, (28, 4), vocab_size=152064),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, (16, 8), tie_word_embeddings=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, (16, 8), tie_word_embeddings=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, (32, 8), tie_word_embeddings=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, (32, 8)),
    "qwen3-14b": _qwen3(5120, 17408, 40, (40, 8)),
    "qwen3-32b": _qwen3(5120, 25600, 64, (64, 8)),
    "qwen3-30b-a3b": _qwen3_moe(2048, 6144, 48, (32, 4)),
    "smollm2-135m": _llama(
        576,
        1536,
        30,
        (9, 3),
        max_position_embeddings=8192,
        rope_theta=100000.0,
        tie_word_embeddings=True,
        vocab_size=49152,
    ),
    "tinyllama-1.1b": _llama(2048, 5632, 22, (32, 4), max_position_embeddings=2048, vocab_size=32000),
    "tiny-llama": _llama(*_TINY_SIZES, **_TINY),
    "tiny-llama-tied": _llama(*_TINY_SIZES, **_TINY, tie_word_embeddings=True),
    "tiny-llama3": _llama(*_TINY_SIZES, **_TINY, rope_scaling=_TINY_SCALING, rope_theta=500000.0),
    "tiny-gemma2": _gemma2(*_TINY_SIZES, **_TINY_GEMMA),
    "tiny-gemma3": _gemma3(*_TINY_SIZES, **_TINY_GEMMA, sliding_window_pattern=2),
    "tiny-mistral": _mistral(*_TINY_SIZES, **_TINY, rope_theta=10000.0, sliding_window=64),
    "tiny-mixtral": _mixtral(*_TINY_SIZES, **_TINY, num_local_experts=4),
    "tiny-olmo2": _olmo2(*_TINY_SIZES, **_TINY),
    "tiny-opt": _opt(64, 2, 4, **_TINY),
    "tiny-phi3": _phi3(*_TINY_SIZES, **_TINY, original_max_position_embeddings=256, rope_scaling=_TINY_LONGROPE),
    "tiny-qwen2": _qwen2(*_TINY_SIZES, **_TINY),
    "tiny-qwen3-moe": _qwen3_moe(*_TINY_SIZES, **_TINY, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2),
    "tiny-qwen3": _qwen3(*_TINY_SIZES, **_TINY),
    "tiny-qwen3-tied": _qwen3(*_TINY_SIZES, **_TINY, tie_word_embeddings=True),
}


def shape_of(like: str, layers: int | None = None) -> Shape:
    """A copy of the named shape, with `layers` instead of its own number of layers.

    Raises ValueError, naming the nearest names, if there is no such shape, and if there would be no layer.
    """
    if like not in SHAPES:
        near = difflib.get_close_matches(like.lower(), SHAPES, n=3, cutoff=0.4)
        names = f"the nearest: {', '.join(near)}" if near else f"there are {', '.join(sorted(SHAPES))}"
        raise ValueError(f"no shape is called {like!r}; {names}")
    if layers is not None and layers < 1:
        raise ValueError(f"a model needs at least one layer, not {layers}")
    return SHAPES[like] | ({} if layers is None else {"num_hidden_layers": layers})


def tensors_of(shape: Shape) -> list[TensorShape]:
    """All tensors of a checkpoint under their Hugging Face names, in the model's order; a tied head has none.

    Norms begin as they do before training: at a scale of 1, which is a weight of 0 where 1 is added to it.
    """
    config = ModelConfig.parse(shape, "float32")
    unit = 0.0 if config.norm is Norm.ONE_PLUS else 1.0
    return [
        TensorShape(name, size, unit if "norm" in name and name.endswith(".weight") else None)
        for name, size in config.tensors().items()
    ]
