"""How a model's layers share KV blocks: those that see all tokens in other blocks than those with a window. Pure.

A block holds `size` layers for `BLOCK_TOKENS` tokens; all blocks of a model are of one size, so that they come from one
pool. The tokens of a column, `BLOCK_TOKENS` of them, have one block in each group. Blocks of groups with a window are
given back when the window has passed them.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache
from typing import NamedTuple

from serverless_llm.domain import BLOCK_TOKENS

WASTE = 1.1  # layers that blocks have room for, at most, per layer of the model; arbitrary
FREED = -1  # in place of the offset of a block that was given back


class Place(NamedTuple):
    """Where a layer's K and V are: its group, and its number in a block of it."""

    group: int
    slot: int


class View(NamedTuple):
    """What some layers attend to: the blocks of a group, and the tokens of a window in them (0 for all)."""

    group: int
    window: int


class KvGroups(NamedTuple):
    """`whole` groups see all tokens, then come `sliding` groups whose layers have a window of `window` tokens."""

    size: int
    whole: int
    sliding: int
    window: int
    places: tuple[Place, ...]  # of each layer

    @property
    def total(self) -> int:
        return self.whole + self.sliding

    def columns(self, tokens: int) -> int:
        return -(-tokens // BLOCK_TOKENS)

    def passed(self, cached: int) -> int:
        """Columns that no token from number `cached` on sees through the window."""
        return max(0, cached - self.window + 1) // BLOCK_TOKENS if self.sliding else 0

    @property
    def kept(self) -> int:
        """Columns that groups with a window hold at most, of a sequence that runs a few tokens at a time."""
        return self.columns(self.window - 1) + 1

    def live(self, tokens: int) -> int:
        """Blocks that suffice to run a sequence up to so many tokens, a few at a time."""
        columns = self.columns(tokens)
        return self.whole * columns + self.sliding * min(columns, self.kept)

    def longest(self, blocks: int, most: int) -> int:
        """Tokens of the longest sequence, up to `most`, that so many blocks suffice for."""
        lengths = range(0, most, BLOCK_TOKENS)
        return most if self.live(most) <= blocks else lengths[max(1, bisect_right(lengths, blocks, key=self.live)) - 1]

    def views(self) -> list[View]:
        """One for each group."""
        return [View(number, self.window if number >= self.whole else 0) for number in range(self.total)]


@lru_cache
def group(windows: tuple[int, ...]) -> KvGroups:
    """`windows` of each layer, 0 for none; all others are equal."""
    sliding = sum(map(bool, windows))
    whole = len(windows) - sliding
    size = next(size for size in range(len(windows), 0, -1) if _room(whole, sliding, size) <= WASTE * len(windows))
    counts = [0, 0]
    places = []
    for window in windows:
        number = counts[bool(window)]
        counts[bool(window)] += 1
        places.append(Place(number // size + (-(-whole // size) if window else 0), number % size))
    return KvGroups(size, -(-whole // size), -(-sliding // size), max(windows), tuple(places))


def _room(whole: int, sliding: int, size: int) -> int:
    """Layers that fit the blocks of one column."""
    return size * (-(-whole // size) + -(-sliding // size))
