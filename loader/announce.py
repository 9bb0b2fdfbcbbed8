"""Deploying a URL before its tensors are here: headers and text files alone, and what the rest is asked for by.

    ROOT/<digest of the URL>/<version>/checkpoint/NAME    text files whole; of safetensors files the header, and a hole
    ROOT/<digest of the URL>/<version>/REMOTE             JSON: the URL, and (name, size, ETag, time of change) of files

The directory is a checkpoint's as long as nobody reads tensors from it but by `origin`, which knows where they are.
REMOTE is believed in this user's tier alone, since it says whom to ask and what to write.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from serverless_llm.errors import CapacityError, CheckpointError, TransientError
from serverless_llm.loader import disk_tier, header
from serverless_llm.loader.disk_tier import HEADS, URL, DiskTier, brought, sync_folders, version_at, version_of
from serverless_llm.loader.download import Told, sync
from serverless_llm.loader.leases import Lease, lease_of, lock_of
from serverless_llm.loader.manifest import (
    CHECKPOINT,
    CONFIG,
    INDEX,
    MANY_HEADERS,
    MAX_CONFIG,
    MAX_HEADERS,
    MAX_TEXT,
    REMOTE,
    TEMPLATES,
    TEXTS,
    headers_alone,
)
from serverless_llm.loader.promised import check_headers, check_names
from serverless_llm.loader.remote import Remote, RemoteFile, checked

SUFFIX = ".safetensors"


def announce(tier: DiskTier, url: str, told: Told, needed: Sequence[str] = ()) -> Lease:
    """What the URL holds now, its headers and text files at least; where its server cannot be reached, what it held.

    What a store tells a digest of is brought as a whole: it is compared before anything of it is used.

    Args:
        told: as of `download`.
        needed: names of files without which nothing is read.

    Raises:
        CheckpointError: there is no such checkpoint, or what was here is damaged (`DiskTier.remove_damaged`).
        TransientError: the server or the disk fails.
        CapacityError: what is read now is larger than the tier, or as `DiskTier.bring`.
        ConfigurationError: obstore is missing, or a variable is wrong.
    """
    source = Remote(url)
    try:
        files = source.files()
        compared = _compared(source, files)
    except TransientError as error:
        lease = tier.latest(url, Path.exists)
        if lease is None:
            raise
        return Lease(lease.directory, lease.lock, str(error))
    check_names(source, files, needed)
    if compared:
        return tier.bring(url, told)
    place = tier.home(source.url) / version_of(files)
    try:
        tier.remove_damaged(source.url, files, place)
        return brought(_announced(tier, source, files, place), source.url)
    except OSError as error:
        raise TransientError(f"{source.url} cannot be kept in {tier.root}: {error.strerror}") from error


def _compared(source: Remote, files: Sequence[RemoteFile]) -> bool:
    weights = [file for file in files if file.name.endswith(SUFFIX)]
    return any(source.each(source.digest, weights))


def _announced(tier: DiskTier, source: Remote, files: Sequence[RemoteFile], place: Path) -> Lease:
    heads = place.with_name(place.name + HEADS)
    while (lease := lease_of(place)) is None:
        heads.mkdir(parents=True, exist_ok=True)
        lock = lock_of(heads, fcntl.LOCK_EX)  # whoever announces the same goes first
        if lock is None:
            continue
        try:
            if place.exists():
                tier.discard(heads)
            else:
                _fetch(tier, source, files, heads)
                with tier.alone():
                    if not place.exists():  # else it was pulled meanwhile
                        heads.rename(place)
                sync(place.parent)
        finally:
            os.close(lock)
    return lease


def _fetch(tier: DiskTier, source: Remote, files: Sequence[RemoteFile], heads: Path) -> None:
    try:
        _write(tier, source, files, heads)
    except (CheckpointError, CapacityError):
        tier.discard(heads)
        raise
    sync(heads / URL)
    sync(heads / REMOTE)
    sync_folders(heads, files)


def _write(tier: DiskTier, source: Remote, files: Sequence[RemoteFile], heads: Path) -> None:
    directory = heads / CHECKPOINT
    (heads / REMOTE).unlink(missing_ok=True)  # of one that was killed: these are headers alone once it is there

    def fetch(wanted: tuple[RemoteFile, int]) -> None:
        file, nbytes = wanted
        path = directory / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as opened:
            for chunk in source.read(file, 0, nbytes):
                opened.write(chunk)
            opened.truncate(file.size)
            opened.flush()
            os.fsync(opened.fileno())

    needed = source.each(partial(_needed, source), files)
    headers = [nbytes for file, nbytes in zip(files, needed, strict=True) if file.name.endswith(SUFFIX)]
    if sum(headers) > MAX_HEADERS:
        raise CheckpointError(f"{source.url}: {MANY_HEADERS}")
    with tier.alone():
        tier.room(f"what deploying {source.url} reads", sum(needed), sum(needed), heads)
    source.each(fetch, zip(files, needed, strict=True))
    check_headers(source, directory)
    (heads / URL).write_text(source.url)
    (heads / REMOTE).write_text(json.dumps([source.url, files]))


def _needed(source: Remote, file: RemoteFile) -> int:
    """Bytes of a file that are read now."""
    if not file.name.endswith(SUFFIX):
        most = MAX_CONFIG if file.name == CONFIG else MAX_TEXT
        if file.size > most:
            raise CheckpointError(f"{source.url}/{file.name} is larger than {most} bytes")
        return file.size
    prefix = b"".join(source.read(file, 0, min(header.PREFIX, file.size)))
    try:
        return header.data_offset(prefix, file.size)
    except CheckpointError as error:
        raise CheckpointError(f"{source.url}/{file.name}: {error}") from None


class Announced(NamedTuple):
    """What is on a server still, and the directory, by its real path, that has the headers."""

    directory: Path
    url: str
    files: tuple[RemoteFile, ...]


def announced(directory: Path) -> Announced | None:
    """What a directory of this user's tier was announced by, if it is not whole; None for any other directory.

    Raises:
        CheckpointError: what tells of it is damaged, or lies outside this user's tier.
        TransientError: it cannot be read.
    """
    real = Path(os.path.realpath(directory))
    place = version_at(real)
    note = (place or real.parent) / REMOTE
    try:
        if place is not None:
            return _noted(place, note.read_text())
        elsewhere = headers_alone(real)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise TransientError(f"{note}: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError, RecursionError, CheckpointError):
        raise CheckpointError(f"{note} is damaged: serverless-llm pull its URL") from None
    if elsewhere:
        raise CheckpointError(
            f"{directory} holds headers alone, and is not in the disk tier {disk_tier.tier().root}: "
            "serverless-llm pull its URL, or give the server the XDG_CACHE_HOME that this lies in"
        )
    return None


def _noted(place: Path, text: str) -> Announced:
    """What the note of a version says. Raises what `announced` catches where it was not written for this version."""
    url, rows = json.loads(text)
    files = tuple(RemoteFile(*row) for row in rows)
    if not all(map(_is_sound, files)) or place != disk_tier.tier().home(checked(url)) / version_of(files):
        raise ValueError
    return Announced(place / CHECKPOINT, url, files)


def _is_sound(file: RemoteFile) -> bool:
    """Whether it is one of a checkpoint's files, below its directory."""
    if not isinstance(file.name, str) or type(file.size) is not int or file.size < 0 or not isinstance(file.etag, str):
        return False
    path = PurePosixPath(file.name)
    below = str(path) == file.name and not path.is_absolute() and ".." not in path.parts
    text = file.name in (CONFIG, INDEX, *TEXTS) or TEMPLATES.fullmatch(file.name) is not None
    return below and (text or path.suffix == SUFFIX)
