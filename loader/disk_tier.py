"""Remote checkpoints on the local disk: whole ones, which are ordinary directories, and what came of others.

    ROOT/<digest of the URL>/<version>/            whole: `checkpoint/`, `url`, `lock`; never changed, only removed
    ROOT/<digest of the URL>/<version>/            the same with `REMOTE`: headers and texts alone (`announce`)
    ROOT/<digest of the URL>/<version>.partial/    being brought: the same, with holes, and `record` (`download`)
    ROOT/<digest of the URL>/<version>.gone/       being removed
    ROOT/lock                                      held while room is made

A version is a digest over names, sizes and ETags. It becomes whole by one rename, once all its bytes are synced and
checked, and ceases to be by another. `lock` is held shared by whoever uses a version and exclusively by whoever brings
or removes it, so that none leaves that is in use, in whatever process; its time of change is that of the last use.
An announced version becomes whole file by file, each replaced at once, and is whole when `REMOTE` is gone.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from serverless_llm.errors import CapacityError, CheckpointError, ConfigurationError, TransientError
from serverless_llm.loader.download import RECORD, Told, download, held, prepare, sync
from serverless_llm.loader.leases import LOCK, Lease, lease_of, lock_of
from serverless_llm.loader.manifest import CHECKPOINT, REMOTE
from serverless_llm.loader.promised import check, check_names
from serverless_llm.loader.remote import Remote, RemoteFile, checked
from serverless_llm.quantities import parse_size, size
from serverless_llm.surroundings import PREFIX, cache_dir

VARIABLE = f"{PREFIX}REMOTE_CACHE"
SHARE = "80%"  # of what the disk has free and the tier holds, where the variable is not set
URL = "url"
PARTIAL = ".partial"
GONE = ".gone"
LINK = "link"
HEADS = ".heads"  # being announced
LONGEST = 1 << 16  # characters of a URL that are read; an arbitrary bound
SECOND = 10**9  # nanoseconds; some file systems tell no closer times apart
Placed = Callable[[RemoteFile], memoryview | None]


class DiskTier:
    """The tier below `root`, of at most `most` bytes; None: `SHARE`."""

    def __init__(self, root: Path, most: str | None = None) -> None:
        self.root = root
        self._most = most

    def cached(self, url: str) -> Lease | None:
        """The version that a URL's server had when it was asked last, if it is here; asks no server.

        Raises:
            CheckpointError: no source has such a URL.
        """
        return self.latest(url, is_whole)

    def latest(self, url: str, wanted: Callable[[Path], bool]) -> Lease | None:
        """Of the versions that are `wanted`, by their folders, the one that the server had last."""
        known = [place for place in _versions(self.home(checked(url))) if not place.suffix]
        for place in sorted(known, key=_last_brought, reverse=True):
            if (lease := lease_of(place, wanted)) is not None:
                return lease
        return None

    def bring(self, url: str, told: Told, needed: Sequence[str] = (), memory_for: Placed = lambda file: None) -> Lease:
        """What the URL holds now, whole; where its server cannot be reached, what it held when that was brought last.

        Args:
            needed: names of files without which nothing is read.
            memory_for: asked of each file unless all are whole already; where its bytes are wanted besides, in whole
                pages, or None. They are there when this returns.

        Raises:
            CheckpointError: there is no such checkpoint, what came of it is not what the server promised, or what was
                here is damaged (`remove_damaged`).
            TransientError: the server or the disk fails; the next call goes on with what came.
            CapacityError: it is larger than the tier, or than what can leave it.
            ConfigurationError: obstore is missing, or a variable is wrong.
            OSError: there is no memory, as `memory_for` says.
        """
        source = Remote(url)
        try:
            files = source.files()
        except TransientError as error:
            lease = self.cached(url)
            if lease is None:
                raise
            return Lease(lease.directory, lease.lock, str(error))
        check_names(source, files, needed)
        whole = self.home(source.url) / version_of(files)
        try:
            self.remove_damaged(source.url, files, whole)
            return brought(self._whole(source, files, whole, told, memory_for), source.url)
        except OSError as error:
            if error.errno == errno.ENOMEM:
                raise
            raise TransientError(f"{source.url} cannot be kept in {self.root}: {error.strerror}") from error

    def _whole(self, source: Remote, files: Sequence[RemoteFile], whole: Path, told: Told, memory_for: Placed) -> Lease:
        partial = whole.with_name(whole.name + PARTIAL)
        while (lease := lease_of(whole, is_whole)) is None:
            partial.mkdir(parents=True, exist_ok=True)
            lock = lock_of(partial, fcntl.LOCK_EX)  # whoever brings the same goes first
            if lock is None:
                continue
            try:
                if is_whole(whole):
                    self.discard(partial)
                else:
                    (partial / URL).write_text(source.url)
                    self.make_room(source.url, files, partial)
                    memory = {file.name: place for file in files if (place := memory_for(file)) is not None}
                    download(source, files, partial, told, memory)
                    self.finish(source, files, partial, whole)
            finally:
                os.close(lock)
        return lease

    def finish(self, source: Remote, files: Sequence[RemoteFile], partial: Path, whole: Path) -> None:
        """Makes a version whole, of which all bytes are there, if they are what was promised.

        Raises:
            CheckpointError: they are not; they are gone.
            TransientError: the server does not tell.
        """
        try:
            check(source, files, partial / CHECKPOINT)
        except TransientError:
            raise
        except CheckpointError:
            self.discard(partial)  # so that it is read anew
            raise
        for file in files:  # what a process recorded and was killed before it synced
            sync(partial / CHECKPOINT / file.name)
        sync(partial / URL)
        sync_folders(partial, files)
        with self.alone():
            lock = lock_of(whole, fcntl.LOCK_SH)
            if lock is None:
                partial.rename(whole)
        if lock is None:
            sync(whole.parent)
            (whole / RECORD).unlink()
            return
        try:
            _complete(files, partial, whole)
        finally:
            os.close(lock)
        self.discard(partial)

    def make_room(self, url: str, files: Sequence[RemoteFile], partial: Path) -> None:
        """Reserves room, for which those leave that were used longest ago."""
        total = sum(file.size for file in files)
        missing = total - sum(one.stop - one.start for one in held(partial, files))
        with self.alone():
            self.room(url, total, missing, partial)
            prepare(partial, files)

    def room(self, what: str, total: int, missing: int, folder: Path) -> None:
        """Has room for `total` bytes in a folder, of which `missing` are not there yet. Caller is `alone`.

        Raises:
            CapacityError: they are more than the tier may hold.
            TransientError: they are more than is free.
        """
        others = self._others(folder)
        most = self._bound(sum(others.values()) + _nbytes(folder))
        if total > most:
            own = "" if self._most else f", {SHARE} of what is free and its own"
            raise CapacityError(f"{what} has {size(total)}, the disk tier {size(most)} at most{own}: set {VARIABLE}")
        for place in list(others):
            if sum(others.values()) + total <= most and missing <= self._disk_free():
                break
            if _leaves(place):
                del others[place]
        used = sum(others.values())
        if used + total > most:
            why = f"of the disk tier's {size(most)}, {size(used)} are in use"
            raise CapacityError(f"{what} has {size(total)}, and {why}: end what uses them, or set {VARIABLE}")
        if missing > self._disk_free():
            free = f"{size(self._disk_free())} are free in {self.root}"
            raise TransientError(f"{what} needs {size(missing)}, and {free}; what came stays for the next try")

    def _others(self, folder: Path) -> dict[Path, int]:
        """Bytes of what else is there, that of the longest unused first, when what serves nobody any more has left."""
        homes = [home for home in self.root.iterdir() if home.is_dir()]
        places = [place for home in homes for place in _versions(home) if place != folder]
        for place in places:
            if place.suffix == GONE:
                shutil.rmtree(place, ignore_errors=True)
            elif place.suffix == HEADS or (
                place.suffix == PARTIAL and place.parent == folder.parent and place.stem != folder.stem
            ):  # of no more use
                _leaves(place)
        return {place: _nbytes(place) for place in sorted(filter(Path.exists, places), key=_last_use)}

    def remove_damaged(self, url: str, files: Sequence[RemoteFile], place: Path) -> None:
        """A version that lacks one of its files, or has it in another size, leaves, to be brought anew.

        Raises:
            CheckpointError: somebody uses it.
        """
        if not place.exists() or _damaged(place, files) is None:
            return
        with self.alone():
            damaged = _damaged(place, files)
            if damaged is None or not place.exists() or _leaves(place):
                return
        raise CheckpointError(
            f"{damaged} is gone or not as long as that of {url}, and {place} is in use: "
            f"end what uses it, then serverless-llm pull {url}"
        )

    def discard(self, place: Path) -> None:
        with self.alone():
            _remove(place)

    def _bound(self, held_bytes: int) -> int:
        try:
            return parse_size(self._most or SHARE, self._disk_free() + held_bytes)
        except ConfigurationError as error:
            raise ConfigurationError(f"{VARIABLE}: {error}") from error

    def _disk_free(self) -> int:
        return shutil.disk_usage(self.root).free

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While no other process makes room."""
        with (self.root / LOCK).open("a") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX)
            yield

    def home(self, url: str) -> Path:
        return self.root / hashlib.blake2b(url.encode(), digest_size=16).hexdigest()


