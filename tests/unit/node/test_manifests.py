"""How an agent reads headers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from serverless_llm.cli.make_checkpoint import make_checkpoint
from serverless_llm.node import manifests
from serverless_llm.node.manifests import Manifests
from tests.dead_mount import dead


def test_a_reading_that_does_not_return_is_shared_for_a_while_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount may be back, and a thread still wait for what it asked before."""
    source = tmp_path / "tiny"
    make_checkpoint("tiny-llama", source, dtype="float32")

    async def tell() -> None:
        made = Manifests()
        with dead(source / "config.json"):
            first = made._read(str(source), "it")
            assert made._read(str(source), "it") is first
            assert made._read(str(source), "another") is not first
            monkeypatch.setattr(manifests, "SHARED_S", 0.0)
            second = made._read(str(source), "it")
            assert second is not first
        async with asyncio.timeout(30):
            assert (await second).checkpoint == (await first).checkpoint
            while made._reading:
                await asyncio.sleep(0)

    asyncio.run(tell())
