"""Models of a Hugging Face hub: which files of a repository are needed, and their way into the hub's own cache.

Weights are read into `blobs/<etag>.partial`, which a later pull goes on with, and checked against their digest;
`huggingface_hub` does all else (names, tokens, redirects, the cache's layout), and is imported only when it is needed.
`HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` mean what they mean there.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import queue
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from typing import Any, NamedTuple

from serverless_llm.cli.sources import HUB_ID
from serverless_llm.errors import CheckpointError, TransientError
from serverless_llm.extras import extra
from serverless_llm.loader import manifest
from serverless_llm.quantities import size as human

TOKENIZER = "tokenizer.json"
CONNECTIONS = 4  # files at a time; one stream does not fill a fast link
LATE_SECONDS = 60.0  # for an answer that the cache cannot stand in for; as huggingface_hub waits for it
PARTIAL = ".partial"
SHA256 = re.compile(r"[0-9a-f]{64}")
PLAIN = re.compile(r"\w[\w.-]*")  # what may name a file in the cache

Told = Callable[[str, int, int], None]  # file, bytes that are there, bytes of all; called from several threads


class Repository(NamedTuple):
    """`name` is `owner/name`; `revision` a branch, a tag or a commit."""

    name: str
    revision: str = "main"

    def __str__(self) -> str:
        return self.name if self.revision == "main" else f"{self.name}@{self.revision}"


class Pulled(NamedTuple):
    """A snapshot in the cache. `files`: how many it needs; `offline`: why the hub was not asked, if it was not."""

    directory: Path
    files: int
    nbytes: int
    offline: str = ""


def repository(text: str) -> Repository | None:
    """What `owner/name` or `owner/name@revision` names; None of any other text."""
    name, _, revision = text.partition("@")
    return Repository(name, revision or "main") if HUB_ID.fullmatch(text) else None


def cached(wanted: Repository) -> Pulled | None:
    """The snapshot in the cache, if all that is needed of it is there; asks nobody."""
    hub = _hub()
    found = hub.try_to_load_from_cache(wanted.name, manifest.CONFIG, revision=wanted.revision)
    if not isinstance(found, str):
        return None
    directory = Path(found).parent
    try:
        names = [path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()]
        needed = texts(str(wanted), names) + shards(directory, names)
    except CheckpointError:
        return None
    if not set(needed) <= set(names):
        return None
    return Pulled(directory, len(needed), sum((directory / name).stat().st_size for name in needed))


def pull(wanted: Repository, told: Told) -> Pulled:
    """Brings what is missing of a repository's newest commit into the cache.

    Raises:
        CheckpointError: there is no such repository, or it holds nothing that can be served; nothing is read then.
        TransientError: the hub does not answer and the cache does not hold it, or the cache cannot be written.
    """
    hub = _hub()
    if hub.is_offline_mode():
        return _from_cache(wanted, "HF_HUB_OFFLINE is set")
    errors = hub.errors
    try:
        return _Pull(wanted, told).run()
    except errors.GatedRepoError as error:
        raise CheckpointError(f"{wanted}: its terms must be accepted on the hub, and HF_TOKEN set") from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{wanted.name} has no revision {wanted.revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"the hub has no repository {wanted.name!r}, or it is private and HF_TOKEN opens it not"
        ) from error
    except (errors.HTTPError, errors.OfflineModeIsEnabled, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of this machine: the hub's have no number
            why = f"{wanted} cannot be kept in {_storage(wanted)}: {error.strerror}"
            raise TransientError(f"{why}; the next pull goes on with what came") from error
        return _from_cache(wanted, f"the hub failed: {error}")


def _from_cache(wanted: Repository, why: str) -> Pulled:
    found = cached(wanted)
    if found is None:
        raise TransientError(f"{wanted} is not in the cache ({_storage(wanted)}), and {why}")
    return found._replace(offline=why)


def texts(name: str, names: Sequence[str]) -> list[str]:
    """The files beside the weights that are needed, of those that are there.

    Raises:
        CheckpointError: one is missing without which nothing can be served.
    """
    for needed in (manifest.CONFIG, TOKENIZER):
        if needed not in names:
            raise CheckpointError(f"{name} has no {needed}")
    templates = [one for one in names if manifest.TEMPLATES.fullmatch(one)]
    return [manifest.CONFIG, *(one for one in manifest.TEXTS if one in names), *templates]


def shards(directory: Path, names: Sequence[str]) -> list[str]:
    """The weights' files, by the index in `directory` where there is one, and that index.

    Raises:
        CheckpointError: there are none but pickle files, or the index is bad.
    """
    if manifest.choose(list(names), str(directory)) == manifest.SINGLE:
        return [manifest.SINGLE]
    return [manifest.INDEX, *sorted(set(manifest.index_of(directory).values()))]


@dataclass(frozen=True, slots=True)
class _Commit:
    """One commit of a repository: its files, their sizes in bytes, and the digests of those that the hub tells."""

    sha: str
    sizes: dict[str, int]
    digests: dict[str, str]


class _Pull:
    """One repository on its way into the cache."""

    def __init__(self, wanted: Repository, told: Told) -> None:
        self._wanted = wanted
        self._told = told
        self._storage = _storage(wanted)
        self._stop = threading.Event()

    def run(self) -> Pulled:
        """Raises whatever `huggingface_hub` does, and CheckpointError."""
        commit = self._commit()
        names = list(commit.sizes)
        manifest.choose(names, str(self._wanted))
        small = texts(str(self._wanted), names) + [one for one in names if one == manifest.INDEX]
        for name in small:
            directory = self._small(name, commit)
        large = [name for name in shards(directory, names) if name != manifest.INDEX]
        missing = [name for name in large if not (directory / name).exists()]
        if unknown := set(large) - set(names):
            raise CheckpointError(f"{self._wanted} has no {min(unknown)}, which its index names")
        self._demand_room(missing, commit)
        self._all(missing, commit)
        self._keep_reference(commit)
        needed = small + large
        return Pulled(directory, len(needed), sum(commit.sizes[name] for name in needed))

    def _commit(self) -> _Commit:
        hub = _hub()
        patience = hub.constants.HF_HUB_ETAG_TIMEOUT if cached(self._wanted) else LATE_SECONDS
        info = hub.HfApi().model_info(
            self._wanted.name, revision=self._wanted.revision, files_metadata=True, timeout=patience
        )
        files = info.siblings or ()
        digests = {file.rfilename: file.lfs.sha256 for file in files if file.lfs}
        return _Commit(info.sha, {file.rfilename: file.size or 0 for file in files}, digests)

    def _small(self, name: str, commit: _Commit) -> Path:
        """Reads a file of a few MiB; the snapshot's directory."""
        place = Path(_hub().hf_hub_download(self._wanted.name, name, revision=commit.sha, tqdm_class=_Silent))
        self._told(name, commit.sizes[name], commit.sizes[name])
        return Path(str(place).removesuffix(name))

    def _demand_room(self, names: Sequence[str], commit: _Commit) -> None:
        most, nbytes = _hub().constants.MAX_HTTP_DOWNLOAD_SIZE, 0
        for name in names:
            whole, held = commit.sizes[name], self._held(commit.digests.get(name, ""))
            if whole > most and not held:
                how = f"by plain HTTP: bring it with: hf download {self._wanted.name}"
                raise CheckpointError(f"{name} has {human(whole)}; the hub gives out {human(most)} {how}")
            nbytes += max(0, whole - held)
        free = shutil.disk_usage(self._storage).free
        if nbytes > free:
            raise TransientError(
                f"{self._wanted} needs {human(nbytes)} in {self._storage}, where {human(free)} are free"
            )

    def _held(self, digest: str) -> int:
        """Bytes of a file that are in the cache: all of it, by another commit, or what an earlier pull left."""
        if not SHA256.fullmatch(digest):
            return 0
        places = [self._storage / "blobs" / f"{digest}{end}" for end in ("", PARTIAL)]
        return max((place.stat().st_size for place in places if place.exists()), default=0)

    def _all(self, names: Sequence[str], commit: _Commit) -> None:
        """Reads files side by side. What ends it early leaves its threads alone, which may be stuck: they end with the
        next bytes that come, or with the process."""
        waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
        ended: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        for name in names:
            waiting.put(name)
        for _ in range(min(CONNECTIONS, len(names))):
            threading.Thread(target=self._work, args=(waiting, ended, commit), daemon=True).start()
        try:
            for _ in names:
                error = ended.get()
                if error is not None:
                    raise error
        finally:
            self._stop.set()

    def _work(
        self, waiting: queue.SimpleQueue[str], ended: queue.SimpleQueue[Exception | None], commit: _Commit
    ) -> None:
        while not self._stop.is_set():
            try:
                name = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                self._large(name, commit)
            except Exception as error:  # noqa: BLE001  the thread's edge: whoever waits raises it
                ended.put(error)
            else:
                ended.put(None)

    def _large(self, name: str, commit: _Commit) -> None:
        """Reads one file of weights, from where an earlier pull left it."""
        hub = _hub()
        url = hub.hf_hub_url(self._wanted.name, name, revision=commit.sha)
        meta = hub.get_hf_file_metadata(url, timeout=LATE_SECONDS, headers=hub.utils.build_hf_headers())
        if not PLAIN.fullmatch(meta.etag or ""):
            raise CheckpointError(f"{name}: the hub names it by {meta.etag!r}, which is no name of a file")
        size = meta.size or commit.sizes[name]
        blob = self._storage / "blobs" / meta.etag
        blob.parent.mkdir(parents=True, exist_ok=True)
        with blob.with_name(f"{meta.etag}{PARTIAL}").open("a+b") as partial:
            fcntl.flock(partial, fcntl.LOCK_EX)  # another pull of the same file goes first
            if not blob.exists():
                self._read_whole(url, partial, name, meta.etag, size)
                os.fsync(partial.fileno())
                Path(partial.name).rename(blob)
            else:
                Path(partial.name).unlink(missing_ok=True)
        hub.hf_hub_download(self._wanted.name, name, revision=commit.sha, tqdm_class=_Silent)
        self._told(name, size, size)

    def _read_whole(self, url: str, partial: BufferedRandom, name: str, etag: str, size: int) -> None:
        """Reads the rest of a file, or all of it where what was left of it was not of this file."""
        begun = partial.seek(0, os.SEEK_END) > 0
        self._read(url, partial, name, size)
        try:
            check(partial, etag, name)
        except CheckpointError:
            if not begun:
                raise
            self._read(url, partial, name, size)
            check(partial, etag, name)

    def _read(self, url: str, partial: BufferedRandom, name: str, size: int) -> None:
        from huggingface_hub.file_download import http_get

        have = partial.seek(0, os.SEEK_END)
        if have > size:
            partial.truncate(0)
            have = partial.seek(0)
        self._told(name, have, size)
        sink = _Sink(partial, lambda done: self._told(name, done, size), self._stop)
        headers = _hub().utils.build_hf_headers()
        http_get(url, sink, resume_size=have, headers=headers, expected_size=size, tqdm_class=_Silent)
        partial.flush()

    def _keep_reference(self, commit: _Commit) -> None:
        """What `revision` means, for those who ask the cache later."""
        if self._wanted.revision != commit.sha:
            reference = self._storage / "refs" / self._wanted.revision
            reference.parent.mkdir(parents=True, exist_ok=True)
            reference.write_text(commit.sha)


