"""What a rotary embedding is, as values: its kind and numbers. Pure; the angles are computed in `rope`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding; a kind reads only the fields it uses.

    Attributes:
        dim: leading numbers of each head that are turned; the others stay.
        kind: `default`, `linear`, `llama3`, `yarn` or `longrope`.
        original_context: tokens; `longrope` turns a sequence of more by `long_factors` instead of `short_factors`.
        scaling: cosine and sine are multiplied by it.
        truncate: whether `yarn` rounds the bounds of its ramp.
        short_factors, long_factors: dim / 2 of each, by which `longrope` slows the pairs.
    """

    theta: float
    dim: int
    kind: str = "default"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    scaling: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    @property
    def regimes(self) -> int:
        """Sets of frequencies: the second is for sequences of more than `original_context` tokens."""
        return 2 if self.kind == "longrope" else 1
