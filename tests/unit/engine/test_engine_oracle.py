"""The engine against transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import serverless_llm.demo
from serverless_llm.domain import Sampling
from serverless_llm.engine.config import ModelConfig
from serverless_llm.engine.engine import Engine
from tests.unit.engine.tiny import (
    VARIANTS,
    assert_near_oracle,
    drain,
    entries_of,
    oracle,
    oracle_logits,
    packed,
    prompt,
    serve,
    start,
    tensors_of,
)

transformers = pytest.importorskip("transformers")
MODELS = (transformers.LlamaForCausalLM, transformers.Qwen3ForCausalLM)  # imported here: it takes seconds

DEMOS = sorted(path.parent for path in Path(serverless_llm.demo.__file__).parent.glob("demo-*/model.safetensors"))
LENGTHS = (1, 15, 33, 70, 130)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("weights", ["view", "copy"])
def test_greedy_tokens_are_the_oracles(name: str, weights: str) -> None:
    config = ModelConfig.parse(VARIANTS[name])
    tensors = tensors_of(config)
    engine = Engine(budget=16 << 20, weights=weights)
    serve(engine, config, tensors)
    prompts = {number: prompt(length, number) for number, length in enumerate(LENGTHS)}
    for number, tokens in prompts.items():
        engine.add(start(number, tokens))
    told = drain(engine)
    model = oracle(VARIANTS[name], tensors)
    for number, tokens in prompts.items():
        assert len(told[number][0]) == 12
        assert_near_oracle(model, tokens, told[number][0], switch=config.rope_switch)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_oracle_accepts_our_tensor_names(name: str) -> None:
    config = ModelConfig.parse(VARIANTS[name])
    tensors = tensors_of(config)
    model = oracle(VARIANTS[name], tensors)
    needed = {key for key in model.state_dict() if not (config.tied and key == "lm_head.weight")}
    assert needed == set(packed(tensors))
    assert config.weight_bytes(entries_of(tensors)) >= sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        *((name, torch.bfloat16) for name in VARIANTS),
        *((name, stored) for name in ("llama", "qwen3") for stored in (torch.float32, torch.float16)),
    ],
)
def test_bfloat16_follows_the_oracle(name: str, stored: torch.dtype) -> None:
    """Whatever was stored, served in bfloat16: each choice is near the float32 oracle's best."""
    config = ModelConfig.parse(VARIANTS[name], "bfloat16")
    tensors = tensors_of(config, dtype=stored)
    engine = Engine(budget=16 << 20)
    serve(engine, config, tensors)
    engine.add(start(1, prompt(60)))
    assert_near_oracle(oracle(VARIANTS[name], tensors), prompt(60), drain(engine)[1][0], tolerance=0.05)


@pytest.mark.parametrize("directory", DEMOS, ids=lambda path: path.name)
def test_demo_checkpoints(directory: Path) -> None:
    raw = json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    config = ModelConfig.parse(raw)
    engine = Engine(budget=32 << 20)
    serve(engine, config, tensors)
    text = prompt(24, vocab=config.vocab)
    engine.add(start(1, text, Sampling(temperature=0, max_tokens=24)))
    assert_near_oracle(oracle(raw, tensors), text, drain(engine)[1][0])


@pytest.mark.parametrize("weights", ["view", "copy"])
def test_a_head_that_is_stored_is_the_head_whatever_is_tied(weights: str) -> None:
    raw = VARIANTS["llama-tied"]
    config = ModelConfig.parse(raw)
    tensors = tensors_of(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    engine = Engine(budget=16 << 20, weights=weights)
    serve(engine, config, tensors)
    engine.add(start(1, prompt(33)))
    model = transformers.LlamaForCausalLM.from_pretrained(
        None, config=transformers.LlamaConfig(**raw), state_dict=dict(tensors)
    )
    assert_near_oracle(model.float().eval(), prompt(33), drain(engine)[1][0])


def test_the_oracle_sees_position() -> None:
    """The oracle itself is worth comparing with: it tells a rotated prompt from the prompt."""
    config = ModelConfig.parse(VARIANTS["llama"])
    model = oracle(VARIANTS["llama"], tensors_of(config))
    there, back = oracle_logits(model, prompt(20))[-1], oracle_logits(model, [*prompt(20)[10:], *prompt(20)[:10]])[-1]
    assert not torch.allclose(there, back)
