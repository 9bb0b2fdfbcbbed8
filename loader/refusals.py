"""Why a request to a server failed, in words. obstore tells it in what it prints of the error's insides alone."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

_UNREACHED = re.compile(r"Error\(\s*Connect,")
_NO_CONNECTION = {
    "ConnectionRefused": "connection refused",
    "Name or service not known|No address associated": "its name is not known",
    "dns error": "its name cannot be looked up",
    "TimedOut": "timed out",
    "NetworkUnreachable|HostUnreachable": "there is no route to it",
    "InvalidCertificate": "its certificate is not trusted",
    "InvalidContentType": "it does not speak TLS",
}
_BROKEN = {
    r"kind: Timeout,": "the server was silent, or too slow",
    r"kind: Interrupted,|IncompleteMessage|ConnectionReset": "the connection broke off",
}
_ASKED = re.compile(r"uri: Some\(\s*(\S+),")


def unreached(error: BaseException) -> str:
    """Why no connection was made; empty where one was."""
    text = str(error)
    return (_word(_NO_CONNECTION, text) or "no connection") if _UNREACHED.search(text) else ""


def address(error: BaseException) -> str:
    """Host and port of the server that was asked; empty where it is not told."""
    asked = _ASKED.search(str(error))
    return urlsplit(asked[1]).netloc.rpartition("@")[2] if asked else ""


def first_line(error: BaseException) -> str:
    """What it says of itself, without a URL's query, which may be a signature, and without the server's page."""
    line = re.sub(r"^Generic \w+ error: ", "", (str(error).splitlines() or [type(error).__name__])[0])
    return re.sub(r"(status code: \d+ [\w ]+):.*", r"\1", re.sub(r"\?\S*", "", line))


def reason(error: BaseException) -> str:
    """Why an answer did not come, or not whole."""
    line = first_line(error)
    answered = re.search(r"status code: (\d+ [\w ]+)", line)
    return f"the server answered {answered[1].strip()}" if answered else _word(_BROKEN, str(error)) or line


def _word(words: dict[str, str], text: str) -> str:
    return next((word for pattern, word in words.items() if re.search(pattern, text)), "")
