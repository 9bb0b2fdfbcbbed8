"""What a checkpoint holds, from its headers alone: validated once, at deploy.

`build` is the only function here that touches the disk; it reads no tensor's bytes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from io import FileIO
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any

from serverless_llm.domain import CheckpointId
from serverless_llm.errors import CheckpointError, TransientError
from serverless_llm.loader import header
from serverless_llm.loader.header import Header, TensorEntry
from serverless_llm.loader.members import DECODER, SPACES, Document, shown

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
REMOTE = ".serverless-llm-remote"  # beside a directory of which only headers and texts are here
CHECKPOINT = "checkpoint"  # the name of such a directory
CONFIG = "config.json"
LONGEST_PART = 255  # bytes of a name between two slashes: what file systems take
LONGEST_NAME = 1024  # bytes, as of an object's key: what a path takes, 4096, less the directory's
OTHERS = {".gguf": "GGUF", "adapter_model.safetensors": "an adapter (LoRA)"}
MAX_INDEX = 64_000_000  # bytes; an arbitrary bound on memory, as the next ones. The index of DeepSeek-V3 has 9 MB
MAX_HEADERS = 128_000_000  # bytes of all files' headers together, which take up to ten times that
MANY_HEADERS = f"the headers of a checkpoint's files have more than {MAX_HEADERS} bytes together"
MAX_FILES = 10_000  # of weights
MAX_BESIDE = 100  # members of an index beside its weight_map; real ones have one
MAX_MEMBER = 1 << 20  # characters of each
MAX_TEXT = 100_000_000  # bytes of another file that `deploy URL` brings
MAX_CONFIG = 1 << 20  # bytes; workers are sent it in one frame
TEXTS = (  # what gateways read beside the weights
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "chat_template.jinja",
)  # fmt: skip
TEMPLATES = re.compile(r"additional_chat_templates/\w[\w.-]*\.jinja")  # and these
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")  # weights that are not safetensors


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One safetensors file. `mtime_ns` tells later whether it is still the file that was validated.

    `path` is its real path, which a link changed later does not move.
    """

    name: str
    path: Path
    size: int
    mtime_ns: int
    header: Header

    @property
    def data_offset(self) -> int:
        return self.header.data_offset


@dataclass(frozen=True, slots=True)
class Manifest:
    """A checkpoint. `config` is config.json; `raw_config` its text; `files` are in load order."""

    directory: Path
    files: tuple[FileEntry, ...]
    checkpoint: CheckpointId
    config: dict[str, Any]
    raw_config: str

    @property
    def file_bytes(self) -> int:
        """Bytes of all files, headers included."""
        return sum(file.size for file in self.files)

    def tensors(self) -> dict[str, tuple[int, TensorEntry]]:
        """name -> (number of its file, entry), in file order."""
        return {entry.name: (number, entry) for number, file in enumerate(self.files) for entry in file.header.tensors}


def build(directory: Path) -> Manifest:
    """Reads and validates a Hugging Face directory.

    Raises:
        CheckpointError: names the file and what is wrong; a `TransientError` where the system could not read it.
    """
    directory = Path(directory)
    with _system_errors(directory):
        names = _names(directory)
        files, heads = _weights(directory, names)
        raw_config = _text(directory, CONFIG, MAX_CONFIG)
        where = os.path.realpath(directory)
        texts = [(name, *_stamp(directory / name)) for name in TEXTS if name in names]
    checkpoint = identify(where, files, heads, raw_config, texts)
    config = object_of(raw_config, str(directory / CONFIG))
    return Manifest(directory, tuple(files), checkpoint, config, raw_config)


def weights(directory: Path) -> list[FileEntry]:
    """The files alone, in load order, validated as by `build`: it needs no config.json, but all bytes.

    Raises:
        CheckpointError: as `build`, or the tensors are on a server still.
    """
    with _system_errors(directory):
        check_tensors_here(directory)
        return _weights(directory, _names(directory))[0]


def index_of(directory: Path) -> dict[str, str]:
    """tensor -> file name, from a directory's index.

    Raises:
        CheckpointError: as `weight_map_of`, or it is too large; a `TransientError` where the system could not read it.
    """
    with _system_errors(directory):
        return weight_map_of(_text(directory, INDEX, MAX_INDEX), str(directory / INDEX))


def check_tensors_here(path: Path) -> None:
    """
    Raises:
        CheckpointError: the path is of a directory of which only headers are here, or of something in it.
        OSError: the system does not tell.
    """
    real = Path(os.path.realpath(path))
    for place in (real, *real.parents):
        if headers_alone(place):
            raise CheckpointError(f"{place} holds headers alone until its model is loaded: serverless-llm pull its URL")


