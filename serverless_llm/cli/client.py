"""How the verbs reach a running server: plain HTTP from the standard library, so that a command starts fast."""

from __future__ import annotations

import json
import os
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from serverless_llm.cli.output import printable
from serverless_llm.errors import ConfigurationError
from serverless_llm.surroundings import LOOPBACK, PREFIX, began, state_dir

if TYPE_CHECKING:
    import http.client

UNREACHABLE = 69
ANSWER_SECONDS = 300.0  # a cold start of a large model from a slow disk, with its heartbeats in between
LOOK_SECONDS = 30.0  # for what the server has only to look up; one that is stopped must not hold up a listing for long


of_state_dir = click.option(
    "--state-dir",
    type=click.Path(path_type=Path, readable=False),  # `nobody` says more of one that is not
    help="Of the server to talk to, if it is not this user's own.",
)


class Unreachable(click.ClickException):
    """No server answers."""

    exit_code = UNREACHABLE


class Refusal(click.ClickException):
    """The server's error, as its body states it. `status` is HTTP's, 0 for an error inside a stream."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(printable(message))
        self.status = status
        self.code = code


class Answer(dict[str, Any]):
    """A JSON object of the server. What it lacks is a matter of versions, not a bug of this process."""

    def __missing__(self, key: str) -> Any:
        raise Refusal(0, f"the server's answer lacks {key!r}: is it of another version than this command line?")


@dataclass(frozen=True, slots=True)
class Server:
    """A server's address and key; one connection per call.

    `local`: on this machine, where paths mean the same. `public`: where clients find it, if not at `url`.
    """

    url: str
    api_key: str | None = None
    local: bool = True
    public: str = ""

    def call(self, method: str, path: str, body: Any = None, seconds: float | None = None) -> Any:
        """The JSON object of one request, for which is waited at most `seconds`; None where the answer is empty.

        Raises:
            Unreachable: nobody listens there, the connection broke, or it is no server of this kind.
            Refusal: the answer is an error.
            ConfigurationError: the request cannot be sent with this URL or key.
        """
        import http.client

        response = self._send(method, path, body, seconds or (LOOK_SECONDS if method == "GET" else ANSWER_SECONDS))
        try:
            with response:  # not when it is collected: a signal would be lost there
                text = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(f"the server at {self.url} broke off: {error}") from error
        try:
            answer = json.loads(text, object_hook=Answer) if text or method == "GET" else None
        except ValueError:
            answer = ()
        if not isinstance(answer, dict | None):
            raise Unreachable(f"what answers at {self.url} is no serverless-llm server")
        return answer

    def stream(self, path: str, body: Any) -> Iterator[dict[str, Any]]:
        """The data events of a streaming request, as they come. Raises as `call`."""
        import http.client

        response = self._send("POST", path, body, ANSWER_SECONDS)
        try:
            with response:
                for line in response:
                    if line.startswith(b"data: [DONE]"):
                        return
                    if line.startswith(b"data: ") and line.endswith(b"\n"):
                        yield _event(json.loads(line[6:], object_hook=Answer))
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Unreachable(f"the server at {self.url} broke off: {error}") from error
        raise Unreachable(f"the server at {self.url} broke off before the end")

    def _send(self, method: str, path: str, body: Any, seconds: float) -> http.client.HTTPResponse:
        import http.client

        parts = urllib.parse.urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        content = None if body is None else _encoded(body)
        try:
            connection = kind(parts.hostname or "", parts.port, timeout=seconds)
            connection.request(method, parts.path.rstrip("/") + path, content, headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(self._why(error)) from error
        except ValueError:  # whose text would show the key
            raise ConfigurationError(f"{PREFIX}URL or {PREFIX}API_KEY holds what no request can") from None
        if 300 <= response.status < 400:
            place = response.headers.get("Location", "elsewhere")
            raise ConfigurationError(f"{PREFIX}URL: {self.url} sends on to {printable(place)}")
        if response.status >= 400:
            with response:
                raise _refusal(response.status, response.read())
        return response

    def _why(self, error: Exception) -> str:
        """Why no answer came, and what to do."""
        import ssl

        if isinstance(error, ssl.SSLCertVerificationError):
            return (
                f"the certificate of {self.url} is not trusted here ({error.verify_message}): name the file of its "
                "authority in SSL_CERT_FILE, and the server as the certificate does"
            )
        if isinstance(error, ssl.SSLError):
            return f"what answers at {self.url} does not speak TLS ({error.reason}): is it http://?"
        if isinstance(error, ConnectionResetError):  # RemoteDisconnected is one
            return f"what listens at {self.url} hung up ({error}); if it speaks TLS, its URL begins with https://"
        hint = "; start one: serverless-llm serve" if self.local else ""
        return f"no server answers at {self.url} ({error}){hint}"


def _encoded(body: Any) -> bytes:
    """As JSON. Bytes that the locale could not read, which Python keeps as halves of surrogates, are bytes again.

    Raises:
        click.UsageError: they are not UTF-8.
    """
    content = json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogateescape")
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise click.UsageError(f"the prompt, name or path that was given is not UTF-8: {error.reason}") from None
    return content


def _event(event: dict[str, Any]) -> dict[str, Any]:
    if "error" in event:
        raise Refusal(0, event["error"]["message"], event["error"].get("code") or "")
    return event


def _refusal(status: int, text: bytes) -> Refusal:
    try:
        error = json.loads(text)["error"]
        hint = f"; the command line takes it from {PREFIX}API_KEY" if status == 401 else ""
        return Refusal(status, error["message"] + hint, error.get("code") or "")
    except (ValueError, KeyError, TypeError):
        return Refusal(status, f"HTTP {status} of something that is no serverless-llm server")


def model_path(name: str) -> str:
    """The admin route of a model."""
    return f"/admin/models/{urllib.parse.quote(name, safe='', errors='surrogateescape')}"


def find(given: Path | None = None) -> Server:
    """The server of the state directory that was `given`, of `SERVERLESS_LLM_URL`, or of this user's state directory.

    Raises:
        Unreachable: it is not there.
    """
    key = os.environ.get(f"{PREFIX}API_KEY", "").strip() or None
    url = os.environ.get(f"{PREFIX}URL")
    if url and given is None:
        return _named(url, key)
    folder = given or state_dir(os.environ)
    head = read_head(folder)
    if head is None:
        raise nobody(folder)
    kept = _kept_key(folder)
    return Server(head["url"], (kept or key) if given else (key or kept), public=head.get("public", ""))


def _named(url: str, key: str | None) -> Server:
    try:
        parts = urllib.parse.urlsplit(url)
        valid = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number
        valid = False
    if not valid:
        raise ConfigurationError(f"{PREFIX}URL: {url!r} is not of the form http://host:port")
    if parts.path.rstrip("/").endswith("/v1"):
        raise ConfigurationError(f"{PREFIX}URL: {url!r} is what OpenAI clients take; here it ends before the /v1")
    return Server(url.rstrip("/"), key, parts.hostname in LOOPBACK)


def demand_local(given: Path | None) -> None:
    """
    Raises:
        click.UsageError: no state directory is given, and the environment names a server on another machine.
        ConfigurationError: it names none.
    """
    url = os.environ.get(f"{PREFIX}URL")
    if given is None and url and not _named(url, None).local:
        raise click.UsageError(f"{PREFIX}URL names {url}; for a server of this machine give --state-dir")


def local_state_dir(given: Path | None) -> Path:
    """The state directory of a server on this machine.

    Raises:
        click.UsageError: the environment names a server on another one.
        ConfigurationError: it names none.
        Unreachable: this user may not read it.
    """
    demand_local(given)
    folder = given or state_dir(os.environ)
    if _is_shut(folder):
        raise nobody(folder)
    return folder


def nobody(folder: Path, advice: str = "; start one: serverless-llm serve") -> Unreachable:
    """No head lives in this state directory; agents of a dead one may, for a while."""
    if _is_shut(folder):
        return Unreachable(
            f"{folder} may not be read by this user, but by {_owner(folder)}: whether a server runs there is not "
            f"known; {PREFIX}URL and {PREFIX}API_KEY reach one without it"
        )
    left = orphans(folder)
    note = f", though {len(left)} agent(s) of a killed one still wait for a new one" if left else ""
    return Unreachable(f"no server is running (looked in {folder}){note}{advice}")


def _is_shut(folder: Path) -> bool:
    return os.access(folder, os.F_OK) and not os.access(folder, os.R_OK | os.X_OK)


def _owner(folder: Path) -> str:
    try:
        return folder.owner()
    except KeyError:  # nobody has a name for it
        return f"user {folder.stat().st_uid}"


def orphans(folder: Path) -> list[int]:
    """The pids of the agents that live on a state directory."""
    from serverless_llm.node.state import holder

    return [pid for lock in sorted((folder / "agents").glob("*.lock")) if (pid := holder(lock)) is not None]


def read_head(folder: Path) -> dict[str, Any] | None:
    """What the head of a state directory wrote about itself: url, generation, pid, began. None unless it lives."""
    try:
        head: dict[str, Any] = json.loads((folder / "head.json").read_text())
        return head if lives(head) else None
    except (OSError, ValueError, KeyError):
        return None


def lives(head: dict[str, Any]) -> bool:
    """Whether the process that wrote this is there; another one may have its number by now."""
    now = began(head["pid"])
    return now is not None and head.get("began") in (None, now)


def _kept_key(folder: Path) -> str | None:
    """The key that the server generated for itself, if it did."""
    try:
        return (folder / "api-key").read_text().strip() or None
    except OSError:
        return None
