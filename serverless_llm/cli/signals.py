"""Signals that end a verb which has something to put away first."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


class Terminated(BaseException):
    """SIGTERM or SIGHUP came. `status`: what the process ends with."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


def _raise(number: int, _frame: object) -> None:
    raise Terminated(number)


@contextlib.contextmanager
def unwinding() -> Iterator[None]:
    """Has these signals raise `Terminated`, as Ctrl-C raises KeyboardInterrupt, so that `finally` holds.

    One that is ignored, as SIGHUP is below nohup, stays so.
    """
    heard = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) != signal.SIG_IGN]
    former = {number: signal.signal(number, _raise) for number in heard}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
