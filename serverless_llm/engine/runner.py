"""From a batch of sequences to the tensors of one step.

Shape letters as in `kernels.attention`.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from serverless_llm.domain import BLOCK_TOKENS
from serverless_llm.engine.config import ModelConfig
from serverless_llm.engine.kv_groups import View
from serverless_llm.engine.model import Attention, StepInput
from serverless_llm.engine.scheduler import Chunk
from serverless_llm.kernels.attention import (
    CHUNK,
    CHUNK_BLOCKS,
    Scores,
    Span,
    Tile,
    TileGroup,
    gathered_attention,
    hidden_keys,
    tile_tokens,
    tiled_attention,
)
from serverless_llm.kernels.linear import padded

Integers = npt.NDArray[np.int64]
GROUP_BYTES = 32 << 20  # of gathered KV at a time, about


class AnyModel(Protocol):
    """A model as a step sees it, whoever computes it. `config` and the others: see `engine.model.Model`."""

    @property
    def config(self) -> ModelConfig: ...

    tiled: bool
    views: list[View]
    scores: Scores

    def forward(self, step: StepInput) -> torch.Tensor: ...


class _Query(NamedTuple):
    """One sequence's part of a step: `tokens` tokens from `start` in the step, from position `first`.

    Attributes:
        number: of the sequence in the step.
        hidden: chunks before the first that any of these tokens sees.
        chunks: that they see.
    """

    number: int
    start: int
    first: int
    tokens: int
    hidden: int
    chunks: int

    def table(self, rows: Integers, chunks: int) -> Integers:
        """Of the sequence's block rows, so many chunks; what lies beyond it, or was given back, repeats one it has."""
        begin = self.hidden * CHUNK_BLOCKS
        held = rows[begin : begin + chunks * CHUNK_BLOCKS]
        if held[0] < 0:
            held = np.where(held < 0, rows[-1], held)
        return np.concatenate([held, np.full(chunks * CHUNK_BLOCKS - len(held), held[0])])


class _Tiles(NamedTuple):
    """A `TileGroup` before it is known of which KV group."""

    queries: list[_Query]
    chunks: int
    tiles: list[Tile]


def run(model: AnyModel, chunks: list[Chunk], device: torch.device) -> torch.Tensor:
    """Runs the chunks through the model; float32 logits [n, V], one row for each chunk that ends its sequence."""
    ends = [number for number, chunk in enumerate(chunks) if chunk.tokens == chunk.sequence.missing]
    logits = model.forward(_step(model, chunks, ends, device))
    return logits[: len(ends)]


