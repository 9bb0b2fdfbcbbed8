"""From a batch of sequences to the tensors of one step.

Shape letters as in `kernels.attention`.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from serverless_llm.domain import BLOCK_TOKENS
from serverless_llm.engine.model import Model, StepInput
from serverless_llm.engine.scheduler import Chunk
from serverless_llm.kernels.attention import (
    CHUNK,
    CHUNK_BLOCKS,
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


class _Query(NamedTuple):
    """One sequence's part of a step: `tokens` tokens from `start` in the step, from position `first`."""

    start: int
    first: int
    tokens: int
    rows: Integers

    @property
    def chunks(self) -> int:
        return -(-(self.first + self.tokens) // CHUNK)

    def table(self, chunks: int) -> Integers:
        """Block rows of so many chunks; what lies beyond the sequence repeats its first block."""
        held = self.rows[: chunks * CHUNK_BLOCKS]
        return np.concatenate([held, np.full(chunks * CHUNK_BLOCKS - len(held), self.rows[0])])


def run(model: Model, chunks: list[Chunk], device: torch.device) -> torch.Tensor:
    """Runs the chunks through the model; float32 logits [n, V], one row for each chunk that ends its sequence."""
    ends = [number for number, chunk in enumerate(chunks) if chunk.tokens == chunk.sequence.missing]
    logits = model.forward(_step(model, chunks, ends, device))
    return logits[: len(ends)]


def _step(model: Model, chunks: list[Chunk], ends: list[int], device: torch.device) -> StepInput:
    config = model.config
    ids = [token for sequence, n in chunks for token in sequence.tokens[sequence.cached : sequence.cached + n]]
    position = np.concatenate([np.arange(s.cached, s.cached + n) for s, n in chunks])
    rows = [np.array(sequence.blocks, dtype=np.int64) // config.kv_layer_bytes for sequence, _ in chunks]
    starts = np.cumsum([0, *(n for _, n in chunks)])
    slots = np.concatenate(
        [
            row[at // BLOCK_TOKENS] * (2 * BLOCK_TOKENS) + at % BLOCK_TOKENS
            for row, at in zip(rows, np.split(position, starts[1:-1]), strict=True)
        ]
    )
    drawn = starts[1:][ends] - 1
    total = len(ids)
    if model.tiled:
        groups = _groups(model, chunks, rows, starts, device)
        attend = partial(tiled_attention, groups=groups)
    else:
        spans = [_span(chunk, row, int(start), device) for chunk, row, start in zip(chunks, rows, starts, strict=False)]
        attend = partial(gathered_attention, spans=spans)
    size = padded(total) if model.tiled else total
    drawn_size = padded(len(ends)) if model.tiled else len(ends)
    return StepInput(
        ids=_move(_pad(np.array(ids, dtype=np.int64), size), device),
        position=_move(_pad(position, size), device),
        length=int(position.max()) + 1,
        tokens=total,
        slots=_move(slots, device),
        drawn=_move(_pad(drawn, drawn_size), device),
        attend=attend,
    )


def _pad(values: Integers, size: int) -> Integers:
    return np.concatenate([values, np.zeros(size - len(values), dtype=np.int64)])


def _move(values: Integers, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(values).to(device)


def _span(chunk: Chunk, rows: Integers, start: int, device: torch.device) -> Span:
    first, keys = chunk.sequence.cached, chunk.sequence.cached + chunk.tokens
    visible = None
    if chunk.tokens > 1:
        query = torch.arange(first, keys, device=device)
        visible = torch.arange(keys, device=device)[None, :] <= query[:, None]
    return Span(start, start + chunk.tokens, _move(rows[: -(-keys // BLOCK_TOKENS)], device), keys, visible)


def _groups(
    model: Model, chunks: list[Chunk], rows: list[Integers], starts: Integers, device: torch.device
) -> list[TileGroup]:
    """Short chunks share groups, sorted by length so that little is padded; a long one is a group of its own."""
    heads, kv_heads = model.config.heads, model.config.kv_heads
    width = tile_tokens(heads, kv_heads)
    sequences = [
        _Query(int(start), sequence.cached, n, row)
        for (sequence, n), row, start in zip(chunks, rows, starts, strict=False)
    ]
    short = sorted((query for query in sequences if query.tokens <= width), key=lambda query: query.chunks)
    most = max(1, GROUP_BYTES // (CHUNK_BLOCKS * model.config.kv_layer_bytes))
    grouped = _pack(short, most) + [[query] for query in sequences if query.tokens > width]
    return [_tile_group(group, width, heads // kv_heads, device) for group in grouped]


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


def _tile_group(queries: list[_Query], width: int, group: int, device: torch.device) -> TileGroup:
    chunks = max(query.chunks for query in queries)
    table = np.concatenate([query.table(chunks) for query in queries])
    longest = max(query.tokens for query in queries)
    tiles = []
    for begin in range(0, longest, width):
        # A tile that is not full repeats its last token: the same row twice in a product gives the same bits twice.
        steps = np.stack([np.minimum(np.arange(begin, begin + width), query.tokens - 1) for query in queries])
        position = steps + np.array([[query.first] for query in queries])
        seen = int(position.max()) // CHUNK + 1
        tiles.append(
            Tile(
                tokens=_move((steps + np.array([[query.start] for query in queries])).ravel(), device),
                chunks=seen,
                hidden=hidden_keys(_move(position, device), seen, group),
            )
        )
    return TileGroup(_move(table, device), len(queries), tiles)
