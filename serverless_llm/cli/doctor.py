"""`serverless-llm doctor`: arguments -> diagnosis -> what people or scripts read of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from serverless_llm.cli.output import as_json, columns, say, seconds, show, wrapped
from serverless_llm.quantities import size

if TYPE_CHECKING:
    from serverless_llm.cli.diagnosis import Diagnosis, Forecast

COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command()
@click.option("--config", type=click.Path(path_type=Path), help="The YAML file, instead of the search path.")
@click.option("--state-dir", type=click.Path(path_type=Path), help="Of the server, if it is not this user's own.")
@as_json
def doctor(config: Path | None, state_dir: Path | None, as_json: bool) -> None:
    """Measure disk, memory and GPU, look at every limit, and predict each deployed model's cold start.

    Takes some seconds; writes at most one file of 256 MiB, in the state directory, and removes it. Ends with 1 and the
    reasons where something would not work, with 78 where the configuration is bad.
    """
    from serverless_llm.cli.client import demand_local, local_state_dir
    from serverless_llm.cli.diagnosis import diagnose
    from serverless_llm.config import load

    demand_local(state_dir)
    settings = load({"state_dir": state_dir}, os.environ, config)
    local_state_dir(settings.state_dir)
    diagnosis = diagnose(settings)
    say(diagnosis.as_json(), text_of(diagnosis), as_json)
    if diagnosis.forecasts and not as_json:
        click.echo()
        table(diagnosis.forecasts)
    if diagnosis.problems:
        raise click.ClickException("would not work:" + "".join(f"\n  {one}" for one in diagnosis.problems))


def text_of(diagnosis: Diagnosis) -> str:
    """A line for each finding. On a terminal long ones end at blanks and go on below; colours are there alone, unless
    NO_COLOR is set."""
    width = max(len(one.name) for one in diagnosis.findings)
    plain = bool(os.environ.get("NO_COLOR"))
    words = {level: level.ljust(4) if plain else click.style(level.ljust(4), COLOURS[level]) for level in COLOURS}
    indent, room = width + 8, columns(sys.stdout)
    texts = [wrapped(one.text, room, indent) for one in diagnosis.findings]
    return "\n".join(
        f"{words[one.level]}  {one.name:{width}}  {text}" for one, text in zip(diagnosis.findings, texts, strict=True)
    )


def table(forecasts: Sequence[Forecast]) -> None:
    """A line for each model, with how long the next start takes from a network only where one has something of it."""
    away = any(one.from_remote_s is not None for one in forecasts)
    rows = [(one.name, size(one.bytes), *_times(one)[not away :]) for one in forecasts]
    show(("MODEL", "SIZE", *["FROM NETWORK"] * away, "FROM DISK", "FROM DRAM"), rows)


def _times(one: Forecast) -> tuple[str, str, str]:
    if one.from_disk_s is None or one.from_dram_s is None:
        return "", "cannot be served", ""
    network = "-" if one.from_remote_s is None else seconds(one.from_remote_s)
    return network, seconds(one.from_disk_s), seconds(one.from_dram_s)
