"""Checkpoints that have text files alone, and what text processes are asked about them."""

from __future__ import annotations

import contextlib
import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from serverless_llm.demo.tokenizer import tokenizer_json, write_tokenizer
from serverless_llm.gateway.text import TextLimits, TextPool
from serverless_llm.gateway.text_wire import Call

ENDLESS = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"


def checkpoint(directory: Path, template: str | None = None, decoder: Any = None) -> Path:
    directory.mkdir()
    write_tokenizer(directory, 99)
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    if decoder is not None:
        (directory / "tokenizer.json").write_text(json.dumps(tokenizer_json() | {"decoder": decoder}))
    return directory


def chat(directory: Path, content: str = "Hi") -> Call:
    return Call("demo", str(directory), "c", [{"role": "user", "content": content}])


async def ids(pool: TextPool, call: Call) -> list[int]:
    return array("i", (await pool.prompt(call)).ids).tolist()


@contextlib.contextmanager
def hasty(pool: TextPool) -> Iterator[None]:
    """For calls that have no end: what begins within has a moment, and all else its time, however slow the machine."""
    patient, pool._limits = pool._limits, TextLimits(seconds=0.25)
    try:
        yield
    finally:
        pool._limits = patient
