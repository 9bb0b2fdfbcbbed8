"""How far transfers are: bars on a terminal, a line for each finished file in a pipe; always on standard error."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator

import click

from serverless_llm.cli.hub import Told
from serverless_llm.quantities import size


@contextlib.contextmanager
def transfers() -> Iterator[Told]:
    """What to tell of each file; it may be called from any thread."""
    with _bars() if sys.stderr.isatty() else contextlib.nullcontext(_lines()) as told:
        yield told


def _lines() -> Told:
    ended: set[str] = set()

    def told(name: str, done: int, total: int) -> None:
        if done >= total and name not in ended:
            ended.add(name)
            click.echo(f"{name}: {size(total)}", err=True)

    return told


@contextlib.contextmanager
def _bars() -> Iterator[Told]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    tasks: dict[str, TaskID] = {}
    lock = threading.Lock()
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:

        def told(name: str, done: int, total: int) -> None:
            with lock:
                if name not in tasks:
                    tasks[name] = progress.add_task(name, total=total)
            progress.update(tasks[name], completed=done)

        yield told
