"""How far transfers are: bars on a terminal, lines in a pipe; always on standard error."""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Self

import click

from serverless_llm.quantities import size

if TYPE_CHECKING:
    from serverless_llm.cli.hub import Told

SILENT = 1.0  # seconds in which most models start
LOOK_AGAIN = 0.3
LONGEST = 0.2
APART = 10.0  # seconds between a pipe's lines of a file that comes; an arbitrary number


@contextlib.contextmanager
def transfers(clock: Callable[[], float] = time.monotonic) -> Iterator[Told]:
    """What to tell of each file; it may be called from any thread."""
    with _bars() if sys.stderr.isatty() else contextlib.nullcontext(_lines(clock)) as told:
        yield told


def _lines(clock: Callable[[], float]) -> Told:
    """A line of each file at its end, before that each `APART` seconds, and at its begin where some of it is there."""
    due: dict[str, float] = {}  # name -> when its next line may come
    lock = threading.Lock()

    def told(name: str, done: int, total: int) -> None:
        now, whole = clock(), done >= total
        with lock:
            next_line = due.setdefault(name, now if done else now + APART)
            if next_line == math.inf and not whole:  # some of it was damaged
                next_line = due[name] = now + APART
            if next_line == math.inf or (now < next_line and not whole):
                return
            due[name] = math.inf if whole else now + APART
        click.echo(f"{name}: {size(total)}" if whole else f"{name}: {size(done)} of {size(total)}", err=True)

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
