"""Drawing the next token. Randomness is a function of (seed, position), so that a resumed sequence draws the same."""

from __future__ import annotations

import torch

from serverless_llm.domain import Sampling

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(word: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & _MASK
    return word ^ (word >> 31)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, the same on every machine."""
    return (_mix(_mix(seed & _MASK) + _GOLDEN * (position + 1) & _MASK) >> 11) / (1 << 53)


def greedy(sampling: Sampling) -> bool:
    return sampling.temperature == 0 or sampling.top_k == 1


def draw(logits: torch.Tensor, sampling: Sampling, position: int) -> int:
    """The token at `position` (counted from the prompt's first), from float32 [vocabulary].

    Temperature, then top-k, then top-p (the fewest likeliest tokens whose probabilities reach `top_p`), in float64.
    Of equal logits the lower token id is the likelier.
    """
    if greedy(sampling):
        return int(logits.argmax())
    weights = torch.softmax(logits.double() / sampling.temperature, dim=-1)
    tokens = None
    if 0 < sampling.top_k < weights.numel() or sampling.top_p < 1:
        weights, tokens = _likeliest(weights, sampling)
    cumulative = weights.cumsum(dim=0)
    threshold = cumulative[-1] * uniform(sampling.seed, position)
    place = min(int(torch.searchsorted(cumulative, threshold, right=True)), weights.numel() - 1)
    return place if tokens is None else int(tokens[place])


def _likeliest(weights: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """The candidates that top-k and top-p leave, likeliest first, and their token ids."""
    ordered, tokens = weights.sort(descending=True, stable=True)
    if sampling.top_k > 0:
        ordered, tokens = ordered[: sampling.top_k], tokens[: sampling.top_k]
    before = ordered.cumsum(dim=0) - ordered
    kept = max(1, int((before < sampling.top_p * ordered.sum()).sum()))
    return ordered[:kept], tokens[:kept]
