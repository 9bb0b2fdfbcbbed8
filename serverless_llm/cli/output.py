"""How verbs print: for people, or as one line of JSON with `--json`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from typing import Any, TextIO

import click

from serverless_llm.errors import shortened

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
GAP = "  "
SIZE = re.compile(r"(?<=[0-9]) (?=[KMGT]?B\b)")  # the blank in one
LEAST_COLUMN = 12  # characters to which a column is cut before the last ones are left out; enough to tell names apart
MOST_COLUMN = 60  # characters of a column that all rows have; what is longer moves the rest of its own row


def say(value: dict[str, Any], text: str, as_json: bool) -> None:
    """`value` as JSON, or `text`, which may be empty: then nothing."""
    if as_json:
        click.echo(json.dumps(value))
    elif text:
        click.echo(text)


def show(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table with aligned columns, whole in a pipe, no wider than the terminal on one."""
    for line in table(header, rows, columns(sys.stdout)):
        click.echo(line)


def tell(text: str) -> None:
    """A reason on standard error, in one line, or as lines of the terminal that end at blanks."""
    click.echo(wrapped(printable(text), columns(sys.stderr)), err=True)


def columns(sink: TextIO) -> int | None:
    """Of the terminal; None of a pipe or a file."""
    if not sink.isatty():
        return None
    import shutil

    return shutil.get_terminal_size().columns


def wrapped(text: str, room: int | None, indent: int = 0) -> str:
    """Lines that end at blanks, of at most `room` characters after the first `indent` of each, where that can be. The
    first one's indent is the caller's; None: one line."""
    if room is None:
        return text
    import textwrap

    width = max(LEAST_COLUMN, room - indent)
    return f"\n{' ' * indent}".join(textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], room: int | None = None) -> list[str]:
    """Its lines, of at most `room` characters; None: as many as they need."""
    lines = [[printable(text) for text in line] for line in (header, *rows)]
    if room is None:
        lines = [[*map(word, line[:-1]), line[-1]] for line in lines]
    lengths = [[len(line[column]) for line in lines] for column in range(len(header))]
    if room is None:
        widths = [max(length for length in column if length <= MOST_COLUMN) for column in lengths]
        return [GAP.join(map(str.ljust, line, widths)).rstrip() for line in lines]
    widths = fitted([max(column) for column in lengths], room)
    return [GAP.join(map(str.ljust, map(shortened, line, widths), widths)).rstrip() for line in lines]


def word(text: str) -> str:
    """Sizes without the blank, by which the columns of a pipe are split: `3.8MB`."""
    return SIZE.sub("", text)


def fitted(widths: Sequence[int], room: int) -> list[int]:
    """The widths of the first columns, the widest made narrower until there is room for them; of all, if it can be."""
    kept = len(widths)
    while kept > 1 and sum(min(width, LEAST_COLUMN) + len(GAP) for width in widths[:kept]) - len(GAP) > room:
        kept -= 1
    narrow, room = list(widths[:kept]), max(1, room - len(GAP) * (kept - 1))
    while sum(narrow) > room:
        narrow[narrow.index(max(narrow))] -= 1
    return narrow


def printable(text: str) -> str:
    """The text in one line that moves no cursor: names and reasons may come from a checkpoint's files."""
    return "".join(one if one.isprintable() else " " if one.isspace() else "?" for one in text)


def duration(value: float) -> str:
    """`90 s`, `5 min`, `1 h 30 min`: seconds as people say them, no longer and no shorter."""
    if value < 120:
        return f"{value:g} s"
    parts = []
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, value = (value, 0) if unit == "s" else divmod(value, length)
        parts += [f"{count:.10g} {unit}"] if count else []
    return " ".join(parts)


def seconds(value: float) -> str:
    """`31 ms`, `2.8 s`."""
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"
