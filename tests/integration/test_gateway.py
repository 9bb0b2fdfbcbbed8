"""The gateway as clients see it: a real server on loopback, real clients, a scripted controller."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest

from serverless_llm import wire
from serverless_llm.demo.tokenizer import chat_tokens
from tests.integration.scripted import attaches, decoded, says, served, silent

pytestmark = pytest.mark.slow


def client(url: str, **options: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, **options)


def test_a_chat_streams_through_the_official_client(tmp_path: Path) -> None:
    async def main() -> None:
        async with served(tmp_path, says("Grüße 😀")) as server, client(server.url) as ai:
            stream = await ai.chat.completions.create(
                model="demo",
                messages=[{"role": "user", "content": "Hi"}],
                stream=True,
                stream_options={"include_usage": True},
                seed=5,
            )
            chunks = [chunk async for chunk in stream]
            run = await server.controller.saw(wire.Run)
        deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
        assert "".join(delta.content or "" for delta in deltas) == "Grüße 😀"
        assert [delta.role for delta in deltas if delta.role] == ["assistant"]
        assert deltas[0].role == "assistant"
        assert chunks[-2].choices[0].finish_reason == "stop"
        usage = chunks[-1].usage
        assert usage is not None
        prompt, _ = decoded(run)
        assert prompt == chat_tokens("Hi")
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), len("Grüße 😀".encode()) + 1)
        assert (run.seed, run.max_tokens, run.temperature, run.stop_ids) == (5, 256 - len(prompt), 0.0, [257])

    asyncio.run(main())
