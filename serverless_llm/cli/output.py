"""How verbs print: for people, or as one line of JSON with `--json`."""

from __future__ import annotations

import json
from typing import Any

import click

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def say(value: dict[str, Any], text: str, as_json: bool) -> None:
    """`value` as JSON, or `text`, which may be empty: then nothing."""
    if as_json:
        click.echo(json.dumps(value))
    elif text:
        click.echo(text)
