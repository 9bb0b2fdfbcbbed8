"""Attention over paged KV, in plain torch: a deterministic form for float32 on a CPU, a short form for everything else.

KV lies in the device's arena, seen as rows of one layer of one block: [row, 2 (K, V), 16 tokens, G KV heads, D]. A
block at byte b holds layer l in row b / (bytes of such a row) + l.

Shape letters: T tokens of the step, N sequences, P query tokens in a tile, A heads, G KV heads, D head size, C chunks
of `CHUNK` keys, R = P * A / G rows of one product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812

from serverless_llm.domain import BLOCK_TOKENS
from serverless_llm.kernels.activation import soft_cap

CHUNK_BLOCKS = 4
CHUNK = BLOCK_TOKENS * CHUNK_BLOCKS  # keys that are reduced together
TILE_ROWS = 16  # rows of a product, at most, where a KV head has no more heads than that
FULL_QUERIES = 256  # query tokens whose scores `gathered_attention` holds at a time where it caps them or has sinks


def tile_tokens(heads: int, kv_heads: int) -> int:
    """P: how many query tokens share a tile."""
    return max(1, TILE_ROWS * kv_heads // heads)


class Tile(NamedTuple):
    """P query tokens of each of N sequences.

    Attributes:
        tokens: int64 [N * P], their places in the step; a short tile repeats its last token.
        chunks: C, keys they may see, in chunks.
        hidden: bool [N, C, 1, R, CHUNK], True where the key comes after the query.
    """

    tokens: torch.Tensor
    chunks: int
    hidden: torch.Tensor


class TileGroup(NamedTuple):
    """Sequences whose KV is gathered together: N with one tile each, or one with many tiles.

    Attributes:
        rows: int64 [N * C * CHUNK_BLOCKS], rows of layer 0 in the arena, from the first chunk that any of a sequence's
            tokens sees; a short table repeats its first block.
    """

    rows: torch.Tensor
    sequences: int
    tiles: list[Tile]


class Scores(NamedTuple):
    """How scores come from products of query and key: times `scale`, then softly capped unless `cap` is 0."""

    scale: float
    cap: float = 0.0


def hidden_keys(
    position_NP: torch.Tensor,  # noqa: N803
    chunks: int,
    group: int,
    window: int = 0,
    first_N: torch.Tensor | None = None,  # noqa: N803
) -> torch.Tensor:
    """The `hidden` of a tile whose query tokens have these positions; `group` = A / G.

    `window`: tokens that a token sees, itself included, 0 for all; `first_N`: int64 [N], number of the first chunk of
    each sequence that is gathered, None where it is 0.
    """
    key = torch.arange(chunks * CHUNK, device=position_NP.device).view(1, chunks, 1, 1, CHUNK)
    if first_N is not None:
        key = key + first_N.view(-1, 1, 1, 1, 1) * CHUNK
    query = position_NP.repeat_interleave(group, dim=1)[:, None, None, :, None]
    hidden = key > query
    return hidden.logical_or_(key <= query - window) if window else hidden


def tiled_attention(
    q_TAD: torch.Tensor,  # noqa: N803
    kv: torch.Tensor,
    layer: int,
    groups: list[TileGroup],
    how: Scores,
    sinks_A: torch.Tensor | None = None,  # noqa: N803
) -> torch.Tensor:
    """Attention of each query token over its sequence's keys up to itself; float32 [T, A * D].

    `sinks_A`: scores of a further key of each head, whose value is zero.

    Every product has R rows and CHUNK keys, scores of hidden keys become exact zeros, and chunks are summed one after
    the other: a token's result depends neither on other sequences, nor on how its sequence was cut into steps, nor on
    whether chunks that it does not see are there at all. Stale numbers behind hidden keys must be finite.
    """
    tokens, heads, size = q_TAD.shape
    out = q_TAD.new_zeros(tokens, heads * size)
    scaled = q_TAD * how.scale
    for group in groups:
        keys, values = _gather(kv, layer, group)
        for tile in group.tiles:
            q = scaled.index_select(0, tile.tokens).view(group.sequences, -1, heads, size)
            out.index_copy_(0, tile.tokens, _attend(q, keys, values, tile, how.cap, sinks_A))
    return out


def _gather(kv: torch.Tensor, layer: int, group: TileGroup) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V, [N * C, G, CHUNK, D] each."""
    _, _, _, kv_heads, size = kv.shape
    blocks = kv.index_select(0, group.rows + layer).view(-1, CHUNK_BLOCKS, 2, BLOCK_TOKENS, kv_heads, size)
    both = blocks.permute(2, 0, 4, 1, 3, 5).reshape(2, -1, kv_heads, CHUNK, size)
    return both[0], both[1]


