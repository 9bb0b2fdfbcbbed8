"""A decoder that transformers computes, from its files to its tokens, by real processes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from serverless_llm.demo import tasks
from tests.integration.cluster import agent, ended, serving
from tests.unit.engine.test_fallback import EVERY, plain
from tests.unit.engine.tiny import assert_near_oracle, prompt

pytestmark = pytest.mark.storm  # seconds, to import transformers


@pytest.mark.parametrize("weights", ["view", "copy"])
def test_packed_experts_of_transformers_are_served(tmp_path: Path, weights: str) -> None:
    values, model, tensors = plain(*EVERY["olmoe"])
    source = tmp_path / "olmoe"
    source.mkdir()
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(values))
    options = agent(tmp_path, weights=weights)

    async def tell() -> None:
        try:
            async with serving(tmp_path, options) as cluster:
                await cluster.gateway.ask("deploy", "olmoe", source=str(source))
                said = await cluster.gateway.generate("olmoe", prompt(40), 6)
                assert len(said) == 6
                assert_near_oracle(model, prompt(40), said)
        finally:
            await ended(options)

    asyncio.run(tell())


@pytest.mark.parametrize("weights", ["view", "copy"])
def test_a_tensor_that_is_missing_fails_its_model_alone(tmp_path: Path, weights: str) -> None:
    values, _, tensors = plain(*EVERY["gpt2"])
    source = tmp_path / "gpt2"
    source.mkdir()
    lost = next(name for name in tensors if "attn" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(values))
    options = agent(tmp_path, weights=weights)

    async def tell() -> None:
        try:
            async with serving(tmp_path, options) as cluster:
                gateway = cluster.gateway
                await gateway.ask("deploy", "whole", source=str(tasks.checkpoint_dir("demo-count")))
                said = await gateway.generate("whole", prompt(8), 4)
                [before] = await gateway.devices()
                await gateway.ask("deploy", "gpt2", source=str(source))
                stream = gateway.start("gpt2", prompt(8), 4)
                await gateway.until(lambda: stream.finish or stream.rejected, "the end")
                assert stream.rejected is not None
                assert f"tensor {lost} is one of the missing keys of GPT2LMHeadModel" in stream.rejected.message
                assert await gateway.generate("whole", prompt(8), 4) == said
                [after] = await gateway.devices()
                assert after["incarnation"] == before["incarnation"]
        finally:
            await ended(options)

    asyncio.run(tell())
