"""Penalties, biases, min-p and logprobs beside transformers' logits processors, in float32."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from serverless_llm.domain import FinishReason, Sampling, Shaping
from serverless_llm.engine.config import ModelConfig
from serverless_llm.engine.engine import Engine
from serverless_llm.engine.sampler import LEAST_LOGPROB, NEVER, _likeliest, draw, likelihood, shaped
from serverless_llm.errors import CapacityError
from tests.unit.engine.tiny import (
    GREEDY,
    config_json,
    drain,
    oracle,
    oracle_logits,
    prompt,
    serve,
    start,
    tensors_of,
)

CONFIG = ModelConfig.parse(config_json())
TENSORS = tensors_of(CONFIG)
PROMPT = prompt(12)
ALL = Shaping(0.5, 0.7, 1.4, ((3, 4.0), (9, -100.0), (70, 2.5)), 5)


def engine() -> Engine:
    made = Engine(budget=16 << 20)
    serve(made, CONFIG, TENSORS)
    return made


def said(sampling: Sampling, tokens: list[int] = PROMPT, generated: list[int] | None = None) -> list[int]:
    made = engine()
    made.add(start(1, tokens, sampling, generated=generated or []))
    return drain(made)[1][0]


def processed(logits: torch.Tensor, prompt_ids: list[int], generated: list[int], shaping: Shaping, stops: list[int]
              ) -> torch.Tensor:  # fmt: skip
    """What transformers makes of a row; its processors for the two penalties that it has not are written out."""
    from transformers import generation

    ids = torch.tensor([prompt_ids + generated])
    row = logits.clone()[None]
    if shaping.logit_bias:
        bias = {(token,): value for token, value in shaping.logit_bias}
        row = generation.SequenceBiasLogitsProcessor(bias)(ids, row)
    row = generation.RepetitionPenaltyLogitsProcessor(shaping.repetition_penalty)(ids, row)
    for token in set(generated):
        row[0, token] -= shaping.frequency_penalty * generated.count(token) + shaping.presence_penalty
    early = generation.MinNewTokensLengthLogitsProcessor(len(prompt_ids), shaping.min_tokens, stops, device="cpu")
    result: torch.Tensor = early(ids, row)[0]
    return result


@pytest.fixture(scope="module")
def model() -> Any:
    return oracle(config_json(), TENSORS)


@pytest.mark.parametrize(
    "shaping",
    [
        Shaping(presence_penalty=2.0),
        Shaping(presence_penalty=-1.0, frequency_penalty=-0.5),
        Shaping(frequency_penalty=1.5),
        Shaping(repetition_penalty=1.8),
        Shaping(repetition_penalty=0.6),
        Shaping(logit_bias=((5, 100.0),)),
        Shaping(logit_bias=((5, -100.0), (6, 3.0))),
        Shaping(min_tokens=9),
        ALL,
    ],
)  # fmt: skip
def test_each_greedy_token_is_the_oracles(model: Any, shaping: Shaping) -> None:
    stops = [7, 30]
    sampling = replace(GREEDY, shaping=shaping, max_tokens=24, stop_ids=tuple(stops))
    got = said(sampling)
    assert len(got) >= min(24, shaping.min_tokens)
    logits = oracle_logits(model, PROMPT + got)[len(PROMPT) - 1 :]
    for place, token in enumerate(got):
        row = processed(logits[place], PROMPT, got[:place], shaping, stops)
        assert row.max() - row[token] <= 1e-4 * logits[place].abs().max()


@pytest.mark.parametrize("shaping", [ALL, Shaping(0.5, 0.0, 1.2), Shaping(0.0, 0.3, 0.8), Shaping(1.5, -0.2, 1.0)])
def test_a_shaped_row_is_the_oracles(shaping: Shaping) -> None:
    generated = [4, 70, 4, PROMPT[0]]
    row = torch.randn(160, generator=torch.Generator().manual_seed(1))
    made = engine()._sequence(start(1, PROMPT, replace(GREEDY, shaping=shaping), generated=generated), CONFIG)
    got = shaped(row, Sampling(stop_ids=(7, 30), shaping=shaping), made.counts or {}, made.generated)
    expected = processed(row, PROMPT, generated, shaping, [7, 30])
    allowed = expected.isfinite()
    torch.testing.assert_close(got[allowed], expected[allowed], atol=1e-6, rtol=1e-6)
    assert bool((got[~allowed] == NEVER).all())


def test_the_penalties_change_what_is_said() -> None:
    plain = said(replace(GREEDY, max_tokens=24))
    for shaping in (Shaping(presence_penalty=2.0), Shaping(frequency_penalty=2.0), Shaping(repetition_penalty=2.0)):
        assert said(replace(GREEDY, max_tokens=24, shaping=shaping)) != plain
    assert said(replace(GREEDY, max_tokens=3, shaping=Shaping(logit_bias=((5, 100.0),)))) == [5, 5, 5]


@pytest.mark.parametrize("cut", [1, 5, 11, 23])
def test_a_resumed_sequence_goes_on_with_the_same_counts(cut: int) -> None:
    sampling = Sampling(temperature=0.9, seed=4, max_tokens=24, min_p=0.02, shaping=ALL, stop_ids=(7, 30))
    whole = said(sampling)
    assert whole[cut:] == said(sampling, generated=whole[:cut])


def test_likelihoods_go_on_where_they_were() -> None:
    sampling = replace(GREEDY, max_tokens=8, logprobs=2, shaping=Shaping(frequency_penalty=1.0))
    told: list[Any] = []
    for generated in ([], said(sampling)[:5]):
        made = engine()
        made.add(start(1, PROMPT, sampling, generated=generated))
        told.append([])
        while made.runnable:
            told[-1] += made.step().likelihoods[1]
    assert told[0][5:] == told[1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logprobs_are_the_oracles(model: Any, temperature: float) -> None:
    made = engine()
    made.add(start(1, PROMPT, Sampling(temperature=temperature, seed=3, max_tokens=10, logprobs=4)))
    made.add(start(2, PROMPT, Sampling(temperature=temperature, seed=3, max_tokens=10)))
    tokens, told = [], []
    while made.runnable:
        result = made.step()
        assert set(result.likelihoods) == {1}
        tokens += [token for emission in result.tokens if emission.sequence == 1 for token in emission.tokens]
        told += result.likelihoods[1]
    expected = torch.log_softmax(oracle_logits(model, PROMPT + tokens)[len(PROMPT) - 1 : -1].float(), dim=-1)
    for row, token, one in zip(expected, tokens, told, strict=True):
        torch.testing.assert_close(torch.tensor(one.logprob), row[token], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(torch.tensor(one.logprobs), row.topk(4).values, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(row[one.tokens], row.topk(4).values, atol=1e-4, rtol=1e-4)


@given(st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=30), st.floats(0, 1), st.floats(0.1, 2))
def test_min_p_leaves_what_transformers_leaves(logits: list[float], min_p: float, temperature: float) -> None:
    from transformers import generation

    row = torch.tensor(logits)
    warped = generation.MinPLogitsWarper(min_p)(torch.zeros(1, 0), row.double()[None] / temperature)
    allowed = set(warped[0].isfinite().nonzero()[:, 0].tolist())
    sampling = Sampling(temperature=temperature, min_p=min_p)
    assert {draw(row, sampling, position) for position in range(60)} <= allowed


LOGITS = st.sampled_from([-30.0, -2.0, -1.0, 0.0, 0.5, 3.0]) | st.floats(-20, 20, width=32)
SHARES = st.sampled_from([0.1, 0.5, 0.9, 0.999, 1.0]) | st.floats(0.01, 1)


@given(st.lists(LOGITS, min_size=1, max_size=40), st.integers(0, 45), SHARES, st.floats(0, 1))
@example([0.0, 0.0, -8.0, 0.5], 45, 0.9995, 0.0)
@example([0.0, -7.0, -7.0, -7.0, -7.0], 5, 0.999, 0.0)
def test_what_is_left_is_what_sorting_everything_leaves(logits: list[float], top_k: int, top_p: float, min_p: float
                                                        ) -> None:  # fmt: skip
    weights = torch.softmax(torch.tensor(logits).double(), dim=-1)
    sampling = Sampling(top_k=top_k, top_p=top_p, min_p=min_p)
    order = sorted(range(len(logits)), key=lambda token: (-float(weights[token]), token))[: top_k or None]
    total, before, expected = sum(float(weights[token]) for token in order), 0.0, []
    for token in order:
        if abs(before - top_p * total) < 1e-9:
            return  # rounding decides
        if before >= top_p * total or weights[token] < min_p * weights[order[0]]:
            break
        expected.append(token)
        before += float(weights[token])
    assert _likeliest(weights, sampling)[1].tolist() == expected


def test_min_p_drops_what_is_unlikely() -> None:
    row = torch.tensor([0.0, 2.0, 1.0, 2.0, -3.0])
    assert {draw(row, Sampling(min_p=0.3), position) for position in range(200)} == {1, 2, 3}
    assert {draw(row, Sampling(min_p=1.0), position) for position in range(200)} == {1, 3}


def test_stop_ids_wait_until_min_tokens() -> None:
    bias = ((7, 100.0),)
    sampling = replace(GREEDY, stop_ids=(7, 5000), shaping=Shaping(logit_bias=bias, min_tokens=4))
    made = engine()
    made.add(start(1, PROMPT, sampling))
    tokens, finish = drain(made)[1]
    assert (len(tokens), tokens[-1], finish) == (5, 7, FinishReason.STOP)
    assert 7 not in tokens[:-1]


def test_where_every_token_is_a_stop_id_one_comes_after_all() -> None:
    stops = tuple(range(CONFIG.vocab))
    for temperature in (0.0, 1.0):
        sampling = Sampling(temperature, stop_ids=stops, shaping=Shaping(min_tokens=4), max_tokens=9)
        assert len(said(sampling)) == 1


def test_a_bias_outside_the_vocabulary_is_refused() -> None:
    for token in (-1, 160):
        with pytest.raises(CapacityError, match="token ids"):
            engine().add(start(1, PROMPT, replace(GREEDY, shaping=Shaping(logit_bias=((token, 1.0),)))))


def test_shaping_leaves_the_models_row_alone() -> None:
    row = torch.arange(160, dtype=torch.float32)
    shaped(row, Sampling(shaping=ALL, stop_ids=(7,)), {1: 2}, 0)
    assert row.tolist() == list(range(160))


def test_of_equal_tokens_the_lower_id_is_told_and_nothing_is_infinite() -> None:
    told = likelihood(torch.tensor([0.0, 1.0, 1.0, -torch.inf, 1.0]), 3, 2)
    assert (told.logprob, told.tokens) == (LEAST_LOGPROB, [1, 2])
    assert len(likelihood(torch.zeros(3), 0, 20).tokens) == 3
    assert likelihood(torch.zeros(4), 0, 0)[1:] == ([], [])


def test_preempted_sequences_say_the_same() -> None:
    sampling = Sampling(temperature=0.8, seed=2, max_tokens=20, min_p=0.01, shaping=ALL)
    expected = said(sampling)
    made = engine()
    made.add(start(1, PROMPT, sampling))
    got = [token for _ in range(7) for emission in made.step().tokens for token in emission.tokens]
    made.reserve(made.arena.numel() - CONFIG.weight_bytes())
    assert got + drain(made)[1][0] == expected
