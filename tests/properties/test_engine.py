"""Deterministic mode: a token's logits are the same bit by bit, however its sequence came to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serverless_llm.domain import Sampling, Shaping
from serverless_llm.engine.architectures.registry import NATIVE
from serverless_llm.engine.arena import Arena
from serverless_llm.engine.config import ModelConfig
from serverless_llm.engine.engine import Engine
from serverless_llm.engine.model import Model
from serverless_llm.engine.runner import run
from serverless_llm.engine.scheduler import Chunk
from serverless_llm.engine.sequence import Sequence
from tests.unit.engine.tiny import VARIANTS, config_json, drain, prompt, serve, start, tensors_of

CPU = torch.device("cpu")
SIZES = st.sampled_from([8, 24, 40, 64, 72, 128])


WINDOW = st.sampled_from([1, 16, 40, 64, 100])


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Any native architecture, in any of the ways that its mathematics can differ."""
    architecture = draw(st.sampled_from([one.name for one in NATIVE]))
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    heads = kv_heads * draw(st.sampled_from([1, 2, 3, 7]))
    size = draw(st.sampled_from([8, 16, 24, 64]))
    keys = {
        "hidden_size": draw(SIZES) if architecture != "OPTForCausalLM" else heads * size,
        "intermediate_size": draw(st.sampled_from([8, 36, 96, 172])),
        "num_key_value_heads": kv_heads,
        "num_attention_heads": heads,
        "head_dim": size,
        "vocab_size": draw(st.sampled_from([50, 160, 257])),
        "attention_bias": draw(st.booleans()),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "max_position_embeddings": 512,
    } | draw(different(architecture))
    return ModelConfig.parse(config_json(architecture, **keys))


def different(architecture: str) -> st.SearchStrategy[dict[str, Any]]:
    """What an architecture can vary beyond the sizes of all."""
    if architecture in ("MistralForCausalLM", "MixtralForCausalLM", "Phi3ForCausalLM", "Gemma2ForCausalLM"):
        return st.fixed_dictionaries({"sliding_window": WINDOW})
    if architecture == "Gemma3ForCausalLM":
        return st.fixed_dictionaries({"sliding_window": WINDOW, "sliding_window_pattern": st.integers(1, 3)})
    if architecture == "OPTForCausalLM":
        return st.fixed_dictionaries(
            {
                "do_layer_norm_before": st.booleans(),
                "word_embed_proj_dim": st.sampled_from([None, 32]),
                "enable_bias": st.booleans(),
            }
        )
    if architecture == "Qwen3MoeForCausalLM":
        return st.fixed_dictionaries({"norm_topk_prob": st.booleans(), "num_experts_per_tok": st.integers(1, 6)})
    return st.just({})


class Bed:
    """A model over an arena full of stale numbers, to run sequences in hand-made steps."""

    def __init__(self, config: ModelConfig, shift: int = 0) -> None:
        self.arena = Arena(CPU, 16 << 20)
        self.model = Model(config, tensors_of(config), self.arena, fused=False, tiled=True)
        self._next = shift
        self._stale = torch.full((config.kv_block_bytes // 4,), 3e4).view(torch.uint8)

    def sequence(self, tokens: list[int]) -> Sequence:
        blocks = []
        groups = self.model.config.kv_groups
        for _ in range(groups.columns(len(tokens)) * groups.total):
            blocks.append(self._next * self.model.config.kv_block_bytes)
            self.arena.bytes[blocks[-1] : blocks[-1] + self.model.config.kv_block_bytes] = self._stale
            self._next += 1
        return Sequence(0, 0, 1, 0, tokens, len(tokens), 4096, Sampling(), groups, blocks)

    def step(self, *parts: tuple[Sequence, int]) -> torch.Tensor:
        logits = run(self.model, [Chunk(sequence, tokens) for sequence, tokens in parts], CPU)
        for sequence, tokens in parts:
            sequence.cached += tokens
        return logits

    def alone(self, tokens: list[int]) -> torch.Tensor:
        return self.step((self.sequence(tokens), len(tokens)))[0]


def splits(total: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(1, total - 1), unique=True, max_size=6).map(
        lambda cuts: [b - a for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), total], strict=True)]
    )


@pytest.mark.slow
@given(configs(), st.integers(2, 150), st.data())
@settings(max_examples=40)
def test_chunks_do_not_matter(config: ModelConfig, length: int, data: st.DataObject) -> None:
    tokens = prompt(length, seed=length, vocab=config.vocab)
    bed = Bed(config, shift=data.draw(st.integers(0, 5)))
    expected = Bed(config).alone(tokens)
    sequence = bed.sequence(tokens)
    logits = [bed.step((sequence, part)) for part in data.draw(splits(length))]
    assert torch.equal(logits[-1][0], expected)


