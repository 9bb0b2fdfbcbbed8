"""A request and a checkpoint that end their worker every time: three deaths, then they alone are refused."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from serverless_llm.cli.make_checkpoint import make_checkpoint
from serverless_llm.demo.tasks import COUNT, checkpoint_dir
from tests.serving import Server

pytestmark = pytest.mark.slow

Device = dict[str, Any]
HEALTHY = ("1 2 3", "101 102", "250 251 252", "700")


class Executioner:
    """Kills a worker whenever its device shows the guilty one, as a bug in the engine would."""

    def __init__(self, server: Server, guilty: Callable[[Device], bool]) -> None:
        self.server, self.guilty = server, guilty
        self.killed: list[int] = []

    async def work(self) -> None:
        while True:
            for device in await asyncio.to_thread(self.server.devices):
                pid = device["worker_pid"]
                if pid and pid not in self.killed and self.guilty(device):
                    os.kill(pid, signal.SIGKILL)
                    self.killed.append(pid)
            await asyncio.sleep(0)


async def count(session: aiohttp.ClientSession, url: str, prompt: str) -> str:
    body = {"model": "count", "messages": [{"role": "user", "content": prompt}], "temperature": 0}
    async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
        content = await answer.json()
        assert answer.status == 200, content
        text: str = content["choices"][0]["message"]["content"]
        return text


async def beside_healthy_streams(
    server: Server, guilty: Callable[[Device], bool], body: dict[str, Any]
) -> tuple[list[str], int, dict[str, Any], int]:
    """The healthy answers, the guilty one's status and body, and how many workers died."""
    async with aiohttp.ClientSession() as session:
        await count(session, server.url, "5")
        executioner = Executioner(server, guilty)
        killing = asyncio.create_task(executioner.work())
        streams = [asyncio.create_task(count(session, server.url, prompt)) for prompt in HEALTHY]
        async with session.post(f"{server.url}/v1/completions", json=body) as answer:
            status, content = answer.status, await answer.json()
        answers = await asyncio.gather(*streams)
        killing.cancel()
        return answers, status, content, len(executioner.killed)


def refused(
    tmp_path: Path, limit: str, source: Path, guilty: Callable[[Device], bool], **body: Any
) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Status and error of the request to the model `guilty`, and that model's status after it."""
    options = ("--devices", "cpu:1", "--device-memory", "512MiB", "--dram", "512MiB", "--limit", limit)
    models = ("--model", f"count={checkpoint_dir(COUNT.name)}", "--model", f"guilty={source}")
    with Server(tmp_path / "state", *options, *models) as server:
        body |= {"model": "guilty"}
        answers, status, content, deaths = asyncio.run(beside_healthy_streams(server, guilty, body))
        assert answers == [COUNT.answer(prompt) for prompt in HEALTHY]
        assert deaths <= 3
        return status, content["error"], server.get("/v1/models/guilty")["status"]


@pytest.mark.parametrize("when", ["before its first token", "after some tokens"])
def test_a_request_that_always_kills_is_refused_by_name_and_healthy_streams_go_on(tmp_path: Path, when: str) -> None:
    def guilty(device: Device) -> bool:
        return any(sequence["model"] == "guilty" for sequence in device["sequences"])

    if when == "before its first token":
        source = tmp_path / "large"
        make_checkpoint("smollm2-135m", source, layers=4, dtype="float32")
        body: dict[str, Any] = {"prompt": [1] * 1000, "max_tokens": 4}
    else:
        source = checkpoint_dir(COUNT.name)
        body = {"prompt": "1 2 3", "max_tokens": 500, "ignore_eos": True, "temperature": 0}
    status, error, model = refused(tmp_path, "upload=1GB/s", source, guilty, **body)
    assert (status, error["code"]) == (500, "engine_error")
    assert "3 times" in error["message"]
    assert model["value"] != "failed"


def test_a_checkpoint_that_always_kills_fails_by_name_and_healthy_streams_go_on(tmp_path: Path) -> None:
    def guilty(device: Device) -> bool:
        return any(one["model"] == "guilty" and one["state"] == "loading" for one in device["replicas"])

    make_checkpoint("tiny-llama", tmp_path / "bad", layers=16, dtype="float32")  # seconds of loading
    status, error, model = refused(tmp_path, "disk=1MB/s", tmp_path / "bad", guilty, prompt=[1, 2, 3], max_tokens=4)
    assert (status, error["code"]) == (503, "model_load_failed")
    assert model["value"] == "failed"
    assert "3 times" in model["error"]
