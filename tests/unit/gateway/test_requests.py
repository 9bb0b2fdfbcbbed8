"""Live requests without a server around them."""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from serverless_llm import framing, wire
from serverless_llm.gateway import openai
from serverless_llm.gateway.detokenise import NEIGHBOURS, TableVocabulary
from serverless_llm.gateway.live import Choice
from serverless_llm.gateway.metrics import Metrics
from serverless_llm.gateway.requests import LiveRequests
from serverless_llm.gateway.text import TokenisedPrompt
from tests.integration.scripted import model

MODEL = model("demo", Path("/nowhere"))


def attachment(choice: Choice) -> wire.Attach:
    return wire.Attach(choice.sequence, 0, 7, framing.worker_address(0, 0), "n0/0", 0.0, {})


def test_an_attachment_that_fails_ends_its_request(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        sent: list[wire.Message] = []
        requests = LiveRequests(sent.append, Metrics(), 1)
        asked = openai.parse({"model": "demo", "prompt": "x"}, chat=False)
        live = requests.open("r1", MODEL, asked)
        (choice,) = live.choices
        attach = attachment(choice)
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


def test_tokens_that_nobody_can_read_harm_no_other_sequence_of_their_frame(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        sent: list[wire.Message] = []
        requests = LiveRequests(sent.append, Metrics(), 1)
        bodies: list[dict[str, Any]] = [{"prompt": [1], "logprobs": 0}, {"prompt": [1]}]
        asked = [openai.parse(body, chat=False) for body in bodies]
        lives = [requests.open(name, MODEL, one) for name, one in zip("ab", asked, strict=True)]
        for live in lives:
            requests.prompted(live.choices[0], TokenisedPrompt(array("i", [1]).tobytes(), SPACED, {}, (), 3))
            requests.attach(attachment(live.choices[0]))
        broken, sound = (live.choices[0] for live in lives)
        requests.tokens(wire.Tokens([(broken.sequence, 0, [1], ""), (sound.sequence, 0, [2], "length")]))
        assert (sound.take(), sound.finish) == (" b", "length")
        assert broken.live.error is not None
        assert (broken.live.error.status, broken.live.error.code) == (500, "engine_error")
        assert sent[-1] == wire.Gone([broken.sequence], "error")
        for live in lives:
            requests.close(live, "")

    with caplog.at_level(logging.ERROR):
        asyncio.run(main())
    assert "a: its tokens could not be decoded" in caplog.text


class Watched(TableVocabulary):
    """Keeps the numbers of tokens that it was asked for at a time."""

    def bytes_of(self, tokens: Sequence[int]) -> bytes:
        self.asked = max(len(tokens), getattr(self, "asked", 0))
        return super().bytes_of(tokens)


def test_the_text_of_a_prompt_is_not_made_on_the_loop() -> None:
    async def main() -> None:
        requests = LiveRequests(lambda message: None, Metrics(), 1)
        body = {"model": "demo", "prompt": [1] * 200, "echo": True, "n": 8}
        live = requests.open("r1", MODEL, openai.parse(body, chat=False))
        vocabulary = Watched(b" a b", b"".join(n.to_bytes(4, "little") for n in (0, 0, 2, 4)), 0)
        prompt = TokenisedPrompt(array("i", [1] * 200).tobytes(), vocabulary, {}, (), 3)
        for choice in live.choices:
            requests.prompted(choice, prompt)
        assert vocabulary.asked == NEIGHBOURS
        requests.close(live, "")

    asyncio.run(main())


SPACED = TableVocabulary(b" a b", b"".join(n.to_bytes(4, "little") for n in (0, 0, 2, 4)), 1)  # nothing, " a", " b"


@pytest.mark.parametrize(("chat", "prompt", "text"), [(True, [1], "b a"), (False, [1], " b a"), (False, [0], "b a")])
def test_only_a_completion_goes_on_with_its_prompt(chat: bool, prompt: list[int], text: str) -> None:
    async def main() -> None:
        requests = LiveRequests(lambda message: None, Metrics(), 1)
        given = {"messages": [{"role": "user", "content": "a"}]} if chat else {"prompt": prompt}
        live = requests.open("r1", MODEL, openai.parse({"model": "demo"} | given, chat=chat))
        (choice,) = live.choices
        requests.prompted(choice, TokenisedPrompt(array("i", prompt).tobytes(), SPACED, {}, (), 3))
        requests.attach(attachment(choice))
        choice.extend([2, 1], "length")
        assert "".join(choice._unread) == text
        requests.close(live, "length")

    asyncio.run(main())