@pytest.mark.slow
@given(configs(), st.lists(st.integers(1, 140), min_size=2, max_size=12), st.data())
@settings(max_examples=25)
def test_batches_do_not_matter(config: ModelConfig, lengths: list[int], data: st.DataObject) -> None:
    """Sequences of any lengths in one step, part of them decoding, give what each gives alone."""
    texts = [prompt(length, seed=number, vocab=config.vocab) for number, length in enumerate(lengths)]
    bed = Bed(config)
    sequences = [bed.sequence(text) for text in texts]
    for sequence in sequences:
        if len(sequence.tokens) > 1 and data.draw(st.booleans()):
            bed.step((sequence, len(sequence.tokens) - 1))
    together = bed.step(*((sequence, sequence.missing) for sequence in sequences))
    for logits, text in zip(together, texts, strict=True):
        assert torch.equal(logits, Bed(config).alone(text))


@pytest.mark.slow
@pytest.mark.parametrize(("hidden", "threads"), [(64, 1), (128, 1), (1024, 1), (128, 2)])
def test_widths_of_real_models(hidden: int, threads: int) -> None:
    config = ModelConfig.parse(
        config_json(
            "Qwen3ForCausalLM",
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_attention_heads=hidden // 32,
            num_key_value_heads=hidden // 64,
            head_dim=64,
            vocab_size=1000,
        )
    )
    torch.set_num_threads(threads)
    try:
        texts = [prompt(length, seed=length, vocab=1000) for length in (1, 17, 64, 65, 200)]
        bed = Bed(config)
        sequences = [bed.sequence(text) for text in texts]
        for sequence in sequences[1:]:
            bed.step((sequence, sequence.missing // 2))
        together = bed.step(*((sequence, sequence.missing) for sequence in sequences))
        for logits, text in zip(together, texts, strict=True):
            assert torch.equal(logits, Bed(config).alone(text))
    finally:
        torch.set_num_threads(1)


def generations(config: ModelConfig, sampling: Sampling) -> Iterator[tuple[int, list[int]]]:
    """Each of some prompts, generated alone in a roomy engine."""
    for number, length in enumerate((3, 40, 16, 77)):
        engine = Engine(budget=16 << 20)
        serve(engine, config, tensors_of(config))
        engine.add(start(number, prompt(length, number), sampling))
        yield number, drain(engine)[number][0]


SAMPLINGS = (
    Sampling(temperature=0.0, max_tokens=40),
    Sampling(temperature=0.9, seed=7, max_tokens=40),
    Sampling(temperature=1.3, top_k=20, top_p=0.9, seed=-3, max_tokens=40),
    Sampling(seed=9, max_tokens=40, min_p=0.01, shaping=Shaping(0.5, 0.2, 1.2, ((5, 3.0),), 9), stop_ids=(5, 6, 7)),
)


def tight(config: ModelConfig, weights: str, sampling: Sampling) -> dict[int, list[int]]:
    """The same prompts in one engine without room for all of them at a time."""
    tensors = tensors_of(config)
    engine = Engine(budget=config.weight_bytes() + 12 * config.kv_column_bytes + (64 << 10), weights=weights)
    serve(engine, config, tensors)
    for number, length in enumerate((3, 40, 16, 77)):
        engine.add(start(number, prompt(length, number), sampling))
    return {number: tokens for number, (tokens, _) in drain(engine).items()}


@pytest.mark.slow
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("weights", ["view", "copy"])
def test_a_tight_engine_says_the_same(sampling: Sampling, weights: str) -> None:
    """Batched and preempted for want of KV, in either weights mode: the tokens are those of each sequence alone."""
    config = ModelConfig.parse(config_json())
    assert tight(config, weights, sampling) == dict(generations(config, sampling))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "llama"])
def test_a_tight_engine_says_the_same_in_every_architecture(name: str) -> None:
    config = ModelConfig.parse(VARIANTS[name])
    assert tight(config, "view", SAMPLINGS[1]) == dict(generations(config, SAMPLINGS[1]))


@pytest.mark.slow
@given(st.integers(0, 39), st.sampled_from(SAMPLINGS))
@settings(max_examples=15)
def test_a_killed_worker_changes_nothing(at: int, sampling: Sampling) -> None:
    resumed_at(at, ModelConfig.parse(config_json()), sampling)


@pytest.mark.slow
@given(st.integers(0, 39), st.sampled_from(sorted(VARIANTS)))
@settings(max_examples=15)
def test_a_killed_worker_changes_nothing_in_any_architecture(at: int, name: str) -> None:
    resumed_at(at, ModelConfig.parse(VARIANTS[name]), SAMPLINGS[0])


@pytest.mark.parametrize("at", [0, 36, 37, 38, 39])
def test_a_killed_worker_changes_nothing_where_frequencies_switch(at: int) -> None:
    resumed_at(at, ModelConfig.parse(VARIANTS["phi3-longrope"]), SAMPLINGS[0])


def resumed_at(at: int, config: ModelConfig, sampling: Sampling) -> None:
    """Resumed elsewhere from any position of its token log, a sequence says what it would have said."""
    number, expected = next(generations(config, sampling))
    engine = Engine(budget=16 << 20)
    serve(engine, config, tensors_of(config))
    engine.add(start(9, prompt(30, 5)))
    engine.step()
    engine.add(start(number, prompt(3, number), sampling, generated=expected[:at], epoch=1))
    assert expected[:at] + drain(engine)[number][0] == expected