def _step(model: AnyModel, chunks: list[Chunk], ends: list[int], device: torch.device) -> StepInput:
    config = model.config
    ids = [token for sequence, n in chunks for token in sequence.tokens[sequence.cached : sequence.cached + n]]
    position = np.concatenate([np.arange(s.cached, s.cached + n) for s, n in chunks])
    count = config.kv_groups.total
    # Of each KV group, of each sequence: rows of one layer of one block in the arena, negative for those given back.
    rows = [
        [np.array(s.blocks[group::count], dtype=np.int64) // config.kv_layer_bytes for s, _ in chunks]
        for group in range(count)
    ]
    starts = np.cumsum([0, *(n for _, n in chunks)])
    column, within = np.split(position // BLOCK_TOKENS, starts[1:-1]), position % BLOCK_TOKENS
    slots = [
        np.concatenate([row[at] for row, at in zip(mine, column, strict=True)]) * (2 * BLOCK_TOKENS) + within
        for mine in rows
    ]
    drawn = starts[1:][ends] - 1
    total = len(ids)
    size = padded(total) if model.tiled else total
    drawn_size = padded(len(ends)) if model.tiled else len(ends)
    return StepInput(
        ids=_move(_pad(np.array(ids, dtype=np.int64), size), device),
        position=_move(_pad(_table_rows(model, chunks, position), size), device),
        length=int(position.max()) + 1,
        tokens=total,
        slots=[_move(mine, device) for mine in slots],
        drawn=_move(_pad(drawn, drawn_size), device),
        attend=_attention(model, chunks, rows, starts, device),
    )


def _table_rows(model: AnyModel, chunks: list[Chunk], position: Integers) -> Integers:
    """Where in the model's table of positions each token's is, see `kernels.rope.table`."""
    switch = model.config.rope_switch
    if not switch:
        return position
    late = [len(sequence.tokens) > switch for sequence, _ in chunks]
    return 2 * position + np.repeat(np.array(late, dtype=np.int64), [n for _, n in chunks])


def _attention(
    model: AnyModel, chunks: list[Chunk], rows: list[list[Integers]], starts: Integers, device: torch.device
) -> list[Attention]:
    """What the layers of each view do. Views with the same window share their tiles."""
    if not model.tiled:
        return [
            partial(gathered_attention, spans=_spans(window, chunks, rows[group], starts, device), how=model.scores)
            for group, window in model.views
        ]
    windows = dict.fromkeys(window for _, window in model.views)
    tiles = {window: _all_tiles(model, window, chunks, starts, device) for window in windows}
    placed = [[_tile_group(one, rows[group], device) for one in tiles[window]] for group, window in model.views]
    return [partial(tiled_attention, groups=groups, how=model.scores) for groups in placed]


def _pad(values: Integers, size: int) -> Integers:
    return np.concatenate([values, np.zeros(size - len(values), dtype=np.int64)])


def _move(values: Integers, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(values).to(device)


def _unseen(position: int, window: int) -> int:
    """Keys before the first that a token at this position sees."""
    return max(0, position - window + 1) if window else 0


def _spans(
    window: int, chunks: list[Chunk], rows: list[Integers], starts: Integers, device: torch.device
) -> list[Span]:
    return [
        _span(chunk, window, row, int(start), device) for chunk, row, start in zip(chunks, rows, starts, strict=False)
    ]


def _span(chunk: Chunk, window: int, rows: Integers, start: int, device: torch.device) -> Span:
    first, end = chunk.sequence.cached, chunk.sequence.cached + chunk.tokens
    block = _unseen(first, window) // BLOCK_TOKENS
    base = block * BLOCK_TOKENS
    visible = None
    if chunk.tokens > 1 or _unseen(first, window) > base:
        query = torch.arange(first, end, device=device)[:, None]
        key = torch.arange(base, end, device=device)[None, :]
        visible = (key <= query) & (key > query - window) if window else key <= query
    held = _move(rows[block : -(-end // BLOCK_TOKENS)], device)
    return Span(start, start + chunk.tokens, held, end - base, visible)


def _all_tiles(
    model: AnyModel, window: int, chunks: list[Chunk], starts: Integers, device: torch.device
) -> list[_Tiles]:
    """Short chunks share groups, sorted by length so that little is padded; a long one is a group of its own."""
    heads, kv_heads = model.config.heads, model.config.kv_heads
    width = tile_tokens(heads, kv_heads)
    queries = [_query(number, chunk, window, int(starts[number])) for number, chunk in enumerate(chunks)]
    short = sorted((query for query in queries if query.tokens <= width), key=lambda query: query.chunks)
    most = max(1, GROUP_BYTES // (CHUNK_BLOCKS * model.config.kv_layer_bytes))
    grouped = _pack(short, most) + [[query] for query in queries if query.tokens > width]
    return [_tiles(queries, window, width, heads // kv_heads, device) for queries in grouped]


def _query(number: int, chunk: Chunk, window: int, start: int) -> _Query:
    first = chunk.sequence.cached
    hidden = _unseen(first, window) // CHUNK
    return _Query(number, start, first, chunk.tokens, hidden, -(-(first + chunk.tokens) // CHUNK) - hidden)


def _pack(queries: list[_Query], most: int) -> list[list[_Query]]:
    """Cuts the sorted queries where a group would gather more than `most` chunks, or twice its shortest."""
    groups: list[list[_Query]] = []
    for query in queries:
        last = groups[-1] if groups else None
        if last and (len(last) + 1) * query.chunks <= most and query.chunks <= 2 * last[0].chunks:
            last.append(query)
        else:
            groups.append([query])
    return groups


def _tiles(queries: list[_Query], window: int, width: int, heads: int, device: torch.device) -> _Tiles:
    """`width`: query tokens in a tile; `heads`: of queries for each of keys."""
    longest = max(query.tokens for query in queries)
    hidden = np.array([query.hidden for query in queries]) if window else None
    before = None if hidden is None else _move(hidden, device)
    tiles = []
    for begin in range(0, longest, width):
        # A tile that is not full repeats its last token: the same row twice in a product gives the same bits twice.
        steps = np.stack([np.minimum(np.arange(begin, begin + width), query.tokens - 1) for query in queries])
        position = steps + np.array([[query.first] for query in queries])
        seen = int(position.max() if hidden is None else (position - hidden[:, None] * CHUNK).max()) // CHUNK + 1
        tiles.append(
            Tile(
                tokens=_move((steps + np.array([[query.start] for query in queries])).ravel(), device),
                chunks=seen,
                hidden=hidden_keys(_move(position, device), seen, heads, window, before),
            )
        )
    return _Tiles(queries, max(query.chunks for query in queries), tiles)


def _tile_group(one: _Tiles, rows: list[Integers], device: torch.device) -> TileGroup:
    tables = [query.table(rows[query.number], one.chunks) for query in one.queries]
    return TileGroup(_move(np.concatenate(tables), device), len(one.queries), one.tiles)
