"""The loader as a library: the functions of `safetensors.torch` that load, and whole checkpoints.

Bytes are read by few threads in large calls, past the page cache unless they are in it, into fresh memory, of huge
pages where the system has them. It is the caller's, who may write to the tensors, and goes when the last of them does;
a file that is changed or cut later changes nothing in it.

Errors are `CheckpointError`s with the file's name. They are no `SafetensorError`s: that class is the reference's own,
and the loader must run where only torch is. What is missing or may not be read is an `OSError`, as there.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import mmap
import os
import re
import stat
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from types import MappingProxyType

import torch

from serverless_llm.errors import CheckpointError
from serverless_llm.loader import disk_tier, gds, header, manifest, plan
from serverless_llm.loader.header import TensorEntry
from serverless_llm.loader.manifest import FileEntry
from serverless_llm.loader.plan import PAGE, Piece
from serverless_llm.loader.pool import HUGE_PAGE
from serverless_llm.loader.reader import CALL_BYTES, THREADS
from serverless_llm.loader.remote import RemoteFile, is_url
from serverless_llm.loader.source import OpenFile, SourceFile
from serverless_llm.loader.staging import SETTING
from serverless_llm.loader.tied import duplicates
from serverless_llm.loader.views import view

GROUP_BYTES = 64 << 20  # of neighbours that `iterate` reads at once: a long call; the first one has nothing beside it
AHEAD = 2  # groups that are read while one is used: the device has the next call while the last one is waited for
GDS = "gds"  # GPUDirect Storage
BACKENDS = ("mmap", "pread", GDS)  # the first two are the reference's; here both mean the one way through host memory
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # about: what else looks so is told of the hub, too
Device = str | int | None  # None: the CPU, as to the reference


def load_file(
    filename: str | os.PathLike[str], device: Device = "cpu", *, backend: str = "mmap"
) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, in file order.

    On the CPU they are views of one allocation (those misaligned to their item size are copies); on their way to
    another device at most some hundred MiB, or the largest tensor, are in memory.

    Args:
        backend: one of `BACKENDS`. With "gds" (extra `gds`), a CUDA device reads the file by itself, where it can.

    Raises:
        CheckpointError: names the file and what is wrong with it.
        OSError: it cannot be opened.
        ValueError: another backend, "gds" and another device than CUDA's, one of CUDA's that this torch has not, or the
            meta device.
        ConfigurationError: "gds", and kvikio cannot be used.
    """
    _check_backend(backend, device)
    if is_url(filename):
        raise FileNotFoundError(errno.ENOENT, "a URL is no file (load_checkpoint takes a checkpoint's)", filename)
    path = Path(filename)
    manifest.check_tensors_here(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a directory, not a file: load_checkpoint takes a directory", str(path))
    return _load(manifest.file_entry(path.name, path, path)[0], home_of(device), backend)


def load(data: bytes) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file's bytes, in file order, on the CPU: views of one copy of them.

    Raises:
        CheckpointError: says what is wrong.
        TypeError: no bytes.
    """
    if not isinstance(data, bytes | bytearray):
        raise TypeError(f"a safetensors file's bytes are needed, not {type(data).__name__}")
    parsed = header.parse(data, len(data))
    copied = bytearray(data)
    return {entry.name: view(copied, entry) for entry in parsed.tensors}


def load_model(
    model: torch.nn.Module,
    filename: str | os.PathLike[str],
    strict: bool = True,
    device: Device = "cpu",
    *,
    backend: str = "mmap",
) -> tuple[set[str], list[str]]:
    """Loads a file that `save_model` wrote into a module.

    Returns:
        Names that the module has and the file has not, and the other way round; tensors that share memory count as
        there if one of them is.

    Raises:
        RuntimeError: `strict`, and there are such names.
        CheckpointError, OSError, ValueError: as `load_file`.
    """
    state = load_file(filename, device, backend=backend)
    tied = duplicates(model.state_dict(), preferred=state.keys())
    answer = model.load_state_dict(state, strict=False)
    missing, unexpected = set(answer.missing_keys), list(answer.unexpected_keys)
    for other in (name for others in tied.values() for name in others):
        if other in missing:
            missing.remove(other)
        else:
            unexpected.append(other)
    if strict and (missing or unexpected):
        raise RuntimeError(
            f"{filename} does not fit {type(model).__name__}: "
            f"missing are {sorted(missing)}, unknown {sorted(unexpected)}"
        )
    return missing, unexpected


def load_checkpoint(
    directory: str | os.PathLike[str], device: Device = "cpu", *, backend: str = "mmap"
) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face directory, sharded or not, in file order: as `load_file` of each of its files.

    Args:
        directory: or its URL (docs/remote.md): it is brought into the disk tier. On the CPU, what comes lands in the
            tensors' memory, too; what was there, and all on other devices, is loaded from the tier.
        backend: as of `load_file`.

    Raises:
        CheckpointError: names the file and what is wrong; a `TransientError` where the system could not read it.
        ValueError, ConfigurationError: as of `load_file`.
    """
    _check_backend(backend, device)
    home = home_of(device)
    landed: dict[str, memoryview] = {}

    def memory_for(file: RemoteFile) -> memoryview | None:
        if home.type != "cpu" or not file.name.endswith(".safetensors"):
            return None
        landed[file.name] = _allocate(_pages(file.size) or PAGE)
        return landed[file.name]

    with local(directory, memory_for) as path:
        files = manifest.weights(path)
        return {name: one for file in files for name, one in _load(file, home, backend, landed).items()}


def iterate(directory: str | os.PathLike[str], device: Device = "cpu") -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of a Hugging Face directory, in file order.

    Neighbours are read together, `GROUP_BYTES` at most or one larger tensor, into fresh memory that goes with the last
    of them, and the next two such groups while these are used: besides what the caller keeps, four groups at most are
    in memory. Keep a clone of a small tensor that outlives its neighbours.

    Args:
        directory: or its URL, as of `load_checkpoint`.

    Raises:
        CheckpointError: as `load_checkpoint`; at once where headers tell, else when the bytes are due.
        ValueError: as of `load_file`.
    """
    home = home_of(device)
    held, files = _opened(directory)
    return _ahead(held, _groups(files), home, "mmap")


def _ahead(
    held: ExitStack,
    groups: Iterator[tuple[FileEntry, Sequence[TensorEntry]]],
    home: torch.device,
    backend: str,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of all groups, the next ones read while one is used."""
    with held, ThreadPoolExecutor(AHEAD) as threads:
        coming = deque(threads.submit(_tensors, *group, home, backend) for group in islice(groups, AHEAD))
        while coming:
            tensors = coming.popleft().result()
            coming.extend(threads.submit(_tensors, *group, home, backend) for group in islice(groups, 1))
            while tensors:
                name = next(iter(tensors))
                yield name, tensors.pop(name)


async def load_file_async(
    filename: str | os.PathLike[str], device: Device = "cpu", *, backend: str = "mmap"
) -> dict[str, torch.Tensor]:
    """`load_file` in a thread; cancelled, it reads on there and drops what it read."""
    return await asyncio.to_thread(load_file, filename, device, backend=backend)


async def load_checkpoint_async(
    directory: str | os.PathLike[str], device: Device = "cpu", *, backend: str = "mmap"
) -> dict[str, torch.Tensor]:
    """`load_checkpoint` in a thread; cancelled, it reads on there and drops what it read."""
    return await asyncio.to_thread(load_checkpoint, directory, device, backend=backend)


async def iterate_async(
    directory: str | os.PathLike[str], device: Device = "cpu"
) -> AsyncIterator[tuple[str, torch.Tensor]]:
    """`iterate`, with the reading in threads."""
    home = home_of(device)
    held, files = await asyncio.to_thread(_opened, directory)
    groups = _groups(files)
    read = (asyncio.ensure_future(asyncio.to_thread(_tensors, *group, home, "mmap")) for group in groups)
    coming = deque(islice(read, AHEAD))
    try:
        while coming:
            tensors = await coming.popleft()
            coming.extend(islice(read, 1))
            while tensors:
                name = next(iter(tensors))
                yield name, tensors.pop(name)
    finally:
        for left in coming:
            left.cancel()
        held.close()


def _opened(source: str | os.PathLike[str]) -> tuple[ExitStack, list[FileEntry]]:
    """A checkpoint's files, and what keeps them there."""
    with ExitStack() as held:
        files = manifest.weights(held.enter_context(local(source)))
        return held.pop_all(), files


@contextmanager
def local(source: str | os.PathLike[str], memory_for: disk_tier.Placed = lambda file: None) -> Iterator[Path]:
    """The directory of a checkpoint; that of a URL is brought up to date, and stays meanwhile."""
    if not is_url(source):
        _check_directory(os.fspath(source))
        yield Path(source)
        return
    with disk_tier.tier().bring(str(source), lambda name, done, total: None, memory_for=memory_for) as lease:
        yield lease.directory


def _check_directory(name: str) -> None:
    """
    Raises:
        OSError: names it as the caller did, and says what was meant where that can be told.
    """
    try:
        mode = os.stat(name).st_mode  # noqa: PTH116  # the error names what the caller named
    except FileNotFoundError:
        of_hub = f"; if it is the hub's, serverless-llm pull {name} brings it and prints where it is"
        told = "there is no such directory" + (of_hub if HUB_NAME.fullmatch(name) else "")
        raise FileNotFoundError(errno.ENOENT, told, name) from None
    if not stat.S_ISDIR(mode):
        told = "a file, not a directory: name its directory, or load_file takes a file"
        raise NotADirectoryError(errno.ENOTDIR, told, name)


def home_of(device: Device) -> torch.device:
    """
    Raises:
        ValueError: a CUDA device that this torch has not, or the meta device.
    """
    home = _named(device)
    if home.type == "meta":
        raise ValueError('the device meta holds no bytes: load to device="cpu" or to a GPU')
    if home.type != "cuda" or (home.index or 0) < torch.cuda.device_count():
        return home
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        raise ValueError(
            f"this torch ({torch.__version__}) is built without CUDA: "
            'load to device="cpu", or install a torch with CUDA (https://pytorch.org/get-started)'
        )
    raise ValueError(f"there is no {home}: torch finds {torch.cuda.device_count()} CUDA devices")


def _named(device: Device) -> torch.device:
    """A number is one of this torch's accelerators, and CUDA's where it has none."""
    if isinstance(device, int) and not torch.accelerator.is_available():
        return torch.device("cuda", device)
    return torch.device("cpu" if device is None else device)


def _check_backend(backend: str, device: Device) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is none of {', '.join(BACKENDS)}")
    if backend == GDS:
        if _named(device).type != "cuda":
            raise ValueError(f"the backend {GDS} is for CUDA devices, not for {device}")
        gds.kvikio()


def _load(
    file: FileEntry, device: torch.device, backend: str, landed: Mapping[str, memoryview] = MappingProxyType({})
) -> dict[str, torch.Tensor]:
    """One allocation on the CPU, `landed` if its bytes came there; for another device a group at a time."""
    if file.name in landed:
        return _views(file, file.header.tensors, landed[file.name])
    if device.type == "cpu":
        return _tensors(file, file.header.tensors, device, backend)
    return dict(_ahead(ExitStack(), _groups([file]), device, backend))


def _groups(files: Sequence[FileEntry]) -> Iterator[tuple[FileEntry, Sequence[TensorEntry]]]:
    """Neighbours in one file, `GROUP_BYTES` or one tensor at a time."""
    for file in files:
        group: list[TensorEntry] = []
        for entry in file.header.tensors:
            if group and entry.end - group[0].start > GROUP_BYTES:
                yield file, group
                group = []
            group.append(entry)
        yield file, group


def _tensors(
    file: FileEntry, group: Sequence[TensorEntry], device: torch.device, backend: str
) -> dict[str, torch.Tensor]:
    """Neighbours of one file, read into one allocation."""
    if not group:
        return {}
    base, stop = group[0].start // PAGE * PAGE, group[-1].end
    if backend == GDS:
        source = SourceFile(file.path, file.size, file.mtime_ns)
        return _views(file, group, gds.read(source, base, stop, device), base)
    tensors = _views(file, group, _read(file, base, stop), base)
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _views(
    file: FileEntry, group: Sequence[TensorEntry], content: memoryview | torch.Tensor, base: int = 0
) -> dict[str, torch.Tensor]:
    """Tensors whose bytes are in memory, from the file's byte `base` on."""
    try:
        return {entry.name: view(content, entry, base) for entry in group}
    except CheckpointError as error:
        if str(file.path) in str(error):
            raise
        raise CheckpointError(f"{file.path}: {error}") from error


def _read(file: FileEntry, start: int, stop: int) -> memoryview:
    """The file's bytes from `start`, a page's first, to `stop`."""
    content = _allocate(_pages(stop - start) or PAGE)  # tensors of no bytes end where they begin
    opened = OpenFile(SourceFile(file.path, file.size, file.mtime_ns))

    def read(call: Piece) -> None:
        place = call.offset - start
        opened.read([content[place : place + _pages(call.length)]], call.offset, call.length)

    try:
        calls = plan.cut(Piece(0, start, stop - start), CALL_BYTES)
        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(read, calls) if len(calls) > 1 else map(read, calls))
        opened.check()
    finally:
        opened.close()
    return content


def _pages(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


def _allocate(nbytes: int) -> memoryview:
    """Fresh private memory that begins with a page; unmapped with the last view of it."""
    huge = nbytes >= HUGE_PAGE and SETTING.exists()
    memory = mmap.mmap(-1, nbytes + HUGE_PAGE * huge, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    first = 0
    if huge:
        memory.madvise(mmap.MADV_HUGEPAGE)
        first = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % HUGE_PAGE
    return memoryview(memory)[first : first + nbytes]
