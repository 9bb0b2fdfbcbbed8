"""An operator's cap on a link, shared by the threads that use it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Pacer:
    """At most `rate` bytes per second; 0: no cap. `clock` gives monotonic seconds."""

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate = rate
        self._clock = clock
        self._next = 0.0  # when the link is free again
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def delay(self, nbytes: int) -> float:
        """Books `nbytes` on the link; the seconds until they would have crossed it."""
        if not self.rate:
            return 0.0
        with self._lock:
            now = self._clock()
            self._next = max(self._next, now) + nbytes / self.rate
            return self._next - now

    def wait(self, nbytes: int) -> None:
        """Books `nbytes` and sleeps until they would have crossed the link, or `stop`."""
        seconds = self.delay(nbytes)
        if seconds:
            self._stopped.wait(seconds)

    def stop(self) -> None:
        """Ends every wait, now and later."""
        self._stopped.set()
