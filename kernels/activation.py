"""Activations that are the same bit by bit at any place of a batch, beside torch's own.

torch's tanh and sigmoid-like kernels have a vectorised body and a scalar tail that round differently, so that an
element's bits would depend on its place. exp, sums and quotients do not have that fault.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

GELU_SLOPE = 1.5957691216057308  # 2 * sqrt(2 / pi)
GELU_CUBE = 0.044715


def silu_gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up; overwrites gate."""
    return gate.div_(torch.exp(-gate).add_(1)).mul_(up)


def gelu_tanh_gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gelu(gate) * up, gelu by its tanh formula: x / (1 + exp(-2 u)); overwrites gate."""
    steep = (gate * gate).mul_(GELU_CUBE).add_(1).mul_(gate).mul_(-GELU_SLOPE)
    return gate.div_(steep.exp_().add_(1)).mul_(up)


def relu_gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """relu(gate) * up; overwrites gate."""
    return gate.relu_().mul_(up)


def plain_silu_gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate).mul_(up)


def plain_gelu_tanh_gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.gelu(gate, approximate="tanh").mul_(up)


def soft_cap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """cap * tanh(x / cap), by exp: 1 - 2 / (exp(2 x / cap) + 1); overwrites x, float32."""
    return x.mul_(2 / cap).exp_().add_(1).reciprocal_().mul_(-2 * cap).add_(cap)
