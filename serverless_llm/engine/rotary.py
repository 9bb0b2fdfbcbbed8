"""The angles of a model's positions, as tables that grow with the longest sequence seen."""

from __future__ import annotations

import torch

from serverless_llm.kernels.rope import frequencies, table
from serverless_llm.kernels.rope_kinds import Rope

CHUNK = 1024  # positions by which the tables grow: a fixed shape, so that a position's bits never change


class Rotary:
    """`like`: a tensor of the served dtype on the model's device."""

    def __init__(self, rope: Rope, like: torch.Tensor) -> None:
        self._frequency = frequencies(rope)
        self._scaling = rope.scaling
        self._cosine = self._sine = like.new_empty(0, rope.dim)

    def angles(self, rows: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and signed sine of table rows [T], [T, 1, R] each; `length`: one past the highest position."""
        regimes = len(self._frequency)
        while self._cosine.shape[0] < length * regimes:
            cosine, sine = table(self._frequency, self._cosine.shape[0] // regimes, CHUNK)
            self._cosine = torch.cat((self._cosine, cosine.mul_(self._scaling).to(self._cosine)))
            self._sine = torch.cat((self._sine, sine.mul_(self._scaling).to(self._sine)))
        return self._cosine.index_select(0, rows)[:, None], self._sine.index_select(0, rows)[:, None]
