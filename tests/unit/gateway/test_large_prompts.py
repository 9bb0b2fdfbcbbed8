"""Prompts that take long where nothing is wrong with the checkpoint: whose fault their ends are, and who waits."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from serverless_llm.demo.tokenizer import chat_tokens
from serverless_llm.errors import RequestError
from serverless_llm.gateway import text
from serverless_llm.gateway.text import TextLimits, TextPool
from tests.unit.gateway.texts import ENDLESS, chat, checkpoint, ids

pytestmark = pytest.mark.slow

IF_LARGE = "{% if messages[0].content | length > 3 %}" + ENDLESS + "{% endif %}"


def test_large_prompts_of_a_caller_are_not_charged_to_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are refused as the caller's own fault, and take one process at a time."""
    monkeypatch.setattr(text, "LARGE", 500)

    async def main() -> None:
        pool = TextPool(2, TextLimits(seconds=3.0))
        await pool.start()
        directory = checkpoint(tmp_path / "slow", IF_LARGE)
        large = [asyncio.create_task(pool.prompt(chat(directory, "x" * 500))) for _ in range(3)]
        await asyncio.sleep(0)  # all of them come before it
        await pool.prompt(chat(directory, "Hi"))
        assert not any(task.done() for task in large)
        for error in await asyncio.gather(*large, return_exceptions=True):
            assert isinstance(error, RequestError)
            assert (error.status, error.code, error.param) == (400, "invalid_request_error", "messages")
            assert "limits" in error.message
        await pool.prompt(chat(directory, "Hi"))
        await pool.close()

    asyncio.run(main())


def test_of_large_prompts_only_those_that_somebody_wants_are_made_and_a_few_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "LARGE", 500)
    monkeypatch.setattr(text, "MOST_LARGE", 3)

    async def main() -> None:
        pool = TextPool(1)
        await pool.start()
        before, directory, here = pool.pids, checkpoint(tmp_path / "a"), True
        call, endless = chat(directory, "x" * 500), chat(checkpoint(tmp_path / "b", IF_LARGE), "x" * 500)
        first = asyncio.create_task(ids(pool, call))
        left = [asyncio.create_task(pool.prompt(endless, lambda: here)) for _ in range(2)]
        await asyncio.sleep(0)  # all of them come before it
        here = False
        with pytest.raises(RequestError, match="3 prompts of more than 500 bytes wait already") as refused:
            await pool.prompt(call)
        told = refused.value
        assert (told.status, told.code, told.retry_after) == (503, "overloaded", 10.0)
        assert await ids(pool, chat(directory)) == chat_tokens("Hi")
        assert await first == chat_tokens("x" * 500)
        for error in await asyncio.gather(*left, return_exceptions=True):
            assert isinstance(error, RequestError)
            assert (error.status, error.code) == (499, "client_gone")
        assert await ids(pool, call) == chat_tokens("x" * 500)  # there is room again
        assert pool.pids == before
        await pool.close()

    asyncio.run(main())


def test_what_fails_before_a_large_prompt_is_begun_is_not_its_caller_s_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that stands still, as where the checkpoint's disk does not answer, is charged as with any call."""
    monkeypatch.setattr(text, "LARGE", 500)

    async def main() -> None:
        pool = TextPool(1, TextLimits(seconds=0.4))
        await pool.start()
        call = chat(checkpoint(tmp_path / "a"), "x" * 500)
        statuses = []
        for _ in range(4):
            (pid,) = pool.pids
            os.kill(pid, signal.SIGSTOP)
            with pytest.raises(RequestError) as failed:
                await pool.prompt(call)
            statuses.append((failed.value.status, failed.value.code, failed.value.param))
            await asyncio.gather(*pool._tasks)
        assert statuses == [(500, "engine_error", None)] * 3 + [(503, "overloaded", None)]
        await asyncio.gather(*pool._tasks)
        await pool.close()

    asyncio.run(main())


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, 503), (signal.SIGABRT, 400)])
def test_a_process_that_is_killed_beside_a_large_prompt_is_not_its_caller_s_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    """One that ends itself, as where an allocation is over its limit, is."""
    monkeypatch.setattr(text, "LARGE", 500)

    async def main() -> None:
        pool = TextPool(1)
        await pool.start()
        (process,) = pool._free
        large, call = asyncio.Event(), process.call

        async def seen(framed: bytes) -> Any:
            if len(framed) > text.LARGE:
                large.set()
            return await call(framed)

        monkeypatch.setattr(text._Process, "call", lambda _, framed: seen(framed))
        running = asyncio.create_task(pool.prompt(chat(checkpoint(tmp_path / "a", IF_LARGE), "x" * 500)))
        await large.wait()
        os.kill(process.pid, number)
        with pytest.raises(RequestError) as failed:
            await running
        told = failed.value
        assert (told.status, told.retry_after) == (status, text.REFUSED if status == 503 else None)
        assert not pool._suspects
        await asyncio.gather(*pool._tasks)
        await pool.close()

    asyncio.run(main())


@pytest.mark.parametrize("given", ["text", "messages"])
def test_what_is_far_over_the_context_is_refused_before_all_of_it_is_tokenised(tmp_path: Path, given: str) -> None:
    async def main() -> None:
        pool = TextPool(1, TextLimits(memory=600 << 20))  # not enough for so many tokens
        await pool.start()
        before = pool.pids
        content = "abc " * (1 << 20)
        call = chat(checkpoint(tmp_path / "a"), content)
        if given == "text":
            call = msgspec.structs.replace(call, messages=None, text=content)
        with pytest.raises(RequestError, match="the context is 99 tokens long; the first 792 characters") as refused:
            await pool.prompt(msgspec.structs.replace(call, context=99))
        assert (refused.value.status, refused.value.code) == (400, "context_length_exceeded")
        assert refused.value.param == ("prompt" if given == "text" else "messages")
        assert pool.pids == before
        await pool.close()

    asyncio.run(main())
