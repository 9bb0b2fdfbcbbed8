"""What the engine knows of a model before any of its bytes: mathematics, tensors, footprint. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, Self

from serverless_llm.domain import BLOCK_TOKENS
from serverless_llm.engine.architectures import foreign
from serverless_llm.engine.architectures.description import Description, Shape
from serverless_llm.engine.architectures.registry import describe, native
from serverless_llm.engine.kv_groups import KvGroups, group
from serverless_llm.errors import CheckpointError

Entries = Mapping[str, tuple[str, Shape]]  # tensor name -> (dtype as safetensors spells it, shape)

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # the stored dtypes that can be served
ALIGNMENT = 256  # bytes; every weight buffer begins on such a boundary


class Buffer(NamedTuple):
    """Tensors whose rows lie next to each other in one allocation, in this order.

    `packed`: they are used as one tensor, and are stored so even where others are views of the files.
    """

    tensors: tuple[str, ...]
    packed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig(Description):
    """The mathematics of one model in its served dtype, `float32` (deterministic mode) or `bfloat16`."""

    dtype: str

    @classmethod
    def parse(cls, config: Mapping[str, Any], dtype: str = "auto") -> ModelConfig:
        """Reads `config.json`; `dtype` is `auto` (the checkpoint's; float16 becomes bfloat16), `float32` or `bfloat16`.

        Raises:
            CheckpointError: names the key that is missing, malformed, or asks for mathematics that is not here.
        """
        parsed: ModelConfig
        if _of_transformers(config):
            parsed = ForeignConfig(
                **_values(foreign.describe(config)), dtype=_served_dtype(config, dtype), values=config
            )
        else:
            parsed = cls(**_values(describe(config)), dtype=_served_dtype(config, dtype))
        parsed._check()
        return parsed

    def bound(self, entries: Entries) -> Self:
        """The same, for a checkpoint with these tensors. Raises as `check`.

        A head that is stored is not tied, whatever the config says: it may be another (as for transformers).
        """
        config = replace(self, tied=self.tied and f"{self.names.head}.weight" not in entries)
        config.check(entries)
        return config

    def _check(self) -> None:
        if self.heads % self.kv_heads:
            raise CheckpointError(
                f"config.json: num_attention_heads {self.heads} is no multiple of num_key_value_heads {self.kv_heads}"
            )
        # Deterministic mode needs it, see kernels.linear; rotary embedding needs pairs.
        for key, size in (
            ("head_dim", self.head_dim), ("hidden_size", self.hidden), ("intermediate_size", self.intermediate),
            ("word_embed_proj_dim", self.embedding),
            ("moe_intermediate_size", self.experts.intermediate if self.experts else 0),
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
    def kv_groups(self) -> KvGroups:
        return group(self.windows)

    @property
    def kv_block_bytes(self) -> int:
        """Bytes of one block: K and V of a group's layers for `BLOCK_TOKENS` tokens."""
        return self.kv_groups.size * self.kv_layer_bytes

    @property
    def kv_column_bytes(self) -> int:
        """Bytes of the blocks of all groups for the same `BLOCK_TOKENS` tokens."""
        return self.kv_groups.total * self.kv_block_bytes

    def buffers(self) -> list[Buffer]:
        """The device's allocations: rows of one product are adjacent, every other tensor is alone."""
        return [Buffer(tensors) for tensors in self.groups()]

    def check(self, entries: Entries) -> None:
        """Compares a checkpoint's tensors with what this config needs.

        Raises:
            CheckpointError: names a tensor that is missing, has another shape, a dtype that cannot be served, or is
                unknown to this architecture.
        """
        # before anything is built for each of them
        if self.layers > len(entries):
            raise CheckpointError(f"config.json: num_hidden_layers {self.layers}, but {len(entries)} tensors in all")
        if self.experts and self.experts.total * (self.layers - len(self.experts.dense)) > len(entries):
            raise CheckpointError(f"config.json: {self.experts.total} experts, but {len(entries)} tensors in all")
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
            if name not in expected and not name.endswith(".rotary_emb.inv_freq"):  # which follow from the config
                raise CheckpointError(f"tensor {name} is not part of {self.architecture} as config.json describes it")

    def needs_conversion(self, name: str, entries: Entries) -> bool:
        return STORED[entries[name][0]] != self.dtype

    def weight_bytes(self, entries: Entries | None = None) -> int:
        """Bytes that the weights take on a device in the served dtype, padding to `ALIGNMENT` included.

        Raises:
            CheckpointError: see `bound`, which is done first where `entries` are given.
        """
        whole = self if entries is None else self.bound(entries)
        shapes = whole.tensors()
        return sum(aligned(whole.buffer_bytes(buffer, shapes)) for buffer in whole.buffers())

    def buffer_bytes(self, buffer: Buffer, shapes: Mapping[str, Shape]) -> int:
        return sum(numel(shapes[name]) for name in buffer.tensors) * self.item_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignConfig(ModelConfig):
    """A decoder that transformers computes, see `engine.fallback`; its tensors are those that its checkpoint has.

    Attributes:
        values: its config.json.
        shapes: of its tensors, once `bound`.
        wide: tensors that stay float32 in a model of bfloat16, as its checkpoint has them: biases of a choice of
            experts, where rounding would choose others.
    """

    values: Mapping[str, Any]
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    wide: frozenset[str] = frozenset()

    def bound(self, entries: Entries) -> Self:
        self.check(entries)
        shapes = {name: tuple(shape) for name, (_, shape) in entries.items() if _weighs(name)}
        wide = (
            frozenset(name for name in shapes if entries[name][0] == "F32") if self.dtype == "bfloat16" else frozenset()
        )
        few = sum(numel(shapes[name]) for name in wide) * MANY <= sum(map(numel, shapes.values()))
        return replace(self, shapes=shapes, wide=wide if few else frozenset())

    def tensors(self) -> dict[str, Shape]:
        return dict(self.shapes)

    def groups(self) -> Iterator[tuple[str, ...]]:
        """Every tensor once, but for wide ones; those of the experts of a layer as transformers packs them."""
        experts: dict[tuple[str, str], list[tuple[int, int, str]]] = {}
        for name in self.shapes:
            if name in self.wide:
                continue
            if found := EXPERT.fullmatch(name):
                layer, number, product, kind = found.groups()
                part, place = PARTS.get(product, (product, 0))
                experts.setdefault((layer, part + kind), []).append((int(number), place, name))
            else:
                yield (name,)
        for members in experts.values():
            yield tuple(name for _, _, name in sorted(members))

    def buffers(self) -> list[Buffer]:
        return [Buffer(tensors, packed=len(tensors) > 1) for tensors in self.groups()]

    def check(self, entries: Entries) -> None:
        """
        Raises:
            CheckpointError: a tensor has a dtype that cannot be served. What is missing is told when it is loaded.
        """
        for name, (stored, _) in entries.items():
            if stored not in STORED and _weighs(name):
                raise CheckpointError(f"tensor {name} has dtype {stored}, which cannot be served")

    def weight_bytes(self, entries: Entries | None = None) -> int:
        whole = self if entries is None else self.bound(entries)
        wide = sum(aligned(numel(whole.shapes[name]) * ITEM_BYTES["float32"]) for name in whole.wide)
        return wide + sum(aligned(whole.buffer_bytes(buffer, whole.shapes)) for buffer in whole.buffers())


# Old checkpoints store masks and rotary frequencies, which follow from the config.
NO_WEIGHTS = (
    ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq",
    ".position_ids",
)  # fmt: skip

# Experts whose products transformers packs: of a layer one tensor of all gates and ups, and one of each other product.
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.(weight|bias)")
PARTS = {"gate_proj": ("up", 0), "up_proj": ("up", 1), "w1": ("up", 0), "w3": ("up", 1)}
MANY = 16  # a checkpoint with more than one number in so many in float32 is one of float32; arbitrary


def _weighs(name: str) -> bool:
    return not name.endswith(NO_WEIGHTS)


def _of_transformers(config: Mapping[str, Any]) -> bool:
    """Whether transformers is to compute it. Some kinds of model have the code of a native one, and another config."""
    own = native(config)
    return (own is None or config.get("model_type", own.model_type) != own.model_type) and foreign.known(config)


def _values(description: Description) -> dict[str, Any]:
    return {one.name: getattr(description, one.name) for one in fields(description)}


def numel(shape: Shape) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def aligned(nbytes: int, alignment: int = ALIGNMENT) -> int:
    return -(-nbytes // alignment) * alignment


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
