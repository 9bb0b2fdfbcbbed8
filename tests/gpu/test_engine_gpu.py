"""The engine on a CUDA device: weights copied into its arena, gather and SDPA."""

from __future__ import annotations

import pytest
import torch

from serverless_llm.domain import FinishReason, Sampling, Shaping
from serverless_llm.engine.config import ModelConfig
from serverless_llm.engine.engine import Engine
from serverless_llm.engine.sampler import draw, likelihood, shaped
from tests.unit.engine.test_fallback import EVERY, plain
from tests.unit.engine.tiny import (
    GREEDY,
    VARIANTS,
    assert_near_oracle,
    drain,
    oracle,
    prompt,
    serve,
    start,
    tensors_of,
)

pytestmark = pytest.mark.gpu
MIB = 1 << 20


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_greedy_tokens_are_the_oracles(name: str, dtype: str, tolerance: float) -> None:
    config = ModelConfig.parse(VARIANTS[name], dtype)
    tensors = tensors_of(config, dtype=torch.float32 if dtype == "float32" else torch.bfloat16)
    engine = Engine("cuda:0", 64 * MIB)
    serve(engine, config, tensors)
    prompts = {number: prompt(length, number) for number, length in enumerate((1, 15, 33, 130))}
    for number, tokens in prompts.items():
        engine.add(start(number, tokens))
    told = drain(engine)
    model = oracle(VARIANTS[name], tensors)
    for number, tokens in prompts.items():
        assert told[number][1] is FinishReason.LENGTH
        assert_near_oracle(model, tokens, told[number][0], tolerance, config.rope_switch)


def test_conversion_on_the_way_to_the_device() -> None:
    config = ModelConfig.parse(VARIANTS["qwen3"], "bfloat16")
    tensors = tensors_of(config)
    engine = Engine("cuda:0", 64 * MIB)
    serve(engine, config, tensors)
    engine.add(start(1, prompt(40)))
    assert_near_oracle(oracle(VARIANTS["qwen3"], tensors), prompt(40), drain(engine)[1][0], 0.1)


def test_a_tight_arena_preempts_and_resumes() -> None:
    config = ModelConfig.parse(VARIANTS["llama"])
    tensors = tensors_of(config)
    engine = Engine("cuda:0", MIB)
    serve(engine, config, tensors)
    sampling = Sampling(temperature=0.8, seed=5, max_tokens=60)
    for number in range(8):
        engine.add(start(number, prompt(100, number), sampling if number % 2 else GREEDY))
    told = drain(engine)
    assert all(finish is FinishReason.LENGTH for _, finish in told.values())
    assert engine.kv_used == 0


def test_models_share_the_device() -> None:
    engine = Engine("cuda:0", 16 * MIB)
    for replica, name in enumerate(("llama", "qwen3-tied"), start=1):
        config = ModelConfig.parse(VARIANTS[name])
        serve(engine, config, tensors_of(config), replica=replica)
        engine.add(start(replica, prompt(30), replica=replica))
    first = {emission.sequence for _ in range(2) for emission in engine.step().tokens}
    assert first == {1, 2}
    engine.drop(1)
    assert set(drain(engine)) == {2}


def test_shaping_and_logprobs_are_those_of_a_cpu() -> None:
    logits = torch.randn(160, generator=torch.Generator().manual_seed(1))
    shaping = Shaping(0.5, 0.7, 1.4, ((3, 4.0), (9, -100.0)), 5)
    sampling = Sampling(stop_ids=(7, 500), shaping=shaping, min_p=0.05)
    counts = {4: 2, 70: 0, 9: 1}
    here, there = (shaped(row, sampling, counts, 3) for row in (logits, logits.cuda()))
    torch.testing.assert_close(there.cpu(), here)
    assert [draw(there, sampling, at) for at in range(50)] == [draw(here, sampling, at) for at in range(50)]
    told, expected = likelihood(logits.cuda(), 5, 4), likelihood(logits, 5, 4)
    assert told.tokens == expected.tokens
    assert told.logprobs == pytest.approx(expected.logprobs)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.1)])
@pytest.mark.parametrize("which", ["gpt2", "cohere2-window", "sinks", "latent", "olmoe", "deepseek-v3"])
def test_decoders_of_transformers_stay_in_the_arena(which: str, dtype: str, tolerance: float) -> None:
    values, model, tensors = plain(*EVERY[which])
    config = ModelConfig.parse(values, dtype)
    engine = Engine("cuda:0", 64 * MIB)
    serve(engine, config, tensors if dtype == "float32" else {n: t.bfloat16() for n, t in tensors.items()})
    engine.add(start(1, prompt(40)))
    assert_near_oracle(model, prompt(40), drain(engine)[1][0], tolerance)
