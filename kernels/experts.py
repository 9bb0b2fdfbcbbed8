"""A mixture of experts: which of them a token goes to, and the weighted sum of what they say.

Shape letters: T tokens, H hidden, E experts, K experts for each token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class Routes(NamedTuple):
    """`expert`: int64 [T, K]; `weight`: float32 [T, K]."""

    expert: torch.Tensor
    weight: torch.Tensor


def route(logits_TE: torch.Tensor, each: int, normalised: bool) -> Routes:  # noqa: N803
    """The `each` likeliest experts of each token; their weights sum to 1 where `normalised`."""
    weight, expert = torch.topk(torch.softmax(logits_TE.float(), dim=-1), each, dim=-1)
    return Routes(expert, weight / weight.sum(dim=-1, keepdim=True) if normalised else weight)


def mix(
    x_TH: torch.Tensor,  # noqa: N803
    routes: Routes,
    experts: int,
    say: Callable[[int, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Sum over each token's experts, weighted; [T, H], zeros for rows of x beyond the routes.

    `say(number, rows)`: what an expert makes of rows [n, H]. A token's experts are summed in the order of their
    numbers, so that its result depends on no other token.
    """
    flat, weight = routes.expert.flatten(), routes.weight.flatten()
    order = torch.argsort(flat, stable=True)
    token = order // routes.expert.shape[1]
    out, begin = torch.zeros_like(x_TH), 0
    for number, count in enumerate(torch.bincount(flat, minlength=experts).tolist()):
        if count:
            mine = slice(begin, begin + count)
            said = say(number, x_TH.index_select(0, token[mine])) * weight[order[mine], None]
            out.index_add_(0, token[mine], said.to(out.dtype))
            begin += count
    return out
