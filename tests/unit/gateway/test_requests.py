"""Live requests without a server around them."""

from __future__ import annotations

import asyncio
import logging
from array import array
from pathlib import Path

import pytest

from serverless_llm import framing, wire
from serverless_llm.gateway import openai
from serverless_llm.gateway.detokenise import TableVocabulary
from serverless_llm.gateway.metrics import Metrics
from serverless_llm.gateway.requests import LiveRequests
from serverless_llm.gateway.text import TokenisedPrompt
from tests.integration.scripted import model


def test_an_attachment_that_fails_ends_its_request(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        sent: list[wire.Message] = []
        requests = LiveRequests(sent.append, Metrics(), 1)
        asked = openai.parse({"model": "demo", "prompt": "x"}, chat=False)
        live = requests.open("r1", model("demo", Path("/nowhere")), asked)
        (choice,) = live.choices
        attach = wire.Attach(choice.sequence, 0, 7, framing.worker_address(0, 0), "n0/0", 0.0, {})
        requests.attach(attach)  # before there is a prompt
        assert live.error is not None
        assert (live.error.status, live.error.code) == (500, "engine_error")
        assert [message for message in sent if isinstance(message, wire.Gone)] == [
            wire.Gone([choice.sequence], "error")
        ]
        requests.attach(attach)
        assert not any(isinstance(message, wire.Run) for message in sent)
        requests.close(live, "engine_error")

    with caplog.at_level(logging.ERROR):
        asyncio.run(main())
    assert "r1: the sequence could not be attached" in caplog.text


SPACED = TableVocabulary(b" a b", b"".join(n.to_bytes(4, "little") for n in (0, 0, 2, 4)), 1)  # nothing, " a", " b"


@pytest.mark.parametrize(("chat", "prompt", "text"), [(True, [1], "b a"), (False, [1], " b a"), (False, [0], "b a")])
def test_only_a_completion_goes_on_with_its_prompt(chat: bool, prompt: list[int], text: str) -> None:
    async def main() -> None:
        requests = LiveRequests(lambda message: None, Metrics(), 1)
        given = {"messages": [{"role": "user", "content": "a"}]} if chat else {"prompt": prompt}
        live = requests.open("r1", model("demo", Path("/nowhere")), openai.parse({"model": "demo"} | given, chat=chat))
        (choice,) = live.choices
        requests.prompted(choice, TokenisedPrompt(array("i", prompt).tobytes(), SPACED, {}, (), 3))
        requests.attach(wire.Attach(choice.sequence, 0, 7, framing.worker_address(0, 0), "n0/0", 0.0, {}))
        choice.extend([2, 1], "length")
        assert "".join(choice._unread) == text
        requests.close(live, "length")

    asyncio.run(main())
