"""How verbs print: for people, or as one line of JSON with `--json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import click

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
GAP = "  "
LEAST_COLUMN = 3  # characters that are left of a column, however narrow the terminal


def say(value: dict[str, Any], text: str, as_json: bool) -> None:
    """`value` as JSON, or `text`, which may be empty: then nothing."""
    if as_json:
        click.echo(json.dumps(value))
    elif text:
        click.echo(text)


def show(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table with aligned columns, whole in a pipe, no wider than the terminal on one."""
    lines = [[printable(text) for text in line] for line in (header, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    if sys.stdout.isatty():
        import shutil

        widths = fitted(widths, shutil.get_terminal_size().columns)
    for line in lines:
        cells = (shortened(text, width).ljust(width) for text, width in zip(line, widths, strict=True))
        click.echo(GAP.join(cells).rstrip())


def fitted(widths: Sequence[int], room: int) -> list[int]:
    """The widths, the widest made narrower until there is room for all."""
    narrow, room = list(widths), room - len(GAP) * (len(widths) - 1)
    while sum(narrow) > room and max(narrow) > LEAST_COLUMN:
        narrow[narrow.index(max(narrow))] -= 1
    return narrow


def shortened(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def printable(text: str) -> str:
    """The text in one line that moves no cursor: names and reasons may come from a checkpoint's files."""
    return "".join(one if one.isprintable() else " " if one.isspace() else "?" for one in text)


def seconds(value: float) -> str:
    """`31 ms`, `2.8 s`."""
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"
