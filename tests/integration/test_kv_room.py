"""Memory for KV that other models have: they leave for it, the idle ones at once, and no client is told."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from serverless_llm.demo.tasks import checkpoint_dir
from tests.serving import Server, until

pytestmark = pytest.mark.slow


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A device with room for two models of 2.6 MB, and for 480 tokens of the first beside the second: it has 1024."""
    options = ("--devices", "cpu:1", "--weights", "copy", "--device-memory", "6800000", "--dram", "64MiB")
    with Server(tmp_path / "state", *options) as server:
        for name in ("demo-count", "demo-reverse"):
            server.put(f"/admin/models/{name}", {"source": str(checkpoint_dir(name))})
        yield server


def replicas(server: Server) -> list[str]:
    return sorted(one["model"] for one in server.devices()[0]["replicas"] if one["state"] == "ready")


def ask(server: Server, model: str = "demo-count", **asked: int) -> openai.types.chat.ChatCompletion:
    ai = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    messages = [{"role": "user", "content": "41 42 43"}]
    answer: openai.types.chat.ChatCompletion = ai.chat.completions.create(
        model=model, messages=messages, temperature=0, extra_body={"ignore_eos": True}, **asked
    )  # type: ignore[call-overload]
    return answer


@pytest.mark.parametrize("asked", [{}, {"max_tokens": 900}], ids=str)
def test_an_answer_is_the_same_beside_an_idle_model(server: Server, asked: dict[str, int]) -> None:
    alone = ask(server, "demo-count", **asked)
    assert alone.usage is not None
    assert alone.usage.completion_tokens == asked.get("max_tokens", 1013)
    server.put("/admin/models/demo-reverse/load", {}, "POST")
    until(lambda: replicas(server) == ["demo-count", "demo-reverse"], "both on the device")
    beside = ask(server, "demo-count", **asked)
    assert (beside.choices, beside.usage) == (alone.choices, alone.usage)
    assert replicas(server) == ["demo-count"]


def test_what_may_not_leave_ends_an_answer_without_a_length(server: Server) -> None:
    server.put("/admin/models/demo-reverse/load", {}, "POST")
    server.put("/admin/models/demo-reverse/pin", {}, "POST")
    beside = ask(server)
    assert beside.usage is not None
    assert (beside.choices[0].finish_reason, beside.usage.total_tokens) == ("length", 480)
    with pytest.raises(openai.BadRequestError, match=r"its KV takes .* beside the weights and the models that may not"):
        ask(server, max_tokens=900)


def test_two_that_need_each_others_memory_are_both_answered(server: Server) -> None:
    names = ("demo-count", "demo-reverse")
    for name in names:
        server.put(f"/admin/models/{name}/load", {}, "POST")
    until(lambda: replicas(server) == [*names], "both on the device")
    with ThreadPoolExecutor() as threads:
        answers = list(threads.map(lambda name: ask(server, name, max_tokens=900), names))
    assert [one.usage and one.usage.completion_tokens for one in answers] == [900, 900]


def test_who_needs_the_memory_of_a_busy_model_waits_for_its_end(server: Server) -> None:
    """Whoever it is busy with is answered, and so is who comes for it meanwhile."""
    ai = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    messages: list[Any] = [{"role": "user", "content": "41 42 43"}]
    ask(server, max_tokens=1)
    busy = ai.chat.completions.create(
        model="demo-reverse",
        messages=messages,
        max_tokens=400,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    next(busy)
    with ThreadPoolExecutor() as threads:
        long = threads.submit(ask, server, max_tokens=900)
        short = threads.submit(ask, server, "demo-reverse", max_tokens=2)
        usages = [list(busy)[-1].usage, long.result().usage, short.result().usage]
    assert [usage and usage.completion_tokens for usage in usages] == [400, 900, 2]
