"""How long a range a server is asked for. Pure."""

from __future__ import annotations

from serverless_llm.loader.plan import PAGE

FIRST = 2 << 20  # bytes, of a server that nothing is known of: at 10 Mb/s those of all connections come in 30 s
LEAST = 64 << 10
MOMENT = 0.8  # seconds in which a range should come: short ones make progress visible, and let others go first soon
LATENT = 4  # or so many times as long as an answer takes to begin, lest connections wait more than they move,
PATIENT = 4.0  # but in no more seconds: a load that tells of nothing for 10 s counts as stuck
KEPT = 0.7  # of what was learned, at each answer; arbitrary


class Ranges:
    """Learns from a server's answers, by any thread: of two at once, one may be lost.

    Attributes:
        nbytes: of the next range, in whole pages.
    """

    def __init__(self, most: int) -> None:
        """`most`: bytes that a range ever has."""
        self.nbytes = min(FIRST, most)
        self._most = most
        self._answers = self._bytes = self._waited = self._moved = 0.0  # of late: older ones count less

    def observe(self, nbytes: int, waited: float, moved: float) -> None:
        """One answer: the seconds until it began, and those in which its bytes came.

        A short one may come all at once, however slow the link: so each counts by its bytes, and none makes the next
        range longer than twice its own.
        """
        self._answers = KEPT * self._answers + 1
        self._bytes = KEPT * self._bytes + nbytes
        self._waited = KEPT * self._waited + waited
        self._moved = KEPT * self._moved + moved
        seconds = min(max(MOMENT, LATENT * self._waited / self._answers), PATIENT)
        wanted = seconds * self._bytes / max(self._moved, 1e-6)
        longest = min(max(self.nbytes, 2 * nbytes), self._most)
        self.nbytes = min(max(int(min(wanted, longest)) // PAGE * PAGE, LEAST), self._most)
