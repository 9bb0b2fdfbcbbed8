"""What a terminal shows of an answer that does not begin."""

from __future__ import annotations

import re
import threading

import click
import pytest

from serverless_llm.cli import progress
from serverless_llm.cli.progress import Waiting


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as if standard error were a terminal
    monkeypatch.setattr(progress, "SILENT", 0.0)
    monkeypatch.setattr(progress, "LOOK_AGAIN", 0.0)


def test_what_is_waited_for_is_shown_and_wiped(capsys: pytest.CaptureFixture[str]) -> None:
    looks, enough = iter(range(1_000_000)), threading.Event()

    def look() -> str:
        count = next(looks)
        if count == 3:
            enough.set()
        return f"m: loading {count}%"

    with Waiting(look, shown=True) as waiting:
        assert enough.wait(10)
        waiting.end()
        told = capsys.readouterr().err
        assert re.search(r"m: loading \d+%", told)
        assert told.endswith("\x1b[2K")
    assert capsys.readouterr().err == ""


def test_nothing_is_looked_at_where_nobody_sees_it() -> None:
    with Waiting(lambda: pytest.fail("looked"), shown=False):
        pass


def test_whoever_may_not_look_is_told_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    asked = threading.Event()

    def look() -> str:
        asked.set()
        raise click.ClickException("no scope")

    with Waiting(look, shown=True):
        assert asked.wait(10)
    assert capsys.readouterr().err == ""
