"""Linear maps whose rows do not depend on how many there are.

A float32 product of M rows takes another path through the maths library at M = 1 than at M = 8, with other rounding.
Here every product has `TILE` rows, the last ones padding, so that one token's result is the same bit by bit alone and
in any batch. Measured on MKL (AVX512) for inner sizes 4 ... 4096 that are multiples of 4: rows of an 8-row product
depend neither on their place, nor on other rows, nor on the alignment of the weights. (With other inner sizes and at
most ten columns they do depend on their place.)

Long runs of rows go `WIDE` at a time, which takes 0.7 of the time, for those shapes and strides of weights where this
machine was seen to give the same bits: with MKL on some processors all, on others not with stored rows of 256 and more.
"""

from __future__ import annotations

import torch

TILE = 8  # rows; a product of 8 takes 0.6 of the time of one of 16, and decoding seldom has more
WIDE = 32  # rows, a multiple of TILE

_wide_agrees: dict[tuple[int, ...], bool] = {}  # by shape, strides and threads; facts about the machine, found out once


def padded(rows: int) -> int:
    """Rows, filled up to whole tiles."""
    return -(-rows // TILE) * TILE


def tiled_linear(x: torch.Tensor, weight_t: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ weight_t + bias, tile by tile.

    `x`: float32 [M, in], contiguous, M a multiple of `TILE`; `weight_t`: [in, out], the transposed view of a stored
    weight.
    """
    if x.shape[0] == TILE:
        out = torch.mm(x, weight_t)
    else:
        wide = x.shape[0] // WIDE * WIDE if x.shape[0] >= WIDE and wide_agrees(weight_t) else 0
        out = x.new_empty(x.shape[0], weight_t.shape[1])
        _multiply(x[:wide], weight_t, WIDE, out[:wide])
        _multiply(x[wide:], weight_t, TILE, out[wide:])
    return out if bias is None else out.add_(bias)


def _multiply(x: torch.Tensor, weight_t: torch.Tensor, rows: int, out: torch.Tensor) -> None:
    for first in range(0, x.shape[0], rows):
        torch.mm(x[first : first + rows], weight_t, out=out[first : first + rows])


def wide_agrees(weight_t: torch.Tensor) -> bool:
    """Whether products of `WIDE` rows with weights that lie so give the bits of products of `TILE` rows here."""
    kind = (*weight_t.shape, *weight_t.stride(), torch.get_num_threads())
    if kind not in _wide_agrees:
        x = torch.randn(WIDE, len(weight_t), generator=torch.Generator().manual_seed(0))
        tiles = torch.cat([torch.mm(rows, weight_t) for rows in torch.chunk(x, WIDE // TILE)])
        _wide_agrees[kind] = torch.equal(torch.mm(x, weight_t), tiles)
    return _wide_agrees[kind]
