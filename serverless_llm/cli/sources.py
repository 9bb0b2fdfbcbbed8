"""What a person may name as a model's source: a directory, or one of the demo checkpoints that come with the wheel."""

from __future__ import annotations

import re
from pathlib import Path

import click

from serverless_llm.config import NAME
from serverless_llm.demo import tasks
from serverless_llm.errors import did_you_mean
from serverless_llm.quantities import parse_pairs


def resolve(source: str) -> str:
    """The absolute directory of a source.

    Raises:
        click.UsageError: it is neither a directory nor the name of a demo checkpoint.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if source in tasks.TASKS:
        return str(tasks.checkpoint_dir(source))
    raise click.UsageError(
        f"{source!r} is neither a directory nor one of {', '.join(tasks.TASKS)}{did_you_mean(source, tasks.TASKS)}"
    )


def is_source(text: str) -> bool:
    return text in tasks.TASKS or Path(text).expanduser().is_dir()


def name_of(source: str) -> str:
    """A model's name made of its source's last part."""
    name = re.sub(r"[^\w.-]+", "-", Path(source).expanduser().resolve().name).lstrip("-._")
    if not NAME.fullmatch(name):
        raise click.UsageError(f"no name can be made of {source!r}; give it one: serverless-llm deploy NAME DIR")
    return name


def named(given: tuple[str, ...]) -> dict[str, str]:
    """Models of `NAME=SOURCE` or bare sources, as name -> absolute directory."""
    pairs = [text if "=" in text else f"{name_of(text)}={text}" for text in given]
    return {name: resolve(source) for name, source in parse_pairs(pairs).items()}
