"""Rotary position embedding: frequencies, tables, rotation (Su et al., RoFormer; halves split as in Llama).

Shape letters: T tokens, N heads, D head size, R numbers of a head that are turned, F sets of frequencies.
"""

from __future__ import annotations

import math

import torch

from serverless_llm.kernels.rope_kinds import Rope


def frequencies(rope: Rope) -> torch.Tensor:
    """Radians per token, float32 [F, R / 2]."""
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.int64).to(torch.float32) / rope.dim
    waves = rope.theta**exponents
    base = 1.0 / waves
    if rope.kind == "linear":
        return (base / rope.factor)[None]
    if rope.kind == "llama3":
        return _llama3(base, rope)[None]
    if rope.kind == "yarn":
        return _yarn(base, rope)[None]
    if rope.kind == "longrope":
        return 1.0 / (torch.tensor([rope.short_factors, rope.long_factors], dtype=torch.float32) * waves)
    return base[None]


def _llama3(base: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Slows long waves by `factor`, as Llama 3.1 defines it."""
    low, high, context = rope.low_freq_factor, rope.high_freq_factor, rope.original_context
    wavelength = 2 * math.pi / base
    slow = torch.where(wavelength > context / low, base / rope.factor, base)
    smooth = (context / wavelength - low) / (high - low)
    between = (1 - smooth) * slow / rope.factor + smooth * slow
    medium = (wavelength >= context / high) & (wavelength <= context / low)
    return torch.where(medium, between, slow)


def _yarn(base: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Slows pairs that turn less than `beta_slow` times in the original context, keeps those above `beta_fast`; between
    them a ramp over the pairs (Peng et al., YaRN, section 3.2)."""

    def pair_of(turns: float) -> float:
        return rope.dim * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    pairs = torch.arange(rope.dim // 2, dtype=torch.float32)
    ramp = ((pairs - low) / (high - low if high != low else 0.001)).clamp_(0, 1)
    return base / rope.factor * ramp + base * (1 - ramp)


def table(frequency_FR: torch.Tensor, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: N803
    """Cosine and signed sine of positions start ... start + count - 1, float32 [count * F, R] each.

    Row p * F + f is position p by the frequencies of set f. The first half of the sine is negated, so that `rotate` is
    one roll and one sum.
    """
    position = torch.arange(start, start + count, dtype=torch.float32)
    angle = (position[:, None, None] * frequency_FR[None]).flatten(0, 1)
    cosine, sine = angle.cos(), angle.sin()
    return torch.cat((cosine, cosine), dim=-1), torch.cat((-sine, sine), dim=-1)


def rotate(x_TND: torch.Tensor, cosine_T1D: torch.Tensor, sine_T1D: torch.Tensor) -> torch.Tensor:  # noqa: N803
    """Each head's vector turned by its token's angles; the dtype of x."""
    return (x_TND * cosine_T1D).add_(x_TND.roll(x_TND.shape[-1] // 2, dims=-1).mul_(sine_T1D))


def rotate_part(x_TND: torch.Tensor, cosine_T1R: torch.Tensor, sine_T1R: torch.Tensor) -> torch.Tensor:  # noqa: N803
    """`rotate` for the first R numbers of each head; the others stay."""
    size = cosine_T1R.shape[-1]
    return torch.cat((rotate(x_TND[..., :size], cosine_T1R, sine_T1R), x_TND[..., size:]), dim=-1)
