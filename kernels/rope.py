"""Rotary position embedding: frequencies, tables, rotation (Su et al., RoFormer; halves split as in Llama).

Shape letters: T tokens, N heads, D head size.
"""

from __future__ import annotations

import math

import torch


def frequencies(
    theta: float,
    head_dim: int,
    kind: str = "default",
    factor: float = 1.0,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 1.0,
    original_context: int = 0,
) -> torch.Tensor:
    """Radians per token, float32 [D / 2]. `llama3` slows long waves by `factor`, as Llama 3.1 defines it."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    base = 1.0 / (theta**exponents)
    if kind == "linear":
        return base / factor
    if kind == "llama3":
        return _llama3(base, factor, low_freq_factor, high_freq_factor, original_context)
    return base


def _llama3(base: torch.Tensor, factor: float, low: float, high: float, context: int) -> torch.Tensor:
    wavelength = 2 * math.pi / base
    slow = torch.where(wavelength > context / low, base / factor, base)
    smooth = (context / wavelength - low) / (high - low)
    between = (1 - smooth) * slow / factor + smooth * slow
    medium = (wavelength >= context / high) & (wavelength <= context / low)
    return torch.where(medium, between, slow)


def table(frequency: torch.Tensor, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and signed sine of positions start ... start + count - 1, float32 [count, D] each.

    The first half of the sine is negated, so that `rotate` is one roll and one sum.
    """
    position = torch.arange(start, start + count, dtype=torch.float32)
    angle = position[:, None] * frequency[None, :]
    cosine, sine = angle.cos(), angle.sin()
    return torch.cat((cosine, cosine), dim=-1), torch.cat((-sine, sine), dim=-1)


def rotate(x_TND: torch.Tensor, cosine_T1D: torch.Tensor, sine_T1D: torch.Tensor) -> torch.Tensor:  # noqa: N803
    """Each head's vector turned by its token's angles; the dtype of x."""
    return (x_TND * cosine_T1D).add_(x_TND.roll(x_TND.shape[-1] // 2, dims=-1).mul_(sine_T1D))