def headers_alone(real: Path) -> bool:
    """Whether the directory of this real path is an announced checkpoint's (`announce`), in whatever tier."""
    return real.name == CHECKPOINT and (real.parent / REMOTE).exists()


@contextmanager
def _system_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TransientError(f"{error.filename or directory}: {error.strerror}") from error


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def _weights(directory: Path, names: list[str]) -> tuple[list[FileEntry], list[bytes]]:
    """The files and the bytes of their headers."""
    choice = choose(names, str(directory))
    weight_map = None if choice == SINGLE else index_of(directory)
    files: list[FileEntry] = []
    heads: list[bytes] = []
    left = MAX_HEADERS
    for name in [SINGLE] if weight_map is None else sorted(set(weight_map.values())):
        entry, head = file_entry(name, confined(directory, name), directory / name, left)
        left -= len(head)
        files.append(entry)
        heads.append(head)
    if weight_map is not None:
        _check_tensors(files, weight_map, str(directory / INDEX))
    return files, heads


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _text(directory: Path, name: str, most: int) -> str:
    path = confined(directory, name)
    if path.stat().st_size > most:
        raise CheckpointError(f"{directory / name} is larger than {most} bytes")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise CheckpointError(f"{directory / name} is not UTF-8") from None


def file_entry(name: str, path: Path, known: Path, left: int = MAX_HEADERS) -> tuple[FileEntry, bytes]:
    """One safetensors file and the bytes of its header, `left` at most. `known` is how the caller knows it.

    Raises:
        OSError: it cannot be read.
        CheckpointError: its header is invalid; the message begins with `known`.
    """
    with path.open("rb", buffering=0) as file:
        stat = os.fstat(file.fileno())
        try:
            head = _head(file, stat.st_size, left)
            parsed = header.parse(head, stat.st_size)
        except CheckpointError as error:
            raise CheckpointError(f"{known}: {error}") from None
        return FileEntry(name, path, stat.st_size, stat.st_mtime_ns, parsed), head


def _head(file: FileIO, file_size: int, left: int) -> bytes:
    prefix = file.read(header.PREFIX)
    begin = header.data_offset(prefix, file_size)
    if begin > left:
        raise CheckpointError(MANY_HEADERS)
    return prefix + file.read(begin - header.PREFIX)


def confined(directory: Path, name: str) -> Path:
    """The real path of a checkpoint's file.

    A link may lead elsewhere in the directory, or into the `blobs` of the Hugging Face cache that the directory is a
    snapshot in.

    Raises:
        TransientError: the file is missing: perhaps what it lies on is not mounted.
        CheckpointError: it is not a plain file, or lies outside.
    """
    home = Path(os.path.realpath(directory))  # unlike Path.resolve, it survives a loop of links
    path = Path(os.path.realpath(home / name))
    blobs = home.parent.parent / "blobs"
    if not path.is_relative_to(home) and not (home.parent.name == "snapshots" and path.is_relative_to(blobs)):
        raise CheckpointError(f"{name} is a link out of {directory}")
    if not path.exists():
        raise TransientError(f"{name} is missing in {directory}")
    if not path.is_file():
        raise CheckpointError(f"{directory / name} is not a file")
    return path


def choose(names: list[str], directory: str) -> str:
    """`SINGLE` or `INDEX`, from a directory's file names.

    Raises:
        CheckpointError: neither is there.
    """
    for name in (SINGLE, INDEX):
        if name in names:
            return name
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        raise CheckpointError(
            f"{directory} has weights only as {', '.join(pickles[:3])}: {header.UNOPENED}; convert them to safetensors"
        )
    for suffix, what in OTHERS.items():
        if any(name.endswith(suffix) for name in names):
            raise CheckpointError(
                f"{directory} holds {what}, which is not served: safetensors of a whole model are needed"
            )
    raise CheckpointError(f"{directory} has neither {SINGLE} nor {INDEX}{_meant(names, directory)}")


def _meant(names: list[str], directory: str) -> str:
    """Which directory was meant, where this one tells."""
    if "snapshots" in names:
        return f"; a hub's cache has them in {directory}/snapshots/COMMIT"
    if directory.endswith((".safetensors", ".json")):
        return f"; if it is a file, name its directory: {directory.rpartition('/')[0]}"
    return ""


