"""Tables: whole in a pipe, within the terminal on one, and harmless there."""

from __future__ import annotations

import sys

import pytest

from serverless_llm.cli.output import duration, fitted, printable, show, table, tell, wrapped

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
    assert fitted([9, 9], 1) == [1]


def test_the_last_columns_give_way_before_the_others_say_nothing() -> None:
    models, devices = [10, 8, 8, 6, 7, 7, 7, 5], [7, 4, 8, 3, 6, 9, 30]
    assert fitted(models, 40) == models[:4]
    assert fitted(devices, 40) == devices[:5]
    assert fitted([13, 4, 11, 4, 4, 9], 40) == [13, 4, 11, 4]  # of bench, whose ways end in cold and warm
    assert fitted(models, 80) == models
    assert fitted([*models[:2], 300, *models[3:]], 80) == [10, 8, 16, 6, 7, 7, 7, 5]


def test_one_long_cell_in_a_pipe_makes_no_other_row_longer() -> None:
    long = "failed: " + "x" * 300
    header, short, other = table(("NAME", "STATE", "TIER"), [("a", "loaded", "dram"), ("b", long, "disk")])
    assert (header, short, other) == ("NAME  STATE   TIER", "a     loaded  dram", f"b     {long}  disk")


def test_nothing_moves_the_cursor() -> None:
    assert printable("a\nb\tc\x1b[2Jd\x9be\x7f ü…") == "a b c?[2Jd?e? ü…"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0 s"),
        (90.0, "90 s"),
        (150.5, "2 min 30.5 s"),
        (300.0, "5 min"),
        (5400.0, "1 h 30 min"),
        (604800.0, "7 d"),
    ],
)
def test_durations_say_what_was_given(value: float, text: str) -> None:
    assert duration(value) == text


def test_columns_of_a_pipe_split_on_blanks() -> None:
    row = ("m", "3.8 MB", "1.2 GB/s", "/of a 4 B/model")
    assert table("ABCD", [row])[1].split(None, 3) == ["m", "3.8MB", "1.2GB/s", "/of a 4 B/model"]
    assert "3.8 MB  1.2 GB/s  /of a" in table("ABCD", [row], 80)[1]


def test_long_texts_end_their_lines_at_blanks() -> None:
    text = "serverless-llm 0.1.0, torch 2.13.0 in /a/directory/of/its/own"
    assert wrapped(text, None) == text
    assert wrapped(text, 34, indent=6) == "serverless-llm 0.1.0, torch\n      2.13.0 in\n      /a/directory/of/its/own"
    assert wrapped("longer-than-there-is-room /for", 6) == "longer-than-there-is-room\n/for"


def test_a_reason_is_one_line_in_a_pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tell("m failed: no\nsuch file")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "14")
    tell("m failed: no\nsuch file")
    assert capsys.readouterr().err == "m failed: no such file\nm failed: no\nsuch file\n"
