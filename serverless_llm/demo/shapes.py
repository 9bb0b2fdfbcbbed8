"""Shapes of well-known models that can be served, and the tensors that each consists of.

A shape is the hub's `config.json` less its token ids (those are the byte-level tokenizer's, see `tokenizer.py`).
The `tiny-*` shapes are for tests: a few hundred kB each, and weights wide enough (`initializer_range`) that
attention decides what a random model says.
"""

import difflib
from typing import Any, NamedTuple

from serverless_llm.demo.tokenizer import VOCABULARY

Shape = dict[str, Any]


class TensorShape(NamedTuple):
    """A tensor of a checkpoint; `norm` says that it is a scale around 1 instead of random."""

    name: str
    shape: tuple[int, ...]
    norm: bool = False


def _decoder(architecture: str, hidden: int, intermediate: int, layers: int, heads: tuple[int, int]) -> Shape:
    """What all shapes share; `heads` are those of queries and of keys and values."""
    model_types = {
        "LlamaForCausalLM": "llama",
        "Qwen3ForCausalLM": "qwen3",
    }
    return {
        "architectures": [architecture],
        "model_type": model_types[architecture],
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


_TINY: dict[str, Any] = {
    "head_dim": 16,
    "initializer_range": 0.125,
    "max_position_embeddings": 2048,
    "vocab_size": VOCABULARY,
}
_TINY_SIZES = (64, 128, 2, (4, 2))
_TINY_SCALING = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 256,
    "rope_type": "llama3",
}

SHAPES: dict[str, Shape] = {
    "llama-2-7b": _llama(4096, 11008, 32, (32, 32), max_position_embeddings=4096, vocab_size=32000),
    "llama-3-8b": _llama(
        4096, 14336, 32, (32, 8), max_position_embeddings=8192, rope_theta=500000.0, vocab_size=128256
    ),
    "llama-3.1-8b": _llama3(4096, 14336, 32, (32, 8), 8.0),
    "llama-3.1-70b": _llama3(8192, 28672, 80, (64, 8), 8.0),
    "llama-3.2-1b": _llama3(2048, 8192, 16, (32, 8), 32.0, head_dim=64, tie_word_embeddings=True),
    "llama-3.2-3b": _llama3(3072, 8192, 28, (24, 8), 32.0, head_dim=128, tie_word_embeddings=True),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, (16, 8), tie_word_embeddings=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, (16, 8), tie_word_embeddings=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, (32, 8), tie_word_embeddings=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, (32, 8)),
    "qwen3-14b": _qwen3(5120, 17408, 40, (40, 8)),
    "qwen3-32b": _qwen3(5120, 25600, 64, (64, 8)),
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
    "tiny-qwen3": _qwen3(*_TINY_SIZES, **_TINY),
    "tiny-qwen3-tied": _qwen3(*_TINY_SIZES, **_TINY, tie_word_embeddings=True),
}


def shape_of(like: str, layers: int | None = None) -> Shape:
    """A copy of the named shape, with `layers` instead of its own number of layers.

    Raises ValueError, naming the nearest names, if there is no such shape, and if there would be no layer.
    """
    if like not in SHAPES:
        near = difflib.get_close_matches(like.lower(), SHAPES, n=3, cutoff=0.4) or sorted(SHAPES)
        raise ValueError(f"no shape is called {like!r}; the nearest: {', '.join(near)}")
    if layers is not None and layers < 1:
        raise ValueError(f"a model needs at least one layer, not {layers}")
    return SHAPES[like] | ({} if layers is None else {"num_hidden_layers": layers})


def _attention(prefix: str, shape: Shape) -> list[TensorShape]:
    hidden, heads, groups = (shape[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    head = shape.get("head_dim", hidden // heads)
    rows = {"q_proj": heads * head, "k_proj": groups * head, "v_proj": groups * head}
    tensors = [TensorShape(f"{prefix}.{name}.weight", (size, hidden)) for name, size in rows.items()]
    tensors.append(TensorShape(f"{prefix}.o_proj.weight", (hidden, heads * head)))
    if shape["model_type"] == "qwen3":
        tensors += [TensorShape(f"{prefix}.{name}.weight", (head,), norm=True) for name in ("q_norm", "k_norm")]
    return tensors


def _layer(prefix: str, shape: Shape) -> list[TensorShape]:
    hidden, intermediate = shape["hidden_size"], shape["intermediate_size"]
    return [
        TensorShape(f"{prefix}.input_layernorm.weight", (hidden,), norm=True),
        *_attention(f"{prefix}.self_attn", shape),
        TensorShape(f"{prefix}.post_attention_layernorm.weight", (hidden,), norm=True),
        TensorShape(f"{prefix}.mlp.gate_proj.weight", (intermediate, hidden)),
        TensorShape(f"{prefix}.mlp.up_proj.weight", (intermediate, hidden)),
        TensorShape(f"{prefix}.mlp.down_proj.weight", (hidden, intermediate)),
    ]


def tensors_of(shape: Shape) -> list[TensorShape]:
    """All tensors of a checkpoint under their Hugging Face names, in the model's order; a tied head has none."""
    embedding = (shape["vocab_size"], shape["hidden_size"])
    tensors = [TensorShape("model.embed_tokens.weight", embedding)]
    for layer in range(shape["num_hidden_layers"]):
        tensors += _layer(f"model.layers.{layer}", shape)
    tensors.append(TensorShape("model.norm.weight", (shape["hidden_size"],), norm=True))
    if not shape["tie_word_embeddings"]:
        tensors.append(TensorShape("lm_head.weight", embedding))
    return tensors
