"""Norms over the last dimension, in float32 whatever the dtype.

A row's result does not depend on the other rows: torch reduces a contiguous last dimension row by row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight; the dtype of x (Zhang and Sennrich, 2019)."""
    wide = x.float()
    scale = (wide * wide).mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * scale).to(x.dtype).mul_(weight)


def wide_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`rms_norm` by a float32 weight, rounded to the dtype of x after that product instead of before."""
    wide = x.float()
    scale = (wide * wide).mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * scale).mul_(weight).to(x.dtype)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """(x - mean) / deviation * weight + bias (Ba et al., 2016)."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)
