"""The head's log: on standard error, as text on a terminal and JSON elsewhere, and as JSON in `logs/head.log`.

The file is written by a thread of its own, so that a disk that hangs holds up nobody, and is rotated at the size of an
agent's. A line that cannot be written is lost.
"""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import queue
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from serverless_llm.errors import OccupiedError, ServerlessLLMError

TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"
LIMIT = 16 << 20  # bytes of the log, and as many of the one before it; arbitrary
BACKLOG = 10_000  # lines that may wait for the disk


class JsonLines(logging.Formatter):
    """One object a line: time (ISO 8601 with offset), level, logger, and the record's fields or its message."""

    def format(self, record: logging.LogRecord) -> str:
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
    """Hands records to the file's thread as they are; drops them where it is far behind."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record


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
    told = logging.StreamHandler()
    on_terminal = sys.stderr.isatty()
    told.setFormatter(logging.Formatter(TEXT) if on_terminal else JsonLines())
    told.setLevel(logging.WARNING if on_terminal and not verbose else logging.INFO)
    kept = logging.handlers.RotatingFileHandler(folder / "head.log", maxBytes=LIMIT, backupCount=1, delay=True)
    kept.setFormatter(JsonLines())
    records: queue.Queue[logging.LogRecord] = queue.Queue(BACKLOG)
    root.handlers = [told, _Waiting(records)]
    root.setLevel(logging.INFO)
    thread = logging.handlers.QueueListener(records, kept)
    thread.start()
    try:
        yield
    except OccupiedError:  # the log is another's
        raise
    except Exception as error:
        root.removeHandler(told)  # whoever catches it tells the terminal
        root.error("the server ended: %s", error, exc_info=None if isinstance(error, ServerlessLLMError) else error)
        raise
    finally:
        thread.stop()
        kept.close()
        root.handlers, level, logging.raiseExceptions = former
        root.setLevel(level)
