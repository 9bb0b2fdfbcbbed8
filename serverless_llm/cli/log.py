"""The head's log: on standard error, as text on a terminal and JSON elsewhere, and as JSON in `logs/head.log`.

Both are written by a thread, so that neither a disk nor a terminal that hangs holds up anybody, and a terminal neither
the file nor the end; the file is rotated at the size of an agent's. A line that cannot be written is lost.
"""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import select
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from queue import Queue
from typing import TextIO

from serverless_llm.errors import OccupiedError, ServerlessLLMError

ENDED = "the server ended: %s"
TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"
LIMIT = 16 << 20  # bytes of the log, and as many of the one before it; arbitrary
BACKLOG = 10_000  # lines that may wait to be written
STDERR = 2
PATIENCE = 1.0  # seconds with a terminal that takes nothing, once
PAUSE = 0.05  # seconds; lines that come within it are written together, for each waking of the thread holds up the head


class JsonLines(logging.Formatter):
    """One object a line: time (ISO 8601 with offset), level, logger, and the record's fields or its message."""

    def format(self, record: logging.LogRecord) -> str:
        line: str | None = getattr(record, "line", None)  # as another handler wrote it
        if line is None:
            line = record.line = self._made(record)
        return line

    def _made(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
        }
        line |= getattr(record, "fields", None) or {"message": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _Waiting(logging.handlers.QueueHandler):
    """Hands records to the thread as they are; drops them where it is far behind."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record


class _Terminal(logging.StreamHandler[TextIO]):
    """Standard error; while it takes nothing, as after Ctrl-S, its lines are lost and nobody waits for it."""

    _hangs = False

    def emit(self, record: logging.LogRecord) -> None:
        _, ready, _ = select.select([], [STDERR], [], 0 if self._hangs else PATIENCE)
        self._hangs = not ready
        if ready:
            super().emit(record)


class _Writer(logging.handlers.QueueListener):
    """Where there is nothing to write it pauses, and only then waits to be woken."""

    queue: Queue[logging.LogRecord]

    def enqueue_sentinel(self) -> None:
        self.queue.put(self._sentinel)  # type: ignore[attr-defined]  # behind a full queue, too

    def dequeue(self, block: bool) -> logging.LogRecord:
        if self.queue.empty():
            time.sleep(PAUSE)
        return super().dequeue(block)


@contextlib.contextmanager
def logged(folder: Path, verbose: bool) -> Iterator[None]:
    """Logs until the end of the context, and what ended it.

    Args:
        folder: of the log.
        verbose: every decision, on a terminal too.
    """
    root = logging.getLogger()
    former = root.handlers[:], root.level, logging.raiseExceptions
    logging.raiseExceptions = False  # a full disk is no reason to write about it on and on
    told = _Terminal()
    on_terminal = sys.stderr.isatty()
    told.setFormatter(logging.Formatter(TEXT) if on_terminal else JsonLines())
    told.setLevel(logging.WARNING if on_terminal and not verbose else logging.INFO)
    kept = logging.handlers.RotatingFileHandler(folder / "head.log", maxBytes=LIMIT, backupCount=1, delay=True)
    kept.setFormatter(JsonLines())
    records: Queue[logging.LogRecord] = Queue(BACKLOG)
    thread = _Writer(records, told, kept, respect_handler_level=True)
    root.handlers = [_Waiting(records)]
    root.setLevel(logging.INFO)
    thread.start()
    try:
        yield
    except OccupiedError:  # the log is another's
        raise
    except Exception as error:
        told.addFilter(lambda record: record.msg != ENDED)  # whoever catches it tells the terminal
        root.error(ENDED, error, exc_info=None if isinstance(error, ServerlessLLMError) else error)
        raise
    finally:
        thread.stop()
        with contextlib.suppress(OSError):  # what a full disk did not take; why this ends is told all the same
            kept.close()
        root.handlers, level, logging.raiseExceptions = former
        root.setLevel(level)
