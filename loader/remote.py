"""Checkpoints behind a URL: which files one has, and ranges of their bytes, through obstore.

`s3://`, `gs://` and `az://` list what lies below a prefix; `http://` and `https://` are asked for the names that a
Hugging Face directory can have, and for those that its index names. Credentials are obstore's own, of the environment.

What a server says is held against what was asked: names stay below the URL, answers are of the file that was listed
(size and ETag, or the time of its last change) and of the range, no byte short and none over.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from serverless_llm.errors import CheckpointError, ConfigurationError, TransientError
from serverless_llm.extras import extra
from serverless_llm.loader import manifest, refusals
from serverless_llm.loader.manifest import CONFIG, INDEX, SINGLE, TEXTS
from serverless_llm.loader.members import shown

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

LISTING = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE"}  # scheme -> how its variables begin
PLAIN = ("http", "https")
MOST_FILES = 10_000  # below a prefix; an arbitrary bound on requests and memory
ASKED_AT_ONCE = 16
SILENCE = timedelta(seconds=30)
LONGEST = timedelta(minutes=1)  # of one answer: a server that is worth waiting for sends `LEAST` in it
LEAST = 256 << 10  # bytes
TRIES = 3  # of a range that breaks off without a byte; each is obstore's, which tries errors of the server again
RETRY: RetryConfig = {"max_retries": 4}
PATIENCE = timedelta(seconds=5)  # with a host that does not answer, or answers with errors: somebody may be at a prompt
DIGESTS = {"sha256": 64, "md5": 32}  # names in an object's metadata -> hexadecimal digits
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

T = TypeVar("T")
U = TypeVar("U")
Told = Callable[[int, float, float], None]  # bytes of an answer, seconds until it began, and in which they came


class RemoteFile(NamedTuple):
    """A file as a server names it. `size`: bytes; `etag`: empty where it gives none; `modified`: seconds
    since 1970, 0 where it gives none."""

    name: str
    size: int
    etag: str
    modified: float

    @property
    def version(self) -> tuple[str, int, str | float]:
        """What changes with the file. Servers that share their files may differ in the time alone."""
        return self.name, self.size, self.etag or self.modified


def is_url(source: object) -> bool:
    """Whether a source is meant as a URL; of which kinds, `Remote` tells."""
    return isinstance(source, str) and _URL.match(source) is not None


def checked(url: str) -> str:
    """The URL as it is known by: without slashes at its end.

    Raises:
        CheckpointError: it is not one of a checkpoint.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise CheckpointError(f"{url!r} is no URL: {error}") from None
    if parts.scheme not in (*LISTING, *PLAIN):
        known = ", ".join(f"{scheme}://" for scheme in (*LISTING, *PLAIN))
        raise CheckpointError(f"{url}: no source begins with {parts.scheme}://; there are {known}")
    if "@" in parts.netloc:
        hint = "set the store's variables" if parts.scheme in LISTING else "give it without: no credentials are sent"
        raise CheckpointError(f"a URL of {parts.hostname} has a user or a password in it: {hint}")
    if not parts.netloc or not url.isprintable() or " " in url or ".." in parts.path.split("/"):
        raise CheckpointError(f"{url!r} is no URL of a directory")
    if "?" in url or "#" in url:
        raise CheckpointError(f"{url.partition('?')[0]}: a source's URL is a directory's, without ? and #")
    return url.rstrip("/")