def place() -> Path:
    """Of this user's tier, as the environment has it."""
    return (cache_dir(os.environ) / "remote").absolute()


def tier() -> DiskTier:
    """This user's, by its real path."""
    return DiskTier(Path(os.path.realpath(place())), os.environ.get(VARIABLE))


def version_at(directory: Path) -> Path | None:
    """The version, by its real path, that a directory is the checkpoint of, in this user's tier: what lies beside any
    other directory may be anybody's, and tells nothing."""
    real = Path(os.path.realpath(directory))
    place = real.parent
    there = real.name == CHECKPOINT and place.parent.parent == tier().root
    return place if there and not place.suffix else None


def hold(directory: Path) -> Lease | None:
    """Keeps a checkpoint's directory from leaving, if it lies in this user's tier."""
    place = version_at(directory)
    try:
        return None if place is None else lease_of(place)
    except PermissionError:  # another user's, whose it is to keep
        return None


def url_of(directory: Path) -> str:
    """The URL that a directory in this user's tier was brought from; empty of any other directory."""
    place = version_at(directory)
    if place is None:
        return ""
    try:
        with (place / URL).open(encoding="utf-8") as opened:
            url = checked(opened.read(LONGEST))
    except (OSError, UnicodeDecodeError, CheckpointError):  # it is damaged
        return ""
    return url if tier().home(url) == place.parent else ""


