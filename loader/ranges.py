"""How long a range a server is asked for. Pure."""

from __future__ import annotations

PAGE = 4096
FIRST = 2 << 20  # bytes, of a server that nothing is known of: at 10 Mb/s those of all connections come in 30 s
LEAST = 64 << 10
MOMENT = 0.8  # seconds in which a range should come: short ones make progress visible, and let others go first soon
LATENT = 4  # or so many times as long as an answer takes to begin, lest connections wait more than they move
WEIGHT = 0.3  # of the newest answer; arbitrary


class Ranges:
    """Learns from answers, by any thread.

    Attributes:
        nbytes: of the next range, in whole pages.
    """

    def __init__(self, most: int) -> None:
        """`most`: bytes that a range ever has."""
        self.nbytes = min(FIRST, most)
        self._most = most
        self._wanted = 0.0

    def observe(self, nbytes: int, waited: float, moved: float) -> None:
        """One answer: the seconds until it began, and those in which its bytes came."""
        wanted = nbytes / max(moved, 1e-6) * max(MOMENT, LATENT * waited)
        self._wanted += (wanted - self._wanted) * (WEIGHT if self._wanted else 1)
        self.nbytes = min(max(int(self._wanted) // PAGE * PAGE, LEAST), self._most)