class Remote:
    """One checkpoint's directory on a server. Its methods may be called from any thread."""

    def __init__(self, url: str, silence: timedelta = SILENCE, longest: timedelta | None = None) -> None:
        """
        Args:
            silence: in which a server sends nothing at all, until it counts as gone.
            longest: of one answer, which is broken off then; the next one goes on at its byte. None: `LONGEST`.

        Raises:
            CheckpointError: no source has such a URL.
            ConfigurationError: obstore is missing, or its variables are wrong.
        """
        self._silence = silence
        self._longest = longest or LONGEST
        self.url = checked(url)
        self._lists = urlsplit(self.url).scheme in LISTING
        self._obstore = extra("remote", "obstore", "sources behind a URL", "exceptions", "store")
        try:
            self._store = self._open()
        except (self._obstore.exceptions.BaseError, ValueError) as error:
            hint = _CREDENTIALS[urlsplit(self.url).scheme]
            raise ConfigurationError(f"{self.url}: {refusals.first_line(error)}: {hint}") from error

    def _open(self) -> ObjectStore:
        scheme = urlsplit(self.url).scheme
        patience = min(PATIENCE, self._silence)
        client: ClientConfig = {
            "timeout": self._longest,
            "read_timeout": self._silence,
            "connect_timeout": patience,
        }
        allowed = os.environ.get(f"{LISTING[scheme]}_ALLOW_HTTP") if self._lists else str(scheme == "http")
        client["allow_http"] = str(allowed).lower() == "true"
        stores = self._obstore.store
        opened = stores.from_url if self._lists else stores.HTTPStore.from_url
        store: ObjectStore = opened(self.url, client_options=client, retry_config={**RETRY, "retry_timeout": patience})
        return store

    def files(self) -> list[RemoteFile]:
        """The files that belong to the checkpoint, those of weights last, each kind by name.

        Raises:
            CheckpointError: there is none at this URL, or it lacks a file; names it.
            TransientError: the server fails.
        """
        found = self._listed() if self._lists else self._asked([SINGLE, INDEX, CONFIG, *TEXTS])
        texts = [
            found[name] for name in sorted(found) if name in (CONFIG, *TEXTS) or manifest.TEMPLATES.fullmatch(name)
        ]
        if manifest.choose(list(found), self.url) == SINGLE:
            names, others = [SINGLE], texts
        else:
            names, others = self._shards(found[INDEX]), [*texts, found[INDEX]]
        self._check_names([*(file.name for file in others), *names])
        shards = found if self._lists or names == [SINGLE] else self._asked(names)
        missing = [name for name in names if name not in shards]
        if missing:
            raise CheckpointError(f"{self.url} has no {missing[0]}, which its index names")
        self._check_versioned([shards[name] for name in names])
        return [*others, *(shards[name] for name in names)]

    def _check_versioned(self, weights: list[RemoteFile]) -> None:
        """Nothing else would tell a file from another of its size, so that bytes of both would be taken for one's."""
        for file in weights:
            if not (file.etag or file.modified):
                raise CheckpointError(
                    f"{self.url}/{file.name}: the server tells neither its ETag nor when it changed (Last-Modified), so"
                    " that nobody could tell it from another: have it send one, or download the files to a directory"
                )

    def _shards(self, index: RemoteFile) -> list[str]:
        try:
            text = self.text(index, manifest.MAX_INDEX)
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.url}/{INDEX} is not UTF-8") from None
        return sorted(set(manifest.weight_map_of(text, f"{self.url}/{INDEX}").values()))

    def _check_names(self, names: list[str]) -> None:
        """They are of files that a directory can have beside each other."""
        for name in names:
            if not manifest.can_be_named(name):
                raise CheckpointError(f"{self.url}: no directory can have a file of the name {shown(name)}")
        for before, after in pairwise(sorted(names, key=lambda name: name.replace("/", "\0"))):
            if after.startswith(f"{before}/"):
                raise CheckpointError(f"{self.url}: no directory can have {shown(before)} and {shown(after)}")

    def _listed(self) -> dict[str, RemoteFile]:
        found: dict[str, RemoteFile] = {}
        with self._errors(""):
            for batch in self._obstore.list(self._store):
                found |= {meta["path"]: _file(meta["path"], meta) for meta in batch}
                if len(found) > MOST_FILES:
                    raise CheckpointError(
                        f"{self.url} holds more than {MOST_FILES} files: name a checkpoint's own prefix"
                    )
        return found

    def _asked(self, names: list[str]) -> dict[str, RemoteFile]:
        """Those of the names that are there. A server may refuse what it has not: that counts if nothing is there."""
        answers = self.each(self._head, names)
        found = {answer.name: answer for answer in answers if isinstance(answer, RemoteFile)}
        refusals = [answer for answer in answers if isinstance(answer, CheckpointError)]
        if refusals and not any(name.endswith((".safetensors", INDEX)) for name in found):
            raise refusals[0]
        return found

    def _head(self, name: str) -> RemoteFile | CheckpointError | None:
        try:
            with self._errors(name):
                return _file(name, self._obstore.head(self._store, name))
        except TransientError:
            raise
        except MissingError:
            return None
        except CheckpointError as error:
            return error

    def each(self, call: Callable[[T], U], things: Iterable[T]) -> list[U]:
        """What `call` says of each, several at a time.

        Raises:
            TransientError: the machine has no threads for it.
            Exception: as `call` does.
        """
        with ThreadPoolExecutor(ASKED_AT_ONCE) as threads:
            try:
                answers = threads.map(call, things)
            except RuntimeError as error:
                raise TransientError(f"no threads to ask {self.url} with: {error}") from error
            return list(answers)

    def text(self, file: RemoteFile, most: int) -> str:
        """A small file.

        Raises:
            CheckpointError: it has more than `most` bytes, or as `read` does.
            UnicodeDecodeError: it is not UTF-8.
        """
        if file.size > most:
            raise CheckpointError(f"{self.url}/{file.name} is larger than {most} bytes")
        return b"".join(self.read(file, 0, file.size)).decode()

    def read(
        self, file: RemoteFile, start: int, stop: int, least: int = LEAST, told: Told | None = None
    ) -> Iterator[bytes]:
        """The bytes from `start` to `stop`, at least `least` at a time, the last ones apart.

        A connection that breaks off is replaced. What was given out is good, whatever happens then. `told` hears of
        each answer that came whole.

        Raises:
            CheckpointError: the file is another by now, or may not be read, or the server knows no ranges.
            TransientError: the server fails, sends more or less than was asked for, or less than `least` in one answer,
                time and again.
        """
        tries = TRIES
        while start < stop:
            before = start
            try:
                for chunk in self._range(file, start, stop, least, told):
                    start += len(chunk)
                    yield chunk
            except TransientError:
                tries = tries - 1 if start == before else TRIES
                if not tries:
                    raise

    def _range(self, file: RemoteFile, start: int, stop: int, least: int, told: Told | None) -> Iterator[bytes]:
        nbytes, asked = stop - start, time.monotonic()
        options: GetOptions = {"range": (start, stop)}
        if file.etag and not file.etag.startswith("W/"):  # a weak one never matches
            options["if_match"] = file.etag
        with self._errors(file.name):
            answer = self._obstore.get(self._store, file.name, options=options)
            began = time.monotonic()
            if _file(file.name, answer.meta).version != file.version:
                raise self._changed(file.name)
            for chunk in answer.stream(least):
                start += len(chunk)
                if start > stop:
                    raise TransientError(
                        f"{self.url}/{file.name}: the server sent more than the range that was asked for"
                    )
                yield chunk
        if start < stop:
            raise TransientError(f"{self.url}/{file.name}: the server sent less than the range that was asked for")
        if told:
            told(nbytes, began - asked, time.monotonic() - began)

    def digest(self, file: RemoteFile) -> tuple[str, str] | None:
        """(algorithm, hexadecimal digest) by the object's own metadata, where somebody wrote it there."""
        if not self._lists:
            return None
        with self._errors(file.name):
            told = self._obstore.get(self._store, file.name, options={"head": True}).attributes
        for algorithm, digits in DIGESTS.items():
            value = str(told.get(algorithm, "")).lower()
            if re.fullmatch(rf"[0-9a-f]{{{digits}}}", value):
                return algorithm, value
        return None

    def _changed(self, name: str) -> ChangedError:
        return ChangedError(f"{self.url}/{name} was changed while it was read: try again")

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        """The library's errors as ours, with the URL and what to do."""
        known, what = self._obstore.exceptions, f"{self.url}/{name}" if name else self.url
        try:
            yield
        except FileNotFoundError as error:
            raise MissingError(f"{what} is not there") from error
        except known.PreconditionError as error:
            raise self._changed(name) from error
        except known.NotSupportedError as error:
            raise CheckpointError(
                f"{what}: the server answers no ranges of bytes; most do, python's does not"
            ) from error
        except (known.BaseError, ValueError, OSError) as error:
            why = refusals.first_line(error)
            if isinstance(error, known.PermissionDeniedError | known.UnauthenticatedError) or _UNKNOWN.search(why):
                hint = _CREDENTIALS[urlsplit(self.url).scheme]
                raise CheckpointError(f"{what} may not be read: {hint}") from error
            if self._lists and "builder error" in why and "http://" in why:
                allow = f"{LISTING[urlsplit(self.url).scheme]}_ALLOW_HTTP=true"
                raise CheckpointError(f"{what}: its endpoint is plain HTTP, set {allow} to allow that") from error
            if "status code: 404 " in why:
                raise MissingError(f"{what} is not there") from error
            if unreached := refusals.unreached(error):
                raise TransientError(f"{self._place(error)} cannot be reached: {unreached}") from error
            raise TransientError(f"{what}: {refusals.reason(error)}") from error

    def _place(self, error: BaseException) -> str:
        """The URL, and of a store, whose host is in no URL, where it was looked for."""
        at = refusals.address(error) if self._lists else ""
        return f"{self.url} (at {at})" if at else self.url


class MissingError(CheckpointError):
    """A server has no such file."""


class ChangedError(CheckpointError):
    """A server has another file of this name than it had."""


# Lists fail without errors of their own; a machine of no cloud asks the cloud's address in vain.
_UNKNOWN = re.compile(r"status code: 40[13]\b|//169\.254\.169\.254/|//metadata\.google\.internal/")
_SERVED = "; a deployed model is read in the environment of serverless-llm serve"
_REFUSED = "the server refuses it, and no credentials are sent by plain HTTP"
_CREDENTIALS = {
    "s3": f"set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a public bucket{_SERVED}",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS to a key's file, or GOOGLE_SKIP_SIGNATURE=true for a public bucket"
    + _SERVED,
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_SKIP_SIGNATURE=true for a public one"
    + _SERVED,
    "http": _REFUSED,
    "https": _REFUSED,
}


def _file(name: str, meta: Any) -> RemoteFile:
    return RemoteFile(name, meta["size"], meta["e_tag"] or "", meta["last_modified"].timestamp())
