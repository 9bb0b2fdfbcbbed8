"""Logits against transformers, in deterministic mode and by the path that a CUDA device takes, on a CPU: fused
projections in the arena, one product, torch's own attention."""

from __future__ import annotations

import pytest
import torch

from serverless_llm.domain import Sampling
from serverless_llm.engine.arena import Arena
from serverless_llm.engine.blocks import Range
from serverless_llm.engine.config import ModelConfig, aligned
from serverless_llm.engine.layout import layout
from serverless_llm.engine.model import DTYPES, Model
from serverless_llm.engine.runner import run
from serverless_llm.engine.scheduler import Chunk
from serverless_llm.engine.sequence import Sequence
from tests.unit.engine.tiny import VARIANTS, oracle, oracle_logits, prompt, tensors_of

CPU = torch.device("cpu")
KV = 8 << 20  # where the test's KV begins in the arena, bytes


def model_of(config: ModelConfig, arena: Arena, tiled: bool) -> Model:
    """The model with all its weights copied into the arena, buffer after buffer."""
    buffers, shapes = config.buffers(), config.tensors()
    places, at = [], 0
    for buffer in buffers:
        places.append(at)
        at += aligned(config.buffer_bytes(buffer, shapes))
    stored = tensors_of(config)
    bound = {}
    for name, offset in layout(config, shapes, buffers, places).items():
        bound[name] = arena.tensor(offset, DTYPES[config.dtype], shapes[name])
        bound[name].copy_(stored[name])
    return Model(config, bound, arena, fused=not tiled, tiled=tiled)


def sequence(config: ModelConfig, tokens: list[int], first: int) -> Sequence:
    base = -(-KV // config.kv_layer_bytes) * config.kv_layer_bytes
    groups = config.kv_groups
    count = groups.columns(len(tokens)) * groups.total
    blocks = [base + first * config.kv_column_bytes + number * config.kv_block_bytes for number in range(count)]
    return Sequence(0, 0, 1, 0, tokens, len(tokens), 4096, Sampling(), groups, blocks)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("tiled", [False, True])
def test_logits_are_the_oracles(name: str, tiled: bool) -> None:
    config = ModelConfig.parse(VARIANTS[name])
    arena = Arena(CPU, 16 << 20)
    model = model_of(config, arena, tiled)
    texts = [prompt(70), prompt(33, 1)]
    sequences = [sequence(config, text, 10 * number) for number, text in enumerate(texts)]
    run(model, [Chunk(sequences[0], 40)], CPU)
    sequences[0].cached = 40
    run(model, [Chunk(sequences[1], 32)], CPU)
    sequences[1].cached = 32
    logits = run(model, [Chunk(sequences[0], 30), Chunk(sequences[1], 1)], CPU)
    reference = oracle(VARIANTS[name], tensors_of(config))
    for row, text in zip(logits, texts, strict=True):
        torch.testing.assert_close(row, oracle_logits(reference, text)[-1], rtol=1e-4, atol=1e-4)


def test_a_released_range_reads_as_zero() -> None:
    arena = Arena(CPU, 1 << 20)
    arena.bytes.fill_(7)
    arena.release(Range(5000, 10000))
    assert arena.bytes[:8192].eq(7).all()
    assert arena.bytes[8192:12288].eq(0).all()
    assert arena.bytes[12288:].eq(7).all()
    arena.clear(Range(0, 10))
    assert arena.bytes[:10].eq(0).all()
    assert arena.bytes[10] == 7
