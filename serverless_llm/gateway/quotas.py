"""What a key may use: requests and tokens a minute, and requests at a time. Pure: `now` is given, in seconds.

Both rates are token buckets of one minute's allowance, so a burst of that size passes. Tokens are known only when a
request has ended; they are taken then, and a level below nothing is waited for by the next request.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from serverless_llm.errors import RequestError
from serverless_llm.gateway.keys import Key

MINUTE = 60.0
BUSY_SECONDS = 1.0  # when to ask again where others of the same key must end first; arbitrary


@dataclass(slots=True)
class Bucket:
    """An allowance that fills itself; `used` falls to 0 within a minute of rest, and may be above the allowance."""

    used: float = 0.0
    at: float = 0.0

    def wait(self, allowance: int, need: float, now: float) -> float:
        """Seconds until `need` more fits; 0: now."""
        self.used = max(0.0, self.used - (now - self.at) * allowance / MINUTE)
        self.at = now
        return max(0.0, self.used + need - allowance) * MINUTE / allowance

    def take(self, amount: float) -> None:
        self.used += amount


@dataclass(slots=True)
class Use:
    """What one key uses now."""

    requests: Bucket = field(default_factory=Bucket)
    tokens: Bucket = field(default_factory=Bucket)
    running: int = 0


class Quotas:
    """The use of every limited key, by its id; a key that is read anew keeps what it has used."""

    def __init__(self) -> None:
        self._uses: dict[str, Use] = {}

    def enter(self, key: Key, now: float) -> Stay:
        """Counts a request, which must `leave`.

        Raises:
            RequestError: 429 rate_limit_exceeded; nothing was counted.
        """
        use = self._uses.setdefault(key.id, Use())
        if key.concurrency is not None and use.running >= key.concurrency:
            raise _exceeded(f"{key.concurrency} requests at a time", BUSY_SECONDS)
        if key.tokens_per_minute is not None:
            _check(use.tokens.wait(key.tokens_per_minute, 1, now), f"{key.tokens_per_minute} tokens a minute")
        if key.requests_per_minute is not None:
            _check(use.requests.wait(key.requests_per_minute, 1, now), f"{key.requests_per_minute} requests a minute")
        use.requests.take(1)
        use.running += 1
        return Stay(use, key.concurrency)


@dataclass(slots=True)
class Stay:
    """One request, from `Quotas.enter` until it ends. `limit`: its key's concurrency."""

    use: Use
    limit: int | None
    choices: int = 1

    def grow(self, choices: int) -> None:
        """It turns out to have so many choices; each of them runs, and counts as a request.

        Raises:
            RequestError: 429 rate_limit_exceeded; it counts as before.
        """
        others = self.use.running - self.choices
        if self.limit is not None and others + choices > self.limit:
            hopeless = choices > self.limit
            what = f"{self.limit} requests at a time; this one has {choices} choices, which count as so many"
            raise _exceeded(what, None if hopeless else BUSY_SECONDS)
        self.use.running += choices - self.choices
        self.choices = choices

    def leave(self, tokens: int) -> None:
        """It ended after `tokens` tokens of prompt and answer."""
        self.use.running -= self.choices
        self.use.tokens.take(tokens)


def _check(seconds: float, limit: str) -> None:
    if seconds > 0:
        raise _exceeded(limit, seconds)


def _exceeded(limit: str, seconds: float | None) -> RequestError:
    return RequestError(429, "rate_limit_exceeded", f"this key is limited to {limit}", retry_after=seconds)
