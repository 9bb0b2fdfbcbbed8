"""What a terminal shows of an answer that does not begin, and a pipe of files that come."""

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


def test_a_pipe_is_told_of_each_file_every_ten_seconds_and_at_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    told_at = [
        (0.0, "a", 0, 4_900_000_000),
        (0.0, "b", 0, 50),
        (1.0, "b", 50, 50),
        (9.9, "a", 1_100_000_000, 4_900_000_000),
        (10.0, "a", 1_200_000_000, 4_900_000_000),
        (19.0, "a", 4_000_000_000, 4_900_000_000),
        (20.0, "a", 4_100_000_000, 4_900_000_000),
        (21.0, "a", 4_900_000_000, 4_900_000_000),
        (99.0, "a", 4_900_000_000, 4_900_000_000),
    ]
    assert lines(told_at, capsys) == ["b: 50 B", "a: 1.2 GB of 4.9 GB", "a: 4.1 GB of 4.9 GB", "a: 4.9 GB"]


def test_a_file_of_which_some_was_damaged_is_told_again(capsys: pytest.CaptureFixture[str]) -> None:
    told_at = [(0.0, "a", 50, 50), (1.0, "a", 10, 50), (9.0, "a", 20, 50), (11.0, "a", 30, 50), (12.0, "a", 50, 50)]
    assert lines(told_at, capsys) == ["a: 50 B", "a: 30 B of 50 B", "a: 50 B"]


def test_the_first_line_of_a_pull_that_goes_on_says_how_much_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    told_at = [(0.0, "a", 20, 50), (9.0, "a", 30, 50), (10.0, "a", 40, 50), (11.0, "a", 50, 50)]
    assert lines(told_at, capsys) == ["a: 20 B of 50 B", "a: 40 B of 50 B", "a: 50 B"]


def lines(told_at: list[tuple[float, str, int, int]], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What a pipe gets of (second, file, bytes that are there, bytes)."""
    times = iter([at for at, *_ in told_at])
    with progress.transfers(lambda: next(times)) as told:
        for _, name, done, total in told_at:
            told(name, done, total)
    return capsys.readouterr().err.splitlines()
