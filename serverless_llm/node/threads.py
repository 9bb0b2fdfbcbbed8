"""Work that may never return, beside the loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def apart(work: Callable[[], T]) -> asyncio.Future[T]:
    """What `work` returns or raises, from a daemon thread of its own.

    Reading on a dead mount never returns. Such a thread takes none of the executor's few, and no exit waits for it.
    """
    told: Future[T] = Future()
    told.set_running_or_notify_cancel()  # so that whoever cancels the future below leaves this one to the thread

    def run() -> None:
        try:
            told.set_result(work())
        except Exception as error:  # noqa: BLE001 - whoever awaits it is told
            told.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return asyncio.wrap_future(told)
