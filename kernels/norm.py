"""RMSNorm, in float32 whatever the dtype (Zhang and Sennrich, 2019)."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension; the dtype of x.

    A row's result does not depend on the other rows: torch reduces a contiguous last dimension row by row.
    """
    wide = x.float()
    scale = (wide * wide).mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * scale).to(x.dtype).mul_(weight)
