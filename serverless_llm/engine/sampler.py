"""Drawing the next token. Randomness is a function of (seed, position), so that a resumed sequence draws the same.

The order of things is that of transformers' logits processors: bias, repetition penalty, frequency and presence
penalty, stop ids while they are too early, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from serverless_llm.domain import Sampling
from serverless_llm.engine.sequence import Likelihood

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
NEVER = torch.finfo(torch.float32).min  # not infinite: where nothing else is left, one of these is drawn after all
LEAST_LOGPROB = -9999.0  # as everywhere: JSON knows no infinity


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

    Temperature (on differences to the greatest logit, so that a small one makes no infinities), then top-k, then top-p
    (the fewest likeliest tokens whose probabilities reach `top_p`), then min-p, in float64. Of equal logits the lower
    token id is the likelier.
    """
    if greedy(sampling):
        return int(logits.argmax())
    wide = logits.double()
    weights = torch.softmax((wide - wide.max()) / sampling.temperature, dim=-1)
    tokens = None
    if 0 < sampling.top_k < weights.numel() or sampling.top_p < 1 or sampling.min_p > 0:
        weights, tokens = _likeliest(weights, sampling)
    cumulative = weights.cumsum(dim=0)
    threshold = cumulative[-1] * uniform(sampling.seed, position)
    place = min(int(torch.searchsorted(cumulative, threshold, right=True)), weights.numel() - 1)
    return place if tokens is None else int(tokens[place])


def _likeliest(weights: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """The candidates that top-k, top-p and min-p leave, likeliest first, and their token ids."""
    tokens = (weights >= _floor(weights, sampling)).nonzero()[:, 0]
    ordered, order = weights[tokens].sort(descending=True, stable=True)
    tokens, total = tokens[order], weights.sum()
    if 0 < sampling.top_k < weights.numel():
        ordered, tokens = ordered[: sampling.top_k], tokens[: sampling.top_k]
        total = ordered.sum()
    before = ordered.cumsum(dim=0) - ordered
    kept = (before < sampling.top_p * total) & (ordered >= sampling.min_p * ordered[0])
    count = max(1, int(kept.sum()))
    return ordered[:count], tokens[:count]


def _floor(weights: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """No token below is a candidate, so that few are sorted: sorting a whole vocabulary takes longer than all the rest.

    All tokens below (1 - top_p) / vocabulary are together less likely than what top-p leaves out; half of that is
    far from where rounding matters.
    """
    if 0 < sampling.top_k < weights.numel():
        return weights.topk(sampling.top_k).values[-1]
    spare = 0.5 * (1 - sampling.top_p) / weights.numel() * weights.sum()
    return torch.maximum(spare, sampling.min_p * weights.max())


def shaped(logits: torch.Tensor, sampling: Sampling, counts: Mapping[int, int], generated: int) -> torch.Tensor:
    """Logits as the sequence wants them, float32 [vocabulary]; `logits` stay as they are.

    Args:
        counts: how often each token of the sequence was generated; of the prompt: 0, where that matters.
        generated: tokens so far.
    """
    assert sampling.shaping is not None
    shaping, row = sampling.shaping, logits.clone()
    if shaping.logit_bias:
        row[[token for token, _ in shaping.logit_bias]] += row.new_tensor([bias for _, bias in shaping.logit_bias])
    if counts:
        tokens = torch.tensor(list(counts), device=row.device)
        times = row.new_tensor(list(counts.values()))
        seen, penalty = row[tokens], shaping.repetition_penalty
        seen = torch.where(seen < 0, seen * penalty, seen / penalty)
        row[tokens] = seen - shaping.frequency_penalty * times - shaping.presence_penalty * (times > 0)
    if generated < shaping.min_tokens:
        row[[token for token in sampling.stop_ids if token < len(row)]] = NEVER
    return row


def likelihood(logits: torch.Tensor, token: int, likeliest: int) -> Likelihood:
    """Of a drawn token and of the `likeliest` tokens, by the model itself: before bias, penalties and temperature."""
    logprobs = torch.log_softmax(logits.double(), dim=-1).clamp(min=LEAST_LOGPROB)
    if not likeliest:
        return Likelihood(float(logprobs[token]), [], [])
    least = logprobs.topk(min(likeliest, len(logprobs))).values[-1]
    tokens = (logprobs >= least).nonzero()[:, 0]  # more than wanted where several are equal
    values, order = logprobs[tokens].sort(descending=True, stable=True)
    return Likelihood(float(logprobs[token]), tokens[order][:likeliest].tolist(), values[:likeliest].tolist())