def check(partial: BufferedRandom, etag: str, name: str) -> None:
    """Compares with the digest that the hub names large files by.

    Raises:
        CheckpointError: it is another file, and is emptied.
    """
    partial.seek(0)
    if SHA256.fullmatch(etag) and hashlib.file_digest(partial, "sha256").hexdigest() != etag:
        partial.truncate(0)
        raise CheckpointError(f"{name}: what came is not what the hub names by {etag}; pull it again")


class _Sink:
    """A file that tells how long it is, and refuses to grow once `stop` is set. As `http_get` writes to it."""

    def __init__(self, file: BufferedRandom, told: Callable[[int], None], stop: threading.Event) -> None:
        self._file = file
        self._told = told
        self._stop = stop
        self.seek, self.tell, self.truncate = file.seek, file.tell, file.truncate

    def write(self, data: bytes) -> int:
        if self._stop.is_set():
            raise InterruptedError("stopped")
        count = self._file.write(data)
        self._told(self._file.tell())
        return count


class _Silent:
    """Stands where `huggingface_hub` wants a bar of tqdm."""

    def __init__(self, *_: object, **__: object) -> None:
        self.total = self.n = 0

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def _storage(wanted: Repository) -> Path:
    """The repository's folder in the cache."""
    hub = _hub()
    folder: str = hub.file_download.repo_folder_name(repo_id=wanted.name, repo_type="model")
    return Path(hub.constants.HF_HUB_CACHE) / folder


def _hub() -> Any:
    """Raises:
    ConfigurationError: as `extra`.
    """
    return extra("hub", "huggingface_hub", "models of a hub", "errors", "file_download", "utils")
