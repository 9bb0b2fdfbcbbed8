"""`serverless-llm logs`: what head and agents wrote, in the order of time, as it stands or as it comes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import click

from serverless_llm.cli import completion
from serverless_llm.cli.client import local_state_dir, of_state_dir
from serverless_llm.cli.options import ANY_COUNT
from serverless_llm.cli.output import printable

POLL = 0.1  # seconds between two looks for more
REQUEST = "serverless_llm.request"
HEAD = ("time", "level", "logger")


class Line(NamedTuple):
    """One line. `at`: unix time; `source`: `head`, or a node's name; `fields`: of the JSON that it may be."""

    at: float
    source: str
    text: str
    fields: dict[str, Any]


class Log:
    """One log file, read on across its rotation."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.source = path.stem.removeprefix("agent-")
        self._file: TextIO | None = None
        self._half = ""
        self._at = 0.0  # of the last line that told: those of a traceback belong to it

    def last(self, count: int, requests: bool = False) -> list[Line]:
        """The last lines of what is there, or of requests alone."""
        older = [self._line(text) for text in _texts(self.path.with_name(f"{self.path.name}.1"))]
        lines = [line for line in [*older, *self.more()] if not requests or _of_request(line)]
        return lines[-count:] if count else []

    def more(self) -> list[Line]:
        """What came since, whole lines only."""
        moved = self._file is None or self._moved()
        lines = self._read()  # of the former file its end, which came before it was moved
        if moved:
            self._open()
            lines += self._read()
        return lines

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _open(self) -> None:
        self.close()
        self._half = ""
        try:
            self._file = self.path.open(errors="replace")
        except OSError:
            self._file = None

    def _read(self) -> list[Line]:
        if self._file is None:
            return []
        *whole, self._half = (self._half + self._file.read()).split("\n")
        return [self._line(text) for text in whole]

    def _moved(self) -> bool:
        """It was rotated, or cut in place."""
        assert self._file is not None
        try:
            now = self.path.stat()
        except OSError:
            return True
        opened = os.fstat(self._file.fileno())
        return opened.st_ino != now.st_ino or now.st_size < os.lseek(self._file.fileno(), 0, os.SEEK_CUR)

    def _line(self, text: str) -> Line:
        fields = _fields(text)
        self._at = _time(fields.get("time") or text[:23]) or self._at
        return Line(self._at, self.source, text, fields)


def _texts(path: Path) -> Iterable[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return ()


def _fields(text: str) -> dict[str, Any]:
    """What a line of JSON holds; of another line, nothing."""
    try:
        value = json.loads(text) if text.startswith("{") else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _time(text: object) -> float:
    """Unix time of ISO 8601, or of the form of agents' logs in local time; 0 of anything else."""
    try:
        return datetime.fromisoformat(str(text).replace(",", ".")).timestamp()
    except ValueError:
        return 0.0


def _when(line: Line) -> float:
    return line.at


def find_logs(folder: Path, sources: tuple[str, ...]) -> list[Log]:
    """The logs of a state directory; of `sources` alone, where any are named."""
    logs = [Log(path) for path in sorted((folder / "logs").glob("*.log"))]
    return [log for log in logs if not sources or log.source in sources]


def sources_of(folder: Path) -> list[str]:
    """What a state directory has logs of."""
    return [log.source for log in find_logs(folder, ())]


def following(folder: Path, sources: tuple[str, ...], logs: list[Log]) -> Iterator[Line]:
    """Lines as they come, for ever; of logs that begin later too."""
    known = {log.path for log in logs}
    while True:
        fresh = [log for log in find_logs(folder, sources) if log.path not in known]
        logs += fresh
        known |= {log.path for log in fresh}
        yield from sorted((line for log in logs for line in log.more()), key=_when)
        time.sleep(POLL)


def shown(line: Line, as_json: bool) -> str:
    """A line for people, or as JSON."""
    if as_json:
        return json.dumps({"source": line.source, **(line.fields or {"message": line.text})})
    if not line.fields:
        return f"{line.source}  {printable(line.text)}"
    rest = {name: value for name, value in line.fields.items() if name not in HEAD}
    message = rest.pop("message", "")
    pairs = " ".join(f"{name}={value}" for name, value in rest.items())
    when = str(line.fields.get("time", ""))[:23].replace("T", " ").replace(".", ",")
    words = (line.source + " ", when, line.fields.get("level", ""), line.fields.get("logger", ""), message, pairs)
    return " ".join(printable(word) for word in map(str, words) if word)


@click.command()
@click.argument("sources", nargs=-1, metavar="[SOURCE]...", shell_complete=completion.logs)
@click.option("--follow", "-f", is_flag=True, help="Go on with what comes, until Ctrl-C.")
@click.option("--lines", "-n", type=ANY_COUNT, default=100, show_default=True, help="Of each log.")
@click.option("--requests", is_flag=True, help="Only the lines of requests.")
@of_state_dir
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one object a line.")
def logs(
    sources: tuple[str, ...], follow: bool, lines: int, requests: bool, state_dir: Path | None, as_json: bool
) -> None:
    """Show the logs of the server on this machine, whether it runs or not.

    SOURCE is head, or a node's name such as node0; without one, all are shown in the order of time.
    """
    folder = local_state_dir(state_dir)
    found = find_logs(folder, sources)
    if not found and not follow:
        what = f"of {', '.join(sources)} " if sources else ""
        there = ", ".join(sources_of(folder))
        raise click.ClickException(f"there are no logs {what}in {folder / 'logs'}" + (there and f"; there are {there}"))
    try:
        for line in sorted((line for log in found for line in log.last(lines, requests)), key=_when):
            click.echo(shown(line, as_json))
        if follow:
            for line in following(folder, sources, found):
                if not requests or _of_request(line):
                    click.echo(shown(line, as_json))
    finally:
        for log in found:
            log.close()


def _of_request(line: Line) -> bool:
    return line.fields.get("logger") == REQUEST
