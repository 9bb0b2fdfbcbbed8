"""Tables: whole in a pipe, within the terminal on one, and harmless there."""

from __future__ import annotations

import sys

import pytest

from serverless_llm.cli.output import fitted, printable, shortened, show

ROWS = [("demo-count", "failed: no such file in a directory\nwith a \x1b[2J name", "node0/0")]


def test_a_table_in_a_pipe_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    show(("NAME", "STATE", "DEVICE"), ROWS)
    assert capsys.readouterr().out.splitlines() == [
        f"NAME        {'STATE':52}  DEVICE",
        "demo-count  failed: no such file in a directory with a ?[2J name  node0/0",
    ]


@pytest.mark.parametrize("columns", [40, 60, 200])
def test_a_table_on_a_terminal_is_no_wider(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    show(("NAME", "STATE", "DEVICE"), ROWS)
    header, row = capsys.readouterr().out.splitlines()
    assert max(len(header), len(row)) <= columns
    assert row.startswith("demo-count  failed: ")
    assert row.endswith("node0/0")
    assert ("…" in row) == (columns < 200)


def test_the_widest_column_gives_way() -> None:
    assert fitted([4, 30, 7], 30) == [4, 15, 7]
    assert fitted([4, 30, 7], 100) == [4, 30, 7]
    assert fitted([9, 9], 1) == [3, 3]


def test_what_is_cut_says_so() -> None:
    assert (shortened("abcdef", 6), shortened("abcdef", 4)) == ("abcdef", "abc…")


def test_nothing_moves_the_cursor() -> None:
    assert printable("a\nb\tc\x1b[2Jd\x9be\x7f ü…") == "a b c?[2Jd?e? ü…"
