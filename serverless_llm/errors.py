"""The exception tree.

ServerlessLLMError
├── ConfigurationError      a bad option, file or environment variable (exit 78)
│   └── OccupiedError       another process uses the state directory, its log included
├── CheckpointError         a checkpoint that cannot be served; the message names the file and what is wrong
│   └── TransientError      the system failed on it (I/O, descriptors, a mount): worth another try later
├── CapacityError           no room, now or ever; the message names the needed and the available bytes
│   └── KvCapacityError     a sequence's KV does not fit beside the weights that are here
├── ProtocolError           a frame that breaks the wire's rules; the link is closed
├── InvariantError          state that cannot be: a bug; carries the object's history
└── RequestError            a request that must be refused, as the HTTP surface shows it
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

NEAR = 0.7  # of 1: two letters of three are alike in names that have little to do with one another
LONGEST_COMPARED = 100  # characters of a name
MOST_COMPARED = 100  # names. Both bound for how long whoever asks may hold up others: some milliseconds
LONGEST_TOLD = 100  # characters in a message of a name that its sender may have made of any length; arbitrary
TRIED_AGAIN = "it is tried again once a minute"  # a model that failed; the head does


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: `; did you mean 'x'?`, or nothing where no known name is near."""
    from difflib import get_close_matches

    short = (one for one in known if len(one) <= LONGEST_COMPARED) if len(name) <= LONGEST_COMPARED else ()
    near = get_close_matches(name, islice(short, MOST_COMPARED), n=1, cutoff=NEAR)
    return f"; did you mean {near[0]!r}?" if near else ""


def shortened(text: str, width: int = LONGEST_TOLD) -> str:
    """At most `width` characters of it."""
    return text if len(text) <= width else text[: width - 1] + "…"


class ServerlessLLMError(Exception):
    """Anything this project raises on purpose."""


class ConfigurationError(ServerlessLLMError):
    """A bad option, configuration file or environment variable."""


class OccupiedError(ConfigurationError):
    """A state directory that another process uses."""


class CheckpointError(ServerlessLLMError):
    """A checkpoint that cannot be served."""


class TransientError(CheckpointError):
    """A checkpoint that the system could not read now."""


class CapacityError(ServerlessLLMError):
    """Something that does not fit, now or ever: whoever asked knows whether room may come."""


class KvCapacityError(CapacityError):
    """A sequence whose KV does not fit.

    Attributes:
        missing: bytes of the device that would do if weights gave them up.
        never: not even if no other model were there.
    """

    def __init__(self, message: str, missing: int, never: bool) -> None:
        super().__init__(message)
        self.missing = missing
        self.never = never


class ProtocolError(ServerlessLLMError):
    """A frame that breaks the wire's rules."""


class InvariantError(ServerlessLLMError):
    """A state that cannot be; the message carries the object's history."""


class RequestError(ServerlessLLMError):
    """A request that must be refused.

    Attributes:
        status: HTTP status.
        code: the `code` of the error body, one of a fixed list.
        param: the field at fault.
        retry_after: seconds, None where a retry is useless.
    """

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after = retry_after

    def body(self) -> dict[str, dict[str, str | None]]:
        """Its JSON, as every surface shows it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