def object_of(text: str, name: str) -> dict[str, Any]:
    """The JSON object in `text`.

    Raises:
        CheckpointError: it is something else.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise CheckpointError(f"{name} is nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(f"{name} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} is not a JSON object")
    return value


def weight_map_of(text: str, index: str) -> dict[str, str]:
    """tensor -> file name, from an index's text. Takes ten times its bytes at most, and 32 MiB.

    Args:
        index: what errors call it.

    Raises:
        CheckpointError: no JSON, no or a bad `weight_map` or two, a tensor in two files, too many files, or a name that
            leads out of the directory or is not as a directory has it.
    """
    document = Document(text, index)
    weight_map: dict[str, str] = {}
    names: dict[str, str] = {}  # one string for each file, not one for each tensor
    beside = count(1)
    begun = False

    def tensor(key: str, at: int) -> int:
        name, end = document.string(at)
        if name not in names:
            _check_name(name, index)
            if len(names) == MAX_FILES:
                raise CheckpointError(f"{index} names more than {MAX_FILES} files")
        first = weight_map.setdefault(key, names.setdefault(name, name))
        if first != name:
            raise CheckpointError(f"{index} has tensor {shown(key)} twice, in {first} and in {name}")
        return end

    def member(key: str, at: int) -> int:
        nonlocal begun
        if key != "weight_map":
            return _passed(document, at, next(beside))
        if begun or not text.startswith("{", at):
            raise CheckpointError(f"{index} has {'more than one' if begun else 'no'} weight_map")
        begun = True
        return document.object(at, key, tensor)

    begin = len(text) - len(text.lstrip(SPACES))
    end = document.object(begin, index, member)
    if end < len(text):
        raise document.broken("something follows", end)
    if not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    return weight_map


def can_be_named(name: str) -> bool:
    """Whether a file below any directory can have this name."""
    if not name.isprintable() or len(name.encode()) > LONGEST_NAME:
        return False
    return all(len(part.encode()) <= LONGEST_PART for part in name.split("/"))


def _check_name(name: str, index: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or path.suffix != ".safetensors" or not can_be_named(name):
        raise CheckpointError(f"{index} names {shown(name)}, which is no safetensors file in the directory")
    if str(path) != name:
        raise CheckpointError(f"{index} names {name!r}: write {str(path)!r}")


def _passed(document: Document, at: int, number: int) -> int:
    """Where the value at `at` ends, which nobody wants. `number`: that of such values."""
    if number > MAX_BESIDE:
        raise CheckpointError(f"{document.what} has more than {MAX_BESIDE} members beside its weight_map")
    window = document.text[at : at + MAX_MEMBER]
    try:
        return at + DECODER.raw_decode(window)[1]
    except RecursionError:
        raise CheckpointError(f"{document.what} is nested too deeply") from None
    except ValueError as error:
        if len(window) == MAX_MEMBER:
            raise CheckpointError(f"{document.what} has a member of more than {MAX_MEMBER} characters") from None
        raise CheckpointError(f"{document.what} is not JSON: {error}") from None


def _check_tensors(files: list[FileEntry], weight_map: dict[str, str], index: str) -> None:
    """Each tensor is in one file, and in the one that the index names.

    Raises:
        CheckpointError: names the tensor.
    """
    home: dict[str, str] = {}
    for file in files:
        for entry in file.header.tensors:
            if entry.name in home:
                both = f"{home[entry.name]} and in {file.name}"
                raise CheckpointError(f"{index}: tensor {shown(entry.name)} is in {both}")
            home[entry.name] = file.name
    if home == weight_map:
        return
    name = min(name for name in home.keys() | weight_map.keys() if home.get(name) != weight_map.get(name))
    where = home.get(name, "no file")
    if name not in weight_map:
        raise CheckpointError(f"{index} lacks tensor {shown(name)}, which is in {where}")
    raise CheckpointError(f"{index} says that tensor {shown(name)} is in {weight_map[name]}, but it is in {where}")


def identify(
    directory: str, files: list[FileEntry], heads: list[bytes], raw_config: str, texts: list[tuple[str, int, int]]
) -> CheckpointId:
    """Digest over the directory, names, sizes, mtimes and headers, the config, and (name, size, mtime) of `texts`.

    The directory counts because headers and sizes of fine-tunes are equal, and unpacked archives share their mtimes.
    """
    digest = blake2b(repr(directory).encode(), digest_size=16)
    for file, head in zip(files, heads, strict=True):
        digest.update(repr((file.name, file.size, file.mtime_ns, len(head))).encode())
        digest.update(head)
    digest.update(repr((raw_config, texts)).encode())
    return digest.hexdigest()
