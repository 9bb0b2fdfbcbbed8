"""Decoders without a native definition: what their config.json says of KV. transformers computes the rest. No torch."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from serverless_llm.engine.architectures.description import Description
from serverless_llm.engine.architectures.reader import MOST, MOST_PARTS, Reader
from serverless_llm.errors import CheckpointError
from serverless_llm.extras import how_to_install

# One thing, as different architectures spell it.
VOCAB = ("vocab_size",)
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
HIDDEN = ("hidden_size", "n_embd", "d_model", "n_embed")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len", "seq_length")
# Not served even where transformers could.
REFUSED = (
    "quantization_config", "compression_config", "auto_map", "is_encoder_decoder", "add_cross_attention",
    "vision_config", "audio_config",
)  # fmt: skip
# Their frequencies follow from the longest sequence of a batch.
REFUSED_ROPES = ("dynamic", "longrope")
CAUSAL = re.compile(r"\w+(ForCausalLM|LMHeadModel)")
PAIR = re.compile(r'\("([\w-]+)", "(\w+)"\)')


def known(config: Mapping[str, Any]) -> bool:
    """Whether transformers defines the decoder that config.json names.

    Raises:
        CheckpointError: it is not installed, or a key asks for what would be refused with it, too.
    """
    names, kind = config.get("architectures"), config.get("model_type")
    if not (isinstance(names, list) and len(names) == 1 and isinstance(names[0], str) and isinstance(kind, str)):
        return False
    if not CAUSAL.fullmatch(names[0]):
        return False
    check(Reader(config))
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(
            f"config.json: {names[0]} is not native; transformers, which may know it, is not installed: "
            + how_to_install("transformers")
        )
    return (kind, names[0]) in decoders(next(iter(spec.submodule_search_locations)))


@cache
def decoders(folder: str) -> tuple[tuple[str, str], ...]:
    """(model_type, architecture) of every decoder that the transformers in this folder lists.

    Its source is read, not imported: the head must not stand still for seconds.
    """
    source = (Path(folder) / "models" / "auto" / "modeling_auto.py").read_text(encoding="utf-8")
    _, _, rest = source.partition("\nMODEL_FOR_CAUSAL_LM_MAPPING_NAMES = ")
    return tuple((kind, name) for kind, name in PAIR.findall(rest.partition("\n)")[0]))


def describe(config: Mapping[str, Any]) -> Description:
    """Sizes of the vocabulary and of KV; what says more is transformers' affair, and is as for Llama here.

    Raises:
        CheckpointError: names the key that is missing, malformed, or not supported.
    """
    read = Reader(config)
    check(read)
    hidden, heads = _size(read, HIDDEN), _size(read, HEADS)
    layers = _size(read, LAYERS, most=MOST_PARTS)
    return Description(
        architecture=config["architectures"][0],
        vocab=_size(read, VOCAB),
        hidden=hidden,
        intermediate=0,
        layers=layers,
        heads=heads,
        kv_heads=1 if read.flag("multi_query") else _size(read, KV_HEADS, default=heads),
        head_dim=_head_dim(read, hidden, heads),
        context=_size(read, CONTEXT),
        eps=0.0,
        embedding=hidden,
        score_scale=1.0,
        windows=(0,) * layers,
        rope=None,
    )


def check(read: Reader) -> None:
    """
    Raises:
        CheckpointError: names the key that asks for what paged KV or this engine has not.
    """
    for key in REFUSED:
        if read.get(key) not in (None, False, {}, []):
            read.refuse(key)
    for key in ("rope_scaling", "rope_parameters"):
        for kind in _rope_types(read.table(key)):
            if kind in REFUSED_ROPES:
                read.refuse(key, f"of type {kind} is not supported for this architecture")


def _head_dim(read: Reader, hidden: int, heads: int) -> int:
    """Numbers of a key or of a value, whichever is longer. Latent attention names the parts of a key."""
    if read.get("qk_nope_head_dim") is None:
        return read.size("head_dim", max(1, hidden // heads))
    return max(read.size("qk_nope_head_dim") + read.size("qk_rope_head_dim"), read.size("v_head_dim"))


def _size(read: Reader, names: tuple[str, ...], default: int | None = None, most: int = MOST) -> int:
    name = next((name for name in names if read.get(name) is not None), None)
    if name is None and default is None:
        raise CheckpointError(f"config.json: none of {', '.join(names)}, which paged KV needs")
    return read.size(name or names[0], default, most)


def _rope_types(table: Mapping[str, Any]) -> Iterator[Any]:
    """Of one object, or of one for each kind of layer."""
    yield table.get("rope_type", table.get("type"))
    for part in table.values():
        if isinstance(part, dict):
            yield part.get("rope_type", part.get("type"))
