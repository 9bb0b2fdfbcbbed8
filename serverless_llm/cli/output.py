"""How verbs print: for people, or as one line of JSON with `--json`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def say(value: dict[str, Any], text: str, as_json: bool) -> None:
    """`value` as JSON, or `text`, which may be empty: then nothing."""
    if as_json:
        click.echo(json.dumps(value))
    elif text:
        click.echo(text)


def show(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table with aligned columns, plain in a pipe and on a terminal."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        click.echo("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def size(count: float) -> str:
    """Bytes as Ollama prints them: 3.8 MB."""
    units = ["B", "KB", "MB", "GB", "TB"]
    value = float(count)
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def seconds(value: float) -> str:
    """`31 ms`, `2.8 s`."""
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"
