"""A decoder that transformers computes, from its files to its tokens, by real processes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

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
