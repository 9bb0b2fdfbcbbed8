"""How config.json tells of rotary embedding: `rope_theta` beside `rope_scaling`, or the one table `rope_parameters`.

Formulas follow transformers' `modeling_rope_utils`, so that a checkpoint means the same here and there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from serverless_llm.engine.architectures.reader import Reader
from serverless_llm.errors import CheckpointError
from serverless_llm.kernels.rope_kinds import Rope

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
KEYS = {
    "rope_theta", "rope_type", "type", "partial_rotary_factor", "factor", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    "truncate", "short_factor", "long_factor",
}  # fmt: skip


def read_rope(read: Reader, head_dim: int, theta: float = 10000.0, *, partial: bool = False) -> Rope:
    """The one rotary embedding of a model; `partial`: this architecture may turn a part of each head.

    Raises:
        CheckpointError: names what is missing, malformed or unknown.
    """
    scaling, parameters = read.table("rope_scaling"), read.table("rope_parameters")
    return rope_of(read, scaling or parameters, head_dim, read.number("rope_theta", theta), partial=partial)


def rope_of(read: Reader, table: Mapping[str, Any], head_dim: int, theta: float, *, partial: bool = False) -> Rope:
    """As `read_rope`, from one table; `theta` where the table has none."""
    if unknown := sorted(set(table) - KEYS):
        raise CheckpointError(f"config.json: rope key {unknown[0]!r} is not supported")
    kind = table.get("rope_type", table.get("type", "default"))
    if not isinstance(kind, str) or kind not in KINDS:
        raise CheckpointError(f"config.json: rope_type {kind!r} is not supported, only {', '.join(KINDS)}")
    context = read.size("max_position_embeddings")
    own = Reader(table)
    original = read.get("original_max_position_embeddings") or table.get("original_max_position_embeddings")
    original = Reader({"original_max_position_embeddings": original}).size("original_max_position_embeddings", context)
    theta = own.number("rope_theta", theta)
    dim = _turned(read, own, head_dim, partial)
    if kind == "linear":
        return Rope(theta, dim, kind, own.number("factor"))
    if kind == "llama3":
        low, high = own.number("low_freq_factor"), own.number("high_freq_factor")
        return Rope(theta, dim, kind, own.number("factor"), original, low, high)
    if kind == "yarn":
        return _yarn(own, theta, dim, context, original)
    if kind == "longrope":
        return _longrope(own, theta, dim, context, original)
    if kind == "dynamic":
        # Scales theta for sequences of more than max_position_embeddings tokens: here there are none.
        own.number("factor")
    return Rope(theta, dim)


def _turned(read: Reader, own: Reader, head_dim: int, partial: bool) -> int:
    part = own.number("partial_rotary_factor", read.number("partial_rotary_factor", 1.0))
    if part != 1 and not partial:
        raise CheckpointError("config.json: partial_rotary_factor other than 1 is not supported")
    dim = head_dim if part == 1 else int(head_dim * part)
    if part != 1 and (dim % 2 or not 0 < dim < head_dim):
        raise CheckpointError(f"config.json: partial_rotary_factor {part} turns {dim} of {head_dim} numbers")
    return dim


def _yarn(own: Reader, theta: float, dim: int, context: int, original: int) -> Rope:
    factor = own.number("factor", context / original)
    scaling = own.number("attention_factor", _yarn_scaling(own, factor))
    fast, slow = own.number("beta_fast", 32.0), own.number("beta_slow", 1.0)
    truncate = own.flag("truncate", default=True)
    return Rope(
        theta, dim, "yarn", factor, original, scaling=scaling, beta_fast=fast, beta_slow=slow, truncate=truncate
    )


def _yarn_scaling(own: Reader, factor: float) -> float:
    whole, every = own.number_or_off("mscale", 0.0), own.number_or_off("mscale_all_dim", 0.0)
    if whole and every:
        return _stretch(factor, whole) / _stretch(factor, every)
    return _stretch(factor, 1.0)


def _stretch(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(own: Reader, theta: float, dim: int, context: int, original: int) -> Rope:
    factor = own.number("factor", context / original)
    stretched = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    short, long = (_factors(own, key, dim // 2) for key in ("short_factor", "long_factor"))
    scaling = own.number("attention_factor", stretched)
    return Rope(
        theta, dim, "longrope", factor, original, scaling=scaling, short_factors=short, long_factors=long
    )  # fmt: skip


def _factors(own: Reader, key: str, count: int) -> tuple[float, ...]:
    values = own.get(key)
    if not isinstance(values, list) or len(values) != count:
        raise CheckpointError(f"config.json: {key} must be a list of {count} numbers")
    return tuple(Reader({key: value}).number(key) for value in values)
