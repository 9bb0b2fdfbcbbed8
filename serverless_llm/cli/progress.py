"""How far transfers are: bars on a terminal, a line for each finished file in a pipe; always on standard error."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Self

import click

from serverless_llm.quantities import size

if TYPE_CHECKING:
    from serverless_llm.cli.hub import Told

SILENT = 1.0  # seconds in which most models start
LOOK_AGAIN = 0.3
LONGEST = 0.2


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


class Waiting:
    """Tells on a terminal, after a second, what an answer waits for, until it begins.

    `look` says what; a ClickException of it ends the telling: it is for whoever waits, who meets it too.
    """

    def __init__(self, look: Callable[[], str], shown: bool) -> None:
        self._look = look
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._tell, daemon=True) if shown else None

    def __enter__(self) -> Self:
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Wipes what is shown, unless a look takes longer than whoever has an answer should wait. Idempotent."""
        self._over.set()
        if self._thread:
            self._thread.join(LONGEST)

    def _tell(self) -> None:
        from rich.console import Console

        if self._over.wait(SILENT):
            return
        with contextlib.suppress(click.ClickException), Console(stderr=True).status(self._look()) as status:
            while not self._over.wait(LOOK_AGAIN):
                status.update(self._look())


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

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), DownloadColumn(), TransferSpeedColumn())
    tasks: dict[str, TaskID] = {}
    lock = threading.Lock()
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), expand=True) as progress:

        def told(name: str, done: int, total: int) -> None:
            with lock:
                if name not in tasks:
                    tasks[name] = progress.add_task(name, total=total)
            progress.update(tasks[name], completed=done)

        yield told
