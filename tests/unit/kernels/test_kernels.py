"""Each kernel against a plain computation, and against itself in another company of rows."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st

from serverless_llm.domain import BLOCK_TOKENS
from serverless_llm.kernels import attention
from serverless_llm.kernels.activation import (
    gelu_tanh_gate,
    plain_gelu_tanh_gate,
    plain_silu_gate,
    relu_gate,
    silu_gate,
    soft_cap,
)
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
from serverless_llm.kernels.experts import mix, route
from serverless_llm.kernels.linear import TILE, WIDE, padded, tiled_linear, wide_agrees
from serverless_llm.kernels.norm import layer_norm, rms_norm, wide_rms_norm
from serverless_llm.kernels.rope import frequencies, rotate, rotate_part, table
from serverless_llm.kernels.rope_kinds import Rope


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rows", "expected"), [(0, 0), (1, TILE), (TILE, TILE), (TILE + 1, 2 * TILE)])
def test_padded(rows: int, expected: int) -> None:
    assert padded(rows) == expected


@pytest.mark.parametrize("tiles", [0, 1, 3, 4, 9])
def test_tiled_linear(tiles: int) -> None:
    x, weight, bias = random(tiles * TILE, 40), random(24, 40, seed=1), random(24, seed=2)
    torch.testing.assert_close(tiled_linear(x, weight.t(), bias), F.linear(x, weight, bias))
    torch.testing.assert_close(tiled_linear(x, weight.t(), None), F.linear(x, weight))


@given(
    st.integers(1, 90).map(lambda size: 4 * size),
    st.integers(1, 200),
    st.integers(0, TILE - 1),
    st.integers(0, 2 * WIDE + TILE - 1),
    st.integers(0, 9),
)
def test_a_linear_row_is_its_own(inner: int, outer: int, here: int, there: int, shift: int) -> None:
    """Same bits at any place, in any tile, beside any rows, from weights at any address."""
    weight, row = random(outer, inner), random(inner, seed=1)
    one, two = random(TILE, inner, seed=2), random(2 * WIDE + TILE, inner, seed=3)
    one[here] = two[there] = row
    moved = torch.empty(outer * inner + 16)[shift : shift + outer * inner].view(outer, inner).copy_(weight)
    assert torch.equal(tiled_linear(one, weight.t(), None)[here], tiled_linear(two, moved.t(), None)[there])


def test_wide_products_are_used_only_where_they_agree() -> None:
    """An honest shape agrees here; NaN never equals itself, so that such weights stay with narrow tiles."""
    x = random(WIDE, 52)
    assert wide_agrees(random(36, 52, seed=1).t())
    weight_t = torch.full((36, 60), torch.nan).t()
    assert not wide_agrees(weight_t)
    assert wide_agrees(random(60, 36, seed=1))  # as large, but rows lie another way, and other products are taken
    assert tiled_linear(torch.ones(WIDE, 60), weight_t, None).isnan().all()
    assert torch.equal(
        tiled_linear(x, random(36, 52, seed=1).t(), None)[-TILE:],
        tiled_linear(x[-TILE:].clone(), random(36, 52, seed=1).t(), None),
    )


@given(st.integers(1, 40), st.integers(1, 70), st.data())
def test_elementwise_rows_are_their_own(rows: int, width: int, data: st.DataObject) -> None:
    x, y = random(rows, width) * 4, random(rows, width, seed=1)
    first = data.draw(st.integers(0, rows - 1))
    for gate in (silu_gate, gelu_tanh_gate, relu_gate):
        assert torch.equal(gate(x[first:].clone(), y[first:]), gate(x.clone(), y)[first:])
    assert torch.equal(soft_cap(x[first:].clone(), 3.0), soft_cap(x.clone(), 3.0)[first:])
    for norm in (rms_norm, wide_rms_norm):
        assert torch.equal(norm(x[first:], y[0], 1e-6), norm(x, y[0], 1e-6)[first:])
    assert torch.equal(layer_norm(x[first:], y[0], y[-1], 1e-5), layer_norm(x, y[0], y[-1], 1e-5)[first:])
    routes, rest = route(x, min(3, width), True), route(x[first:], min(3, width), True)
    assert torch.equal(routes.expert[first:], rest.expert)
    assert torch.equal(routes.weight[first:], rest.weight)


def test_gates() -> None:
    gate, up = torch.tensor([-200.0, -5.0, -0.1, 0.0, 3.0, 200.0]), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    for silu in (silu_gate, plain_silu_gate):
        torch.testing.assert_close(silu(gate.clone(), up), F.silu(gate) * up)
    for gelu in (gelu_tanh_gate, plain_gelu_tanh_gate):
        torch.testing.assert_close(gelu(gate.clone(), up), F.gelu(gate, approximate="tanh") * up)
    torch.testing.assert_close(relu_gate(gate.clone(), up), F.relu(gate) * up)


def test_soft_cap() -> None:
    x = torch.tensor([-1e9, -40.0, -0.5, 0.0, 1e-3, 20.0, 1e9])
    torch.testing.assert_close(soft_cap(x.clone(), 30.0), 30 * (x / 30).tanh(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(dtype: torch.dtype) -> None:
    x, weight = random(5, 3, 32).to(dtype), random(32, seed=1).to(dtype)
    expected = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    out = rms_norm(x, weight, 1e-5)
    assert out.dtype is dtype
    torch.testing.assert_close(out.double(), expected, rtol=1e-5 if dtype is torch.float32 else 2e-2, atol=1e-6)


def test_rotate_turns_pairs_by_position_times_frequency() -> None:
    frequency = frequencies(Rope(100.0, 8))
    cosine, sine = table(frequency, 5, 3)
    x = random(3, 2, 8)
    turned = rotate(x, cosine[:, None], sine[:, None])
    for token, head, pair in ((0, 0, 0), (1, 1, 2), (2, 0, 3)):
        angle = (5 + token) * 100.0 ** (-2 * pair / 8)
        a, b = float(x[token, head, pair]), float(x[token, head, pair + 4])
        real, imaginary = float(turned[token, head, pair]), float(turned[token, head, pair + 4])
        expected = complex(a, b) * complex(math.cos(angle), math.sin(angle))
        assert complex(real, imaginary) == pytest.approx(expected, abs=1e-5)


def test_a_part_of_each_head_is_turned() -> None:
    cosine, sine = table(frequencies(Rope(100.0, 4)), 0, 3)
    x = random(3, 2, 8)
    turned = rotate_part(x, cosine[:, None], sine[:, None])
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert torch.equal(turned[..., :4], rotate(x[..., :4], cosine[:, None], sine[:, None]))


def test_two_sets_of_frequencies_alternate_in_the_table() -> None:
    rope = Rope(100.0, 4, "longrope", original_context=8, short_factors=(1.0, 2.0), long_factors=(4.0, 8.0))
    cosine, _ = table(frequencies(rope), 5, 2)
    torch.testing.assert_close(cosine[:, 1], torch.tensor([5 / 2, 5 / 8, 6 / 2, 6 / 8]).div(10).cos())


def test_scaled_frequencies() -> None:
    plain = frequencies(Rope(10000.0, 64))
    torch.testing.assert_close(frequencies(Rope(10000.0, 64, "linear", factor=4.0)), plain / 4)
    stretched = frequencies(Rope(10000.0, 64, "llama3", 8.0, 1024, 1.0, 4.0))
    wavelength = 2 * math.pi / plain
    assert torch.equal(stretched[wavelength < 256], plain[wavelength < 256])
    torch.testing.assert_close(stretched[wavelength > 1024], plain[wavelength > 1024] / 8)
    middle = (wavelength > 256) & (wavelength < 1024)
    assert bool(((stretched < plain) & (stretched > plain / 8))[middle].all())


class Paged:
    """Sequences of random K and V in an arena with garbage between their blocks."""

    def __init__(self, lengths: list[int], heads: int, kv_heads: int, size: int) -> None:
        self.heads, self.group = heads, heads // kv_heads
        self.k = [random(length, kv_heads, size, seed=10 + n) for n, length in enumerate(lengths)]
        self.v = [random(length, kv_heads, size, seed=50 + n) for n, length in enumerate(lengths)]
        blocks = sum(-(-length // BLOCK_TOKENS) for length in lengths)
        self.kv = torch.full((2 * blocks + 2, 2, BLOCK_TOKENS, kv_heads, size), 1e6)
        free = torch.randperm(blocks, generator=torch.Generator().manual_seed(1)).tolist()
        self.rows: list[list[int]] = []
        for k, v in zip(self.k, self.v, strict=True):
            self.rows.append([2 * free.pop() for _ in range(0, len(k), BLOCK_TOKENS)])
            for token in range(len(k)):
                row = self.rows[-1][token // BLOCK_TOKENS] + 1  # layer 1
                self.kv[row, 0, token % BLOCK_TOKENS], self.kv[row, 1, token % BLOCK_TOKENS] = k[token], v[token]

    def expected(
        self,
        sequence: int,
        q: torch.Tensor,
        window: int = 10**9,
        cap: float = 0.0,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`q`: [n, A, D], the sequence's last n tokens."""
        k, v = (x[sequence].repeat_interleave(self.group, 1).double() for x in (self.k, self.v))
        scores = torch.einsum("tad,kad->atk", q.double(), k) * q.shape[-1] ** -0.5
        scores = (scores / cap).tanh() * cap if cap else scores
        position = torch.arange(len(k) - len(q), len(k))[:, None]
        key = torch.arange(len(k))[None, :]
        scores.masked_fill_((key > position) | (key <= position - window), -torch.inf)
        if sinks is not None:
            scores = torch.cat((scores, sinks.double()[:, None, None].expand(-1, len(q), -1)), dim=-1)
        return torch.einsum("atk,kad->tad", scores.softmax(-1)[..., : len(k)], v).flatten(1).float()

    def last(
        self,
        sequences: list[int],
        chunks: int,
        how: Scores,
        window: int = 0,
        skip: bool = False,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Tiled attention of the last token of each sequence, tables filled up to so many chunks; [N, A * D].

        `skip`: chunks before the window are left out of the tables.
        """
        size, heads = self.kv.shape[-1], self.heads
        width = tile_tokens(heads, heads // self.group)
        length = [len(self.k[n]) for n in sequences]
        first = [max(0, count - window) // CHUNK if skip else 0 for count in length]
        rows = [self.rows[n][begin * CHUNK_BLOCKS :] for n, begin in zip(sequences, first, strict=True)]
        table = [row + [row[0]] * (chunks * CHUNK_BLOCKS - len(row)) for row in rows]
        position = torch.tensor([[count - 1] * width for count in length])
        hidden = hidden_keys(position, chunks, self.group, window, torch.tensor(first) if skip else None)
        tile = Tile(torch.arange(len(rows)).repeat_interleave(width), chunks, hidden)
        q = torch.stack([random(heads, size, seed=n) for n in sequences])
        groups = [TileGroup(torch.tensor(table).ravel(), len(rows), [tile])]
        return tiled_attention(q, self.kv, 1, groups, how, sinks)


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 16), (4, 4, 8), (6, 1, 24), (40, 2, 8)])
@pytest.mark.parametrize(
    ("window", "cap", "sinking"),
    [(0, 0.0, False), (1, 0.0, False), (70, 0.0, True), (0, 0.5, False), (33, 2.0, True), (0, 0.0, True)],
)
def test_tiled_attention(heads: int, kv_heads: int, size: int, window: int, cap: float, sinking: bool) -> None:
    paged = Paged([1, 40, 200], heads, kv_heads, size)
    sinks = 3 * random(heads, seed=5) if sinking else None
    out = paged.last([0, 1, 2], -(-200 // CHUNK), Scores(size**-0.5, cap), window, sinks=sinks)
    for n in range(3):
        q = random(heads, size, seed=n)[None]
        expected = paged.expected(n, q, window or 10**9, cap, sinks)
        torch.testing.assert_close(out[n : n + 1], expected, rtol=1e-4, atol=1e-5)


def test_company_does_not_change_a_long_sequence() -> None:
    """Bit by bit the same alone, beside others, and with tables filled up to any length."""
    paged = Paged([1300, 700, 3, 2100], 4, 2, 16)
    for sinks in (None, random(4, seed=3)):
        together = paged.last([0, 1, 2, 3], 40, Scores(0.25), sinks=sinks)
        for n, chunks in ((0, 21), (1, 11), (2, 1), (3, 33)):
            assert torch.equal(paged.last([n], chunks, Scores(0.25), sinks=sinks)[0], together[n])


@pytest.mark.parametrize("window", [1, 63, 64, 65, 130, 700])
def test_chunks_before_the_window_need_not_be_there(window: int) -> None:
    """Bit by bit: what is hidden adds zeros."""
    paged = Paged([1300, 700, 3], 4, 2, 16)
    whole = paged.last([0, 1, 2], 21, Scores(0.25), window)
    chunks = -(-window // CHUNK) + 1
    assert torch.equal(paged.last([0, 1, 2], chunks, Scores(0.25), window, skip=True), whole)


@pytest.mark.parametrize("n", [1, 30])
@pytest.mark.parametrize(("cap", "sinking"), [(0.0, False), (1.5, False), (0.0, True), (1.5, True)])
def test_gathered_attention(n: int, cap: float, sinking: bool) -> None:
    paged = Paged([50, 33], 4, 2, 16)
    q = random(2 * n, 4, 16)
    spans = []
    for number, length in enumerate((50, 33)):
        visible = torch.arange(length)[None, :] <= torch.arange(length - n, length)[:, None]
        rows = torch.tensor(paged.rows[number])
        spans.append(Span(number * n, number * n + n, rows, length, None if n == 1 else visible))
    sinks = 3 * random(4, seed=5) if sinking else None
    out = gathered_attention(q, paged.kv, 1, spans, Scores(0.25, cap), sinks)
    for number in range(2):
        part = slice(number * n, number * n + n)
        expected = paged.expected(number, q[part], cap=cap, sinks=sinks)
        torch.testing.assert_close(out[part], expected, rtol=1e-4, atol=1e-5)


def test_capped_attention_takes_long_queries_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    paged = Paged([60], 4, 2, 16)
    q = random(40, 4, 16)
    visible = torch.arange(60)[None, :] <= torch.arange(20, 60)[:, None]
    spans = [Span(0, 40, torch.tensor(paged.rows[0]), 60, visible)]
    monkeypatch.setattr(attention, "FULL_QUERIES", 16)
    out = gathered_attention(q, paged.kv, 1, spans, Scores(0.25, 2.0))
    torch.testing.assert_close(out, paged.expected(0, q, cap=2.0), rtol=1e-4, atol=1e-5)


def test_a_mixture_of_experts() -> None:
    """Against each token's own sum, with more rows than routes."""
    x, logits, weights = random(7, 8), random(5, 4, seed=1), random(4, 8, 8, seed=2)
    for normalised in (True, False):
        routes = route(logits, 2, normalised)
        out = mix(x, routes, 4, lambda number, rows: rows @ weights[number])
        for token in range(5):
            share = logits[token].softmax(0)
            best = share.topk(2).indices
            share = share[best] / (share[best].sum() if normalised else 1)
            expected = sum(float(s) * (x[token] @ weights[number]) for s, number in zip(share, best, strict=True))
            torch.testing.assert_close(out[token], expected)
        assert out[5:].eq(0).all()
