"""Many names on few devices, over HTTP: all are answered, bytes are read once, alternating traffic does not thrash."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from serverless_llm.cli.make_checkpoint import make_checkpoint
from serverless_llm.demo.tasks import REVERSE, checkpoint_dir
from tests.serving import Server, until

pytestmark = pytest.mark.slow

NAMES = 100
MIB = 1 << 20


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Two devices, each with room for one model of about 2.7 MB and some KV."""
    options = ("--devices", "cpu:2", "--device-memory", "4MiB", "--dram", "64MiB")
    with Server(tmp_path / "state", *options) as server:
        yield server


@asynccontextmanager
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    limit = aiohttp.ClientTimeout(total=100)
    async with aiohttp.ClientSession(timeout=limit, connector=aiohttp.TCPConnector(limit=0)) as session:
        yield session


async def reverse(session: aiohttp.ClientSession, url: str, model: str, word: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": word}], "temperature": 0, "max_tokens": 16}
    async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
        content = await answer.json()
        assert answer.status == 200, content
        text: str = content["choices"][0]["message"]["content"]
        return text


def disk_bytes(server: Server) -> int:
    return sum(int(node["link_bytes"].get("disk", 0)) for node in server.status()["nodes"])


def evict(file: Path) -> int:
    """Takes a file out of the page cache; its size."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return file.stat().st_size


def deploy(server: Server, name: str, source: Path) -> None:
    server.put(f"/admin/models/{name}", {"source": str(source)})


def test_a_hundred_names_under_zipf_traffic_are_all_answered(server: Server) -> None:
    rng = random.Random(5)
    for number in range(NAMES):
        deploy(server, f"m{number}", checkpoint_dir(REVERSE.name))
    weights = [1 / (rank + 1) for rank in range(NAMES)]
    words = REVERSE.held_out(200, seed=5)
    asked = list(zip(rng.choices(range(NAMES), weights, k=len(words)), words, strict=True))

    async def ask_all() -> list[str]:
        async with client() as session:
            slots = asyncio.Semaphore(16)

            async def one(number: int, word: str) -> str:
                async with slots:
                    return await reverse(session, server.url, f"m{number}", word)

            return await asyncio.gather(*(one(number, word) for number, word in asked))

    answers = asyncio.run(ask_all())
    wrong = [(word, got) for (_, word), got in zip(asked, answers, strict=True) if not REVERSE.is_right(word, got)]
    assert wrong == []


def test_fifty_waiters_of_a_cold_model_read_its_bytes_once(server: Server, tmp_path: Path) -> None:
    make_checkpoint("tiny-llama", tmp_path / "tiny", dtype="float32")
    deploy(server, "tiny", tmp_path / "tiny")
    size = evict(tmp_path / "tiny" / "model.safetensors")
    body = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0}

    async def ask_all() -> list[str]:
        async with client() as session:

            async def one() -> str:
                async with session.post(f"{server.url}/v1/completions", json=body) as answer:
                    return str((await answer.json())["choices"][0]["text"])

            return await asyncio.gather(*(one() for _ in range(50)))

    answers = asyncio.run(ask_all())
    assert len(set(answers)) == 1
    assert server.metric("serverless_llm_cold_starts_total") == 1
    until(lambda: disk_bytes(server), "the next heartbeat")
    assert size <= disk_bytes(server) <= 1.001 * size


def test_a_b_a_b_twenty_times_loads_at_most_four_times(tmp_path: Path) -> None:
    options = ("--devices", "cpu:1", "--device-memory", "4MiB", "--dram", "64MiB")
    words = REVERSE.held_out(20, seed=6)
    with Server(tmp_path / "state", *options) as server:
        for name in ("a", "b"):
            deploy(server, name, checkpoint_dir(REVERSE.name))

        async def alternate() -> list[str]:
            """Twenty sequential requests of each model, the two side by side."""
            async with client() as session:

                async def stream(model: str) -> list[str]:
                    return [await reverse(session, server.url, model, word) for word in words]

                both = await asyncio.gather(stream("a"), stream("b"))
                return both[0] + both[1]

        answers = asyncio.run(alternate())
        assert answers == [REVERSE.answer(word) for word in words + words]
        assert 2 <= server.metric("serverless_llm_cold_starts_total") <= 4
