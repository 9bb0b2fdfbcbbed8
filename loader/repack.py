"""Writes a checkpoint anew so that it reads best: few large files, data from a page boundary, every tensor aligned.

What comes out is an ordinary Hugging Face directory of valid safetensors files with the same tensors, bit for bit; a
file without holes can only be aligned by the order of its tensors, so the widest items come first.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from serverless_llm.errors import CapacityError, CheckpointError, TransientError
from serverless_llm.loader import header, manifest
from serverless_llm.loader.download import sync
from serverless_llm.loader.header import DTYPE_BITS, MANY_METADATA, MAX_METADATA, TensorEntry
from serverless_llm.loader.manifest import INDEX, PICKLES, SINGLE, FileEntry
from serverless_llm.quantities import size

PAGE = 4096  # direct reads want data to begin on one
CHUNK = 16 << 20  # bytes of one read and write
Told = Callable[[str, int, int], None]


class Part(NamedTuple):
    """One tensor and the number of the file that it comes from."""

    file: int
    tensor: TensorEntry


class Shard(NamedTuple):
    """A file to be written: its header, and the tensors whose bytes follow, in their order."""

    name: str
    header: bytes
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(part.tensor.nbytes for part in self.parts)


def shards(files: Sequence[FileEntry], most: int) -> list[Shard]:
    """The files as they are to be: each of at most `most` bytes of tensors, or of one larger tensor.

    Raises:
        CheckpointError: all files' metadata together are more than one may have.
    """
    groups: list[list[Part]] = [[]]
    held = 0
    for part in (Part(number, entry) for number, file in enumerate(files) for entry in file.header.tensors):
        if groups[-1] and held + part.tensor.nbytes > most:
            groups.append([])
            held = 0
        groups[-1].append(part)
        held += part.tensor.nbytes
    metadata = {key: text for file in reversed(files) for key, text in file.header.metadata.items()}
    if len(metadata) > MAX_METADATA:
        raise CheckpointError(f"of its files together {MANY_METADATA}")
    return [_shard(number, len(groups), group, metadata) for number, group in enumerate(groups, start=1)]


def _shard(number: int, count: int, group: list[Part], metadata: dict[str, str]) -> Shard:
    name = SINGLE if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
    parts = tuple(sorted(group, key=lambda part: -DTYPE_BITS[part.tensor.dtype]))
    tensors = [(one.name, one.dtype, one.shape, one.nbytes) for _, one in parts]
    return Shard(name, header.encode(tensors, metadata or None, PAGE), parts)


def repack(source: Path, target: Path, most: int, told: Told) -> list[Shard]:
    """Writes the checkpoint in `source` to `target`, which appears whole or not at all; other files come along.

    Args:
        most: bytes of tensors in a file.
        told: called with a file's name, its bytes so far and in all, as it is written.

    Raises:
        CheckpointError: `source` is no checkpoint, changes meanwhile, or is one that `shards` refuses; `target` is
            there already.
        CapacityError: there is no room for it.
    """
    target = Path(os.path.abspath(target))  # noqa: PTH100  what it links to is not what is meant
    files = manifest.weights(source)
    planned = shards(files, most)
    others = _others(source)
    _clear(target)
    _check_target(target, sum(shard.nbytes for shard in planned) + sum(path.stat().st_size for _, path in others))
    try:
        with _partial(target) as partial:
            for shard in planned:
                _write(partial / shard.name, shard, files, told)
            if len(planned) > 1:
                (partial / INDEX).write_text(json.dumps(_index(planned), indent=2))
            for name, path in others:
                shutil.copyfile(path, partial / name)
            for path in (*partial.iterdir(), partial):
                sync(path)
            with suppress(FileNotFoundError):
                target.rmdir()  # an empty one
            partial.rename(target)
    except OSError as error:
        raise TransientError(f"{error.filename or target}: {error.strerror}") from error
    return planned


@contextmanager
def _partial(target: Path) -> Iterator[Path]:
    """A directory beside the target, held by a lock until it is renamed or removed."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        with _opened(partial) as descriptor:
            with suppress(OSError):  # a file system without locks, where no other run can remove it either
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _clear(target: Path) -> None:
    """Removes what runs to this target have left that were killed."""
    left = re.compile(rf"\.{re.escape(target.name)}\.\d+\.partial")
    for path in target.parent.glob(".*.partial"):
        if left.fullmatch(path.name):
            with suppress(OSError), _opened(path) as descriptor:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _opened(directory: Path) -> Iterator[int]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _others(directory: Path) -> list[tuple[str, Path]]:
    """What lies beside the weights, with its real path: configuration, tokenizer, licence; no pickles."""
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    kept = [name for name in names if name != INDEX and not name.endswith((".safetensors", *PICKLES))]
    return [(name, manifest.confined(directory, name)) for name in kept]


def _check_target(target: Path, needed: int) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not an empty directory")
    if not target.parent.is_dir():
        raise CheckpointError(f"there is no directory {target.parent}")
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise CapacityError(f"{target} needs {size(needed)}, {size(free)} are free there")


def _index(planned: Iterable[Shard]) -> dict[str, Any]:
    homes = {part.tensor.name: shard.name for shard in planned for part in shard.parts}
    total = sum(part.tensor.nbytes for shard in planned for part in shard.parts)
    return {"metadata": {"total_size": total}, "weight_map": homes}


def _write(path: Path, shard: Shard, files: Sequence[FileEntry], told: Told) -> None:
    with path.open("wb") as out:
        out.write(shard.header)
        done = len(shard.header)
        told(shard.name, done, shard.nbytes)
        for number, parts in groupby(shard.parts, lambda part: part.file):
            for data in _read(files[number], [part.tensor for part in parts]):
                out.write(data)
                done += len(data)
                told(shard.name, done, shard.nbytes)


def _read(file: FileEntry, tensors: Iterable[TensorEntry]) -> Iterator[bytes]:
    """The bytes of a file's tensors, of which none changed before the last was read."""
    with file.path.open("rb", buffering=0) as opened:
        for tensor in tensors:
            for offset in range(tensor.start, tensor.end, CHUNK):
                wanted = min(CHUNK, tensor.end - offset)
                data = os.pread(opened.fileno(), wanted, offset)
                if len(data) < wanted:
                    raise CheckpointError(f"{file.path} ends at byte {offset + len(data)}, which it did not before")
                yield data
        now = os.fstat(opened.fileno())
        if (now.st_size, now.st_mtime_ns) != (file.size, file.mtime_ns):
            raise CheckpointError(f"{file.path} changed while it was read")