def version_of(files: Sequence[RemoteFile]) -> str:
    return hashlib.blake2b(repr([file.version for file in files]).encode(), digest_size=16).hexdigest()


def _versions(home: Path) -> list[Path]:
    return [path for path in home.iterdir() if path.is_dir()] if home.is_dir() else []


def is_whole(place: Path) -> bool:
    return place.exists() and not (place / REMOTE).exists()


def _damaged(place: Path, files: Sequence[RemoteFile]) -> Path | None:
    """The first of a version's files that is gone or of another size."""
    for file in files:
        path = place / CHECKPOINT / file.name
        if not path.is_file() or path.stat().st_size != file.size:
            return path
    return None


def sync_folders(place: Path, files: Sequence[RemoteFile]) -> None:
    """Those that lead to a version's files, from the tier's root on."""
    root = place.parent.parent
    for folder in {one for file in files for one in (place / CHECKPOINT / file.name).parents}:
        if folder.is_relative_to(root):
            sync(folder)


def _complete(files: Sequence[RemoteFile], partial: Path, whole: Path) -> None:
    """Puts files that are whole in the place of headers, times of change as theirs: it stays the same checkpoint.

    What is interrupted begins anew: the files stay where they are, too, until all is done.
    """
    for file in files:
        came, there = partial / CHECKPOINT / file.name, whole / CHECKPOINT / file.name
        stat = there.stat()
        os.utime(came, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        sync(came)
        link = partial / LINK
        link.unlink(missing_ok=True)
        link.hardlink_to(came)
        link.rename(there)  # does nothing where both are one already
    sync_folders(whole, files)
    (whole / REMOTE).unlink()
    sync(whole)


def brought(lease: Lease, url: str) -> Lease:
    """Its server has this version now: it comes before all others, whenever they came."""
    place = lease.directory.parent
    with suppress(OSError):  # another user's, or on a mount that is read-only
        if not _is_named(place, url):
            (place / URL).write_text(url)
            sync(place / URL)
            sync(place)
        last = max((_last_brought(other) for other in _versions(place.parent) if other != place), default=0)
        if _last_brought(place) <= last:
            os.utime(place / URL, ns=(last + SECOND, last + SECOND))
    return lease


def _is_named(place: Path, url: str) -> bool:
    try:
        return (place / URL).read_bytes() == url.encode()
    except FileNotFoundError:
        return False


def _leaves(place: Path) -> bool:
    """Removes a version unless somebody uses it."""
    lock = lock_of(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if lock is None:
        return False
    try:
        _remove(place)
    finally:
        os.close(lock)
    return True


def _remove(place: Path) -> None:
    """At once by its name, so that no half is ever taken for it."""
    gone = place.with_name(place.name + GONE)
    shutil.rmtree(gone, ignore_errors=True)
    place.rename(gone)
    sync(place.parent)
    shutil.rmtree(gone, ignore_errors=True)
    with suppress(OSError):  # there are other versions
        place.parent.rmdir()


def _nbytes(place: Path) -> int:
    """Of headers alone, what they take on the disk; else what it takes when it is whole."""
    stats = [path.stat() for path in (place / CHECKPOINT).rglob("*") if path.is_file()]
    heads = place.suffix == HEADS or (place / REMOTE).exists()
    return sum(stat.st_blocks * 512 if heads else stat.st_size for stat in stats)


def _last_use(place: Path) -> int:
    return _time(place / LOCK)


def _last_brought(place: Path) -> int:
    return _time(place / URL)


def _time(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0
