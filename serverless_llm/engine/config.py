"""What the engine knows of a model before any of its bytes: mathematics, tensor names and shapes, footprint. No torch.

Shapes are those of the checkpoint: a projection is [out, in].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from serverless_llm.domain import BLOCK_TOKENS
from serverless_llm.errors import CheckpointError

Shape = tuple[int, ...]
Entries = Mapping[str, tuple[str, Shape]]  # tensor name -> (dtype as safetensors spells it, shape)

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # the stored dtypes that can be served
ALIGNMENT = 256  # bytes; every weight buffer begins on such a boundary
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
ARCHITECTURES = ("LlamaForCausalLM", "Qwen3ForCausalLM")

# Keys of config.json that change the mathematics where they are set, and that no model here computes.
FOREIGN = (
    "quantization_config", "compression_config", "auto_map", "attn_logit_softcapping", "final_logit_softcapping",
    "query_pre_attn_scalar", "logit_scale", "logits_scaling", "embedding_multiplier", "residual_multiplier",
    "attention_multiplier", "num_experts", "num_local_experts", "n_routed_experts", "no_rope_layers", "scale_depth",
    "scale_emb", "use_mrope", "vision_config", "audio_config", "kv_lora_rank", "num_kv_shared_layers", "use_qk_norm",
)  # fmt: skip
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
ROPE_INERT = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding: `kind` is `default`, `linear` or `llama3`; a kind reads only the fields it uses."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_context: int = 0  # tokens


class Buffer(NamedTuple):
    """Tensors whose rows lie next to each other in one allocation, in this order."""

    tensors: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The mathematics of one model in its served dtype.

    Attributes:
        dtype: served, `float32` (deterministic mode) or `bfloat16`.
        context: most tokens of a sequence, `max_position_embeddings`.
        qk_norm: per-head RMSNorm of queries and keys (Qwen3).
    """

    architecture: str
    dtype: str
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    rms_eps: float
    rope: Rope
    tied: bool
    attention_bias: bool
    mlp_bias: bool
    qk_norm: bool

    @classmethod
    def parse(cls, config: Mapping[str, Any], dtype: str = "auto") -> ModelConfig:
        """Reads `config.json`; `dtype` is `auto` (the checkpoint's; float16 becomes bfloat16), `float32` or `bfloat16`.

        Raises:
            CheckpointError: names the key that is missing, malformed, or asks for mathematics that is not here.
        """
        read = _Reader(config)
        architecture = _architecture(config)
        _refuse_foreign(config, architecture)
        hidden, heads = read.size("hidden_size"), read.size("num_attention_heads")
        parsed = cls(
            architecture=architecture,
            dtype=_served_dtype(config, dtype),
            vocab=read.size("vocab_size"),
            hidden=hidden,
            intermediate=read.size("intermediate_size"),
            layers=read.size("num_hidden_layers"),
            heads=heads,
            kv_heads=read.size("num_key_value_heads", heads),
            head_dim=read.size("head_dim", 128 if architecture == "Qwen3ForCausalLM" else hidden // heads),
            context=read.size("max_position_embeddings"),
            rms_eps=read.number("rms_norm_eps", 1e-6),
            rope=_rope(config),
            tied=read.flag("tie_word_embeddings"),
            attention_bias=read.flag("attention_bias"),
            mlp_bias=read.flag("mlp_bias") if architecture == "LlamaForCausalLM" else False,
            qk_norm=architecture == "Qwen3ForCausalLM",
        )
        parsed._check()
        return parsed

    def _check(self) -> None:
        if self.heads % self.kv_heads:
            raise CheckpointError(
                f"config.json: num_attention_heads {self.heads} is no multiple of num_key_value_heads {self.kv_heads}"
            )
        # Deterministic mode needs it, see kernels.linear; rotary embedding needs pairs.
        for key, size in (
            ("head_dim", self.head_dim), ("hidden_size", self.hidden), ("intermediate_size", self.intermediate)
        ):  # fmt: skip
            if size % 4:
                raise CheckpointError(f"config.json: {key} {size} is no multiple of 4, which is not supported")

    @property
    def item_bytes(self) -> int:
        """Bytes of one number in the served dtype."""
        return ITEM_BYTES[self.dtype]

    @property
    def kv_layer_bytes(self) -> int:
        """Bytes of K and V of one layer in one block: [2, BLOCK_TOKENS, kv_heads, head_dim]."""
        return 2 * BLOCK_TOKENS * self.kv_heads * self.head_dim * self.item_bytes

    @property
    def kv_block_bytes(self) -> int:
        """Bytes of one block: K and V of all layers for `BLOCK_TOKENS` tokens."""
        return self.layers * self.kv_layer_bytes

    def tensors(self) -> dict[str, Shape]:
        """Every tensor that a checkpoint must hold, with its shape."""
        shapes: dict[str, Shape] = {EMBEDDING: (self.vocab, self.hidden)}
        for layer in range(self.layers):
            shapes.update(self._layer_tensors(f"model.layers.{layer}."))
        shapes["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            shapes[HEAD] = (self.vocab, self.hidden)
        return shapes

    def _layer_tensors(self, prefix: str) -> Iterator[tuple[str, Shape]]:
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield f"{prefix}input_layernorm.weight", (self.hidden,)
        for name, rows, columns in (
            ("q", query, self.hidden), ("k", key, self.hidden), ("v", key, self.hidden), ("o", self.hidden, query),
        ):  # fmt: skip
            yield f"{prefix}self_attn.{name}_proj.weight", (rows, columns)
            if self.attention_bias:
                yield f"{prefix}self_attn.{name}_proj.bias", (rows,)
        if self.qk_norm:
            yield f"{prefix}self_attn.q_norm.weight", (self.head_dim,)
            yield f"{prefix}self_attn.k_norm.weight", (self.head_dim,)
        yield f"{prefix}post_attention_layernorm.weight", (self.hidden,)
        for name, rows, columns in (
            ("gate", self.intermediate, self.hidden), ("up", self.intermediate, self.hidden),
            ("down", self.hidden, self.intermediate),
        ):  # fmt: skip
            yield f"{prefix}mlp.{name}_proj.weight", (rows, columns)
            if self.mlp_bias:
                yield f"{prefix}mlp.{name}_proj.bias", (rows,)

    def buffers(self) -> list[Buffer]:
        """The device's allocations: rows of QKV and of gate-up are adjacent, every other tensor is alone."""
        buffers: list[Buffer] = []
        fused = set()
        for name in self.tensors():
            group = _fusion(name)
            if group not in fused:
                fused.add(group)
                buffers.append(Buffer(group))
        return buffers

    def check(self, entries: Entries) -> None:
        """Compares a checkpoint's tensors with what this config needs.

        Raises:
            CheckpointError: names a tensor that is missing, has another shape, a dtype that cannot be served, or is
                unknown to this architecture.
        """
        if self.layers > len(entries):  # before anything is built for each of them
            raise CheckpointError(f"config.json: num_hidden_layers {self.layers}, but {len(entries)} tensors in all")
        expected = self.tensors()
        for name, shape in expected.items():
            if name not in entries:
                raise CheckpointError(f"tensor {name} is missing from the checkpoint")
            stored, actual = entries[name]
            if tuple(actual) != shape:
                raise CheckpointError(f"tensor {name} has shape {tuple(actual)}, config.json means {shape}")
            if stored not in STORED:
                raise CheckpointError(f"tensor {name} has dtype {stored}, which cannot be served")
        for name in entries:
            if name not in expected and not self._ignored(name):
                raise CheckpointError(f"tensor {name} is not part of {self.architecture} as config.json describes it")

    def _ignored(self, name: str) -> bool:
        # Old Llama checkpoints store rotary frequencies, which follow from the config; tied ones may store the head.
        return name.endswith("rotary_emb.inv_freq") or (self.tied and name == HEAD)

    def needs_conversion(self, name: str, entries: Entries) -> bool:
        return STORED[entries[name][0]] != self.dtype

    def weight_bytes(self, entries: Entries | None = None) -> int:
        """Bytes that the weights take on a device in the served dtype, padding to `ALIGNMENT` included.

        Raises:
            CheckpointError: see `check`, which is done first where `entries` are given.
        """
        if entries is not None:
            self.check(entries)
        shapes = self.tensors()
        return sum(aligned(self.buffer_bytes(buffer, shapes)) for buffer in self.buffers())

    def buffer_bytes(self, buffer: Buffer, shapes: Mapping[str, Shape]) -> int:
        return sum(numel(shapes[name]) for name in buffer.tensors) * self.item_bytes


def numel(shape: Shape) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def aligned(nbytes: int, alignment: int = ALIGNMENT) -> int:
    return -(-nbytes // alignment) * alignment


def _fusion(name: str) -> tuple[str, ...]:
    """The tensors that share a buffer with `name`, in row order."""
    for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        for part in group:
            if f".{part}." in name:
                return tuple(name.replace(part, other) for other in group)
    return (name,)


class _Reader:
    """Typed access to an untrusted config.json."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config

    def size(self, key: str, default: int | None = None) -> int:
        value = self._config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
            raise CheckpointError(f"config.json: {key} must be a positive integer, not {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise CheckpointError(f"config.json: {key} must be a positive number, not {value!r}")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self._config.get(key) or False
        if not isinstance(value, bool):
            raise CheckpointError(f"config.json: {key} must be true or false, not {value!r}")
        return value


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in ARCHITECTURES:
        raise CheckpointError(f"config.json: architectures {names!r} is not served, only {', '.join(ARCHITECTURES)}")
    return str(names[0])


def _refuse_foreign(config: Mapping[str, Any], architecture: str) -> None:
    for key in FOREIGN:
        if config.get(key) not in (None, False, {}):
            raise CheckpointError(f"config.json: {key} is not supported (its value is {config[key]!r})")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise CheckpointError(f"config.json: hidden_act {config['hidden_act']!r} is not supported, only silu")
    if config.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise CheckpointError("config.json: partial_rotary_factor other than 1 is not supported")
    kinds = config.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise CheckpointError("config.json: layer_types other than full_attention are not supported")
    window = config.get("sliding_window")
    used = config.get("use_sliding_window", architecture != "Qwen3ForCausalLM")
    if window is not None and used:
        raise CheckpointError(f"config.json: sliding_window {window!r} is not supported")


def _served_dtype(config: Mapping[str, Any], dtype: str) -> str:
    if dtype in ITEM_BYTES:
        return dtype
    if dtype != "auto":
        raise CheckpointError(f"dtype {dtype!r} is not served, only auto, float32, bfloat16")
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    served = {"float32": "float32", "bfloat16": "bfloat16", "float16": "bfloat16"}.get(stored)
    if served is None:
        raise CheckpointError(f"config.json: dtype {stored!r} is not served")
    return served


def _rope(config: Mapping[str, Any]) -> Rope:
    """Both spellings: `rope_theta` beside `rope_scaling`, and the one table `rope_parameters`."""
    table = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(table, dict):
        raise CheckpointError(f"config.json: rope_scaling or rope_parameters must be an object, not {table!r}")
    kind = table.get("rope_type", table.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        raise CheckpointError(f"config.json: rope_type {kind!r} is not supported, only {', '.join(ROPE_KEYS)}")
    if table.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise CheckpointError("config.json: partial_rotary_factor other than 1 is not supported")
    known = ROPE_INERT.union(*ROPE_KEYS.values())
    if unknown := sorted(set(table) - known):
        raise CheckpointError(f"config.json: rope key {unknown[0]!r} is not supported")
    outer = _Reader(config)
    original = config.get("original_max_position_embeddings") or table.get("original_max_position_embeddings")
    read = _Reader({**table, "original_max_position_embeddings": original or outer.size("max_position_embeddings")})
    theta = read.number("rope_theta", None if "rope_theta" in table else outer.number("rope_theta", 10000.0))
    values = {key: read.number(key) for key in ROPE_KEYS[kind]}
    return Rope(
        theta=theta,
        kind=kind,
        factor=values.get("factor", 1.0),
        low_freq_factor=values.get("low_freq_factor", 1.0),
        high_freq_factor=values.get("high_freq_factor", 1.0),
        original_context=int(values.get("original_max_position_embeddings", 0)),
    )