def _attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tile: Tile, cap: float, sinks: torch.Tensor | None
) -> torch.Tensor:
    """`q`: [N, P, A, D], scaled. Returns [N * P, A * D]."""
    count, tokens, heads, size = q.shape
    kv_heads, group = keys.shape[1], heads // keys.shape[1]
    shape = (count, tile.chunks, kv_heads, tokens * group)
    q = q.view(count, tokens, kv_heads, group, size).transpose(1, 2).reshape(count, 1, kv_heads, -1, size)
    q = q.expand(*shape, size).reshape(-1, shape[3], size)
    products = q.shape[0]
    keys, values = keys.view(-1, CHUNK, size)[:products], values.view(-1, CHUNK, size)[:products]
    scores = torch.bmm(q, keys.transpose(1, 2)).view(*shape, CHUNK)
    if cap:
        scores = soft_cap(scores, cap)
    scores.masked_fill_(tile.hidden, -torch.inf)
    peak = scores.amax(dim=-1, keepdim=True).amax(dim=1, keepdim=True)
    if sinks is not None:
        sinks = sinks.float().view(kv_heads, 1, group).expand(-1, tokens, -1).reshape(kv_heads, -1, 1)
        peak = torch.maximum(peak, sinks)
    scores.sub_(peak).exp_()
    total = _in_order(scores.sum(dim=-1))
    if sinks is not None:
        total.add_((sinks - peak[:, 0]).exp_()[..., 0])
    mixed = _in_order(torch.bmm(scores.view(-1, shape[3], CHUNK), values).view(*shape, size))
    mixed = mixed.div_(total[..., None]).view(count, kv_heads, tokens, group, size)
    return mixed.transpose(1, 2).reshape(count * tokens, heads * size)


def _in_order(parts: torch.Tensor) -> torch.Tensor:
    """The sum over dimension 1, from first to last, so that zeros at its end change nothing; overwrites the first."""
    total = parts[:, 0]
    for chunk in range(1, parts.shape[1]):
        total.add_(parts[:, chunk])
    return total


class Span(NamedTuple):
    """One sequence in a step, for `gathered_attention`.

    Attributes:
        start, stop: its query tokens in the step.
        rows: int64 [blocks], rows of layer 0 in the arena, of the blocks that any of them sees.
        keys: tokens in these blocks that were run.
        visible: bool [stop - start, keys], None where its one query token sees all.
    """

    start: int
    stop: int
    rows: torch.Tensor
    keys: int
    visible: torch.Tensor | None


def gathered_attention(
    q_TAD: torch.Tensor,  # noqa: N803
    kv: torch.Tensor,
    layer: int,
    spans: list[Span],
    how: Scores,
    sinks_A: torch.Tensor | None = None,  # noqa: N803
) -> torch.Tensor:
    """The same by torch's own kernel, sequence by sequence, any dtype and device; [T, A * D]."""
    tokens, heads, size = q_TAD.shape
    out = q_TAD.new_zeros(tokens, heads, size)
    for span in spans:
        blocks = kv.index_select(0, span.rows + layer)
        keys, values = (
            blocks[:, part].reshape(-1, *kv.shape[3:])[: span.keys].transpose(0, 1)[None] for part in (0, 1)
        )
        q = q_TAD[span.start : span.stop].transpose(0, 1)[None]
        if how.cap or sinks_A is not None:
            mixed = _in_full(q, keys, values, span.visible, how, sinks_A)
        else:
            mixed = F.scaled_dot_product_attention(
                q, keys, values, attn_mask=span.visible, scale=how.scale, enable_gqa=True
            )
        out[span.start : span.stop] = mixed[0].transpose(0, 1)
    return out.view(tokens, heads * size)


def _in_full(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor | None,
    how: Scores,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """`q`: [1, A, n, D]; torch's kernel has no cap and no sinks. Scores are float32, of some query tokens at a time."""
    _, heads, count, size = q.shape
    q = q.view(keys.shape[1], -1, count, size)
    parts = []
    for first in range(0, count, FULL_QUERIES):
        part = slice(first, first + FULL_QUERIES)
        scores = torch.matmul(q[:, :, part], keys[0][:, None].transpose(-1, -2)).float() * how.scale
        if how.cap:
            scores = soft_cap(scores, how.cap)
        if visible is not None:
            scores.masked_fill_(~visible[part], -torch.inf)
        if sinks is not None:
            sink = sinks.float().view(*q.shape[:2], 1, 1).expand(-1, -1, scores.shape[2], -1)
            scores = torch.cat((scores, sink), dim=-1)
        weights = scores.softmax(dim=-1)[..., : keys.shape[2]].to(values.dtype)
        parts.append(torch.matmul(weights, values[0][:, None]))
    return torch.cat(parts, dim=2).view(1, heads, count, size)
