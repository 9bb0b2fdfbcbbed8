"""The digests that a node keeps: one file for each checkpoint whose blocks, or tensors, they are of.

A file is written under another name, synced and renamed: it is whole or not there. What is damaged is thrown away, and
learned again. A checkpoint's digests outlive its deployment; of many, those that were used last stay.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from serverless_llm.loader import digest
from serverless_llm.loader.digest import Digests
from serverless_llm.loader.manifest import Manifest

log = logging.getLogger(__name__)

SUFFIX, UNFINISHED = ".digests", ".unfinished"
MOST = 256  # checkpoints; each takes 16 bytes for a MiB, or 32 for a tensor; arbitrary
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Coding(Generic[T]):
    """Digests as a file has them. `decode` returns None where they are damaged, or of something else."""

    encode: Callable[[Manifest, T], bytes]
    decode: Callable[[Manifest, bytes], T | None]


def sizes_of(manifest: Manifest) -> list[int]:
    return [file.size for file in manifest.files]


BLOCKS: Coding[Digests] = Coding(
    lambda manifest, digests: digest.encode(manifest.checkpoint, sizes_of(manifest), digests),
    lambda manifest, raw: digest.decode(manifest.checkpoint, sizes_of(manifest), raw),
)


class DigestStore(Generic[T]):
    """The files of one directory, which need not exist. Whoever writes or reads blocks on the disk.

    Attributes:
        known: the checkpoints that have digests; threads add and discard, which is one step each.
    """

    def __init__(self, directory: Path, coding: Coding[T], most: int = MOST) -> None:
        self._directory = directory
        self._coding = coding
        self._most = most
        self._writing = threading.Lock()  # two first loads of one checkpoint end with the same name
        for path in directory.glob(f"*{UNFINISHED}"):  # of an agent that was killed
            path.unlink()
        self.known = {path.stem for path in directory.glob(f"*{SUFFIX}")}

    def read(self, manifest: Manifest) -> T | None:
        """The checkpoint's digests; None where they have to be learned."""
        path = self._path(manifest.checkpoint)
        try:
            raw = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("%s: %s; digests are learned again", path, error.strerror)
            return None
        found = self._coding.decode(manifest, raw)
        if found is None:
            log.warning("%s is damaged and thrown away; digests are learned again", path)
            self._forget(path)
        return found

    def write(self, manifest: Manifest, digests: T) -> None:
        """Keeps the digests of the whole checkpoint. A disk that does not take them is told of in the log."""
        path = self._path(manifest.checkpoint)
        scratch = path.with_suffix(UNFINISHED)
        try:
            with self._writing:
                self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                with scratch.open("wb") as file:
                    file.write(self._coding.encode(manifest, digests))
                    file.flush()
                    os.fsync(file.fileno())
                scratch.rename(path)
                self._prune()
        except OSError as error:
            log.warning("%s: %s; digests are learned again", path, error.strerror)
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)
        else:
            self.known.add(manifest.checkpoint)

    def _prune(self) -> None:
        paths = sorted(self._directory.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime_ns)
        for path in paths[: -self._most]:
            self._forget(path)

    def _forget(self, path: Path) -> None:
        self.known.discard(path.stem)
        with contextlib.suppress(OSError):
            path.unlink()

    def _path(self, checkpoint: str) -> Path:
        return self._directory / f"{checkpoint}{SUFFIX}"
