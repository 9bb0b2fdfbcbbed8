"""The loader as a library, against the reference implementation: `safetensors.torch`."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import safetensors.torch as reference
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from serverless_llm import loader
from serverless_llm.cli.make_checkpoint import make_checkpoint
from serverless_llm.demo import tasks
from serverless_llm.errors import CheckpointError
from serverless_llm.loader import header, library, manifest
from serverless_llm.loader.header import TensorEntry
from serverless_llm.loader.library import Device
from serverless_llm.loader.manifest import FileEntry
from serverless_llm.loader.plan import PAGE
from serverless_llm.loader.reader import CALL_BYTES
from serverless_llm.loader.views import TORCH_DTYPES
from tests.unit.loader.checkpoints import random, raw, same, write

ROOT = Path(__file__).resolve().parents[3]
PACKED = torch.float4_e2m1fn_x2


def contents(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bytes; for bool 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    return torch.randint(0, high, (nbytes,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
TENSORS = st.builds(contents, SHAPES, st.sampled_from(list(TORCH_DTYPES.values())), st.integers(0, 99)).filter(
    lambda tensor: tensor.dim() > 0 or tensor.dtype != PACKED
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
STATES = st.dictionaries(TEXTS.filter(lambda name: name != "__metadata__"), TENSORS, max_size=6)
METADATA = st.none() | st.dictionaries(TEXTS, TEXTS, max_size=3)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """The same tensors bit for bit; those of any bytes in the same order: the reference shuffles those of none."""
    orders = [[name for name, tensor in tensors.items() if tensor.numel()] for tensors in (one, other)]
    return (
        one.keys() == other.keys()
        and orders[0] == orders[1]
        and all(same(tensor, other[name]) for name, tensor in one.items())
    )


def test_names_and_signatures_are_the_references() -> None:
    for name, theirs in inspect.getmembers(reference, inspect.isfunction):
        if theirs.__module__ == reference.__name__ and not name.startswith("_"):
            parameters = [
                [(one.name, one.kind, one.default) for one in inspect.signature(function).parameters.values()]
                for function in (theirs, getattr(loader, name))
            ]
            assert parameters[0] == parameters[1], name
            assert name in loader.__all__
    assert all(callable(getattr(loader, name)) for name in loader.__all__)
    assert dir(loader) == sorted(loader.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'load_fil'"):
        loader.load_fil  # noqa: B018


@settings(max_examples=150)
@given(tensors=STATES, metadata=METADATA)
@example(tensors={"a": contents((3, 2), PACKED, 0), "b": contents((), torch.complex64, 1)}, metadata={})
@example(tensors={"only": contents((0, 3), torch.float64, 0)}, metadata=None)
def test_tensors_and_files_are_equal_both_ways(
    tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None
) -> None:
    with TemporaryDirectory() as folder:
        ours, theirs = Path(folder, "ours"), Path(folder, "theirs")
        loader.save_file(tensors, ours, metadata)
        written = ours.read_bytes()
        assert loader.save(tensors, metadata) == written
        assert equal(loader.load(written), loader.load_file(ours))
        assert header.parse(written, len(written)).metadata == (metadata or {})
        with safe_open(ours, framework="pt") as opened:
            assert opened.metadata() == (metadata or None if metadata != {} else opened.metadata())
            assert equal(opened.get_tensors(), loader.load_file(ours))
        if metadata != {} or tensors:  # the reference's file of nothing but empty metadata is not JSON
            reference.save_file(tensors, theirs, metadata)
            assert len(theirs.read_bytes()) == len(written)
            if len(metadata or ()) < 2:  # the reference shuffles them
                assert theirs.read_bytes() == written
            assert equal(loader.load_file(theirs), loader.load_file(ours))
        assert {name: (one.dtype, one.shape) for name, one in loader.load(written).items()} == {
            name: (one.dtype, one.shape) for name, one in tensors.items()
        }
        assert all(same(one, tensors[name]) for name, one in loader.load(written).items())


def misaligned(path: Path) -> Path:
    fields = {
        "byte": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "odd": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
    }
    path.write_bytes(raw(fields, bytes([1, 2, 3]) + torch.ones(2).numpy().tobytes()))
    return path


def test_tensors_are_the_callers_own(tmp_path: Path) -> None:
    path = misaligned(tmp_path / "a.safetensors")
    before = path.read_bytes()
    got = loader.load_file(path)
    got["byte"] += 1
    path.write_bytes(b"")
    assert got["byte"].tolist() == [2, 3, 4]
    assert got["odd"].tolist() == loader.load(before)["odd"].tolist() == [1, 1]
    assert (loader.storage_ptr(got["odd"]) % 4, loader.storage_size(got["odd"])) == (0, 8)
    assert loader.load(before)["byte"].tolist() == [1, 2, 3]


@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize("call_bytes", [CALL_BYTES, 1 << 20])
def test_large_files_are_read_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call_bytes: int, cold: bool
) -> None:
    monkeypatch.setattr(library, "CALL_BYTES", call_bytes)
    content = random(6.3)
    path = write(tmp_path, content) / manifest.SINGLE
    if cold:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert equal(loader.load_file(path), content)


@pytest.fixture
def sharded(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint of 6 MiB in two files and no config.json."""
    first, second = random(4, 0, 7), random(2, 1, 3)
    write(tmp_path, first, second)
    (tmp_path / manifest.CONFIG).unlink()
    return tmp_path, first | second


def test_checkpoints_of_many_files(sharded: tuple[Path, dict[str, torch.Tensor]]) -> None:
    directory, content = sharded
    assert equal(loader.load_checkpoint(directory), content)
    assert equal(asyncio.run(loader.load_checkpoint_async(directory)), content)
    one = directory / "model-00002-of-00002.safetensors"
    assert equal(asyncio.run(loader.load_file_async(one, backend="pread")), reference.load_file(one))


@pytest.mark.parametrize("group_bytes", [1, 1 << 20, library.GROUP_BYTES])
def test_iterating_gives_all_in_file_order(
    sharded: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch, group_bytes: int
) -> None:
    monkeypatch.setattr(library, "GROUP_BYTES", group_bytes)
    directory, content = sharded

    async def collect() -> dict[str, torch.Tensor]:
        return {name: tensor async for name, tensor in loader.iterate_async(directory)}

    assert equal(dict(loader.iterate(directory)), content)
    assert equal(asyncio.run(collect()), content)


def test_iterating_holds_four_groups_at_most(
    sharded: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "GROUP_BYTES", 1 << 20)

    def mapped() -> int:
        """Bytes of private memory, touched or not."""
        status = Path("/proc/self/status").read_text()
        return int(re.findall(r"VmData:\s+(\d+) kB", status)[0]) << 10

    directory, _ = sharded
    assert len(list(loader.iterate(directory))) == 10  # the stacks of threads are there from now on
    before = mapped()
    most = max(mapped() - before for _ in loader.iterate(directory))
    one = (1 << 20) + PAGE
    # the one used last, this one and the next two; the rest is small change of an allocator
    assert most < 4 * one + (1 << 20)


def test_the_next_groups_are_read_while_one_is_used(
    sharded: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "GROUP_BYTES", 1)  # every tensor is a group
    begun: SimpleQueue[Sequence[TensorEntry]] = SimpleQueue()
    read = library._tensors

    def told(file: FileEntry, group: Sequence[TensorEntry], *where: Any) -> dict[str, torch.Tensor]:
        begun.put(group)
        return read(file, group, *where)

    monkeypatch.setattr(library, "_tensors", told)
    tensors = loader.iterate(sharded[0])
    first, _ = next(tensors)
    names = [begun.get(timeout=10)[0].name for _ in range(1 + library.AHEAD)]
    assert first in names
    assert len(set(names)) == len(names)
    tensors.close()  # type: ignore[attr-defined]  # a generator
    assert begun.empty(), "two groups ahead, and none after the end"


def test_another_device_gets_it_in_groups(tmp_path: Path) -> None:
    content = random(0.5)
    path = write(tmp_path, content) / manifest.SINGLE
    got = library._load(manifest.file_entry(path.name, path, path)[0], torch.device("meta"), "mmap")
    assert {name: (one.device.type, one.shape) for name, one in got.items()} == {
        name: ("meta", one.shape) for name, one in content.items()
    }


def test_no_device_is_the_cpu_as_to_the_reference(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 3)
    path = write(tmp_path, module.state_dict()) / manifest.SINGLE
    expected = reference.load_file(path, device=None)  # type: ignore[arg-type]  # it takes more than it names
    for got in (
        loader.load_file(path, device=None),
        loader.load_checkpoint(tmp_path, device=None),
        dict(loader.iterate(tmp_path, device=None)),
        *loader.load_slices(tmp_path, [None], lambda name: None),
    ):
        assert equal(got, expected)
    assert loader.load_into(module, tmp_path, device=None) == (set(), [])
    with pytest.raises(ValueError, match="the backend gds is for CUDA devices, not for None"):
        loader.load_file(path, device=None, backend="gds")


LOADS: list[Callable[[Any, Device], Any]] = [
    lambda directory, device: loader.load_file(directory / manifest.SINGLE, device),
    loader.load_checkpoint,
    loader.iterate,
    lambda directory, device: loader.load_slices(directory, [device], lambda name: None),
    lambda directory, device: loader.load_into(torch.nn.Linear(2, 3), directory, device),
]


@pytest.mark.parametrize("load", LOADS)
def test_a_cuda_device_that_is_not_there_is_refused(tmp_path: Path, load: Callable[[Any, Device], Any]) -> None:
    write(tmp_path, torch.nn.Linear(2, 3).state_dict())
    count = torch.cuda.device_count()
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        message = r"this torch \(.*\) is built without CUDA: .*device=\"cpu\", or install a torch with CUDA"
    else:
        message = f"there is no cuda:{count}: torch finds {count} CUDA devices"
    devices: list[Device] = [f"cuda:{count}", count]
    if not count:
        devices.append("cuda")
    for device in devices:
        with pytest.raises(ValueError, match=message):
            load(tmp_path, device)


@pytest.mark.parametrize("load", LOADS)
def test_the_meta_device_is_refused_as_there(tmp_path: Path, load: Callable[[Any, Device], Any]) -> None:
    write(tmp_path, torch.nn.Linear(2, 3).state_dict())
    with pytest.raises(SafetensorError):
        reference.load_file(tmp_path / manifest.SINGLE, "meta")
    with pytest.raises(ValueError, match='the device meta holds no bytes: load to device="cpu" or to a GPU'):
        load(tmp_path, "meta")


def entry(dtype: str, shape: list[int], nbytes: int, name: str = "x") -> dict[str, Any]:
    return {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, nbytes]}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "file of 0 bytes is too short"),
        (raw(entry("F32", [2], 8), bytes(7)), "truncated"),
        (raw(entry("F32", [2], 8), bytes(9)), "tensors end at byte"),
        (raw(entry("F6_E2M3", [4], 3), bytes(3)), "tensor 'x' has the dtype F6_E2M3, which has no tensor type"),
        (raw(entry("F4", [2, 3], 3), bytes(3)), r"'x' of F4 \[2, 3\] has rows that end within a byte"),
        (raw(entry("F6_E2M3", [4], 3, "x" * 9999), bytes(3)), r"tensor 'x{200}\.\.\.' has the dtype"),
        (raw(entry("F4", [2, 3], 3, "x" * 9999), bytes(3)), r"tensor 'x{200}\.\.\.' of F4 \[2, 3\]"),
        (raw(entry("F32", [0, 2**62, 2**62], 0)), "'x' overflows"),
    ],
)
def test_a_bad_file_is_named_with_its_fault(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{re.escape(str(path))}: .*{message}"):
        loader.load_file(path)
    with pytest.raises(CheckpointError, match=message):
        loader.load(content)


def test_a_file_that_changes_meanwhile_is_an_error(sharded: tuple[Path, dict[str, torch.Tensor]]) -> None:
    directory, _ = sharded
    tensors = loader.iterate(directory)
    (directory / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002.safetensors was changed after its header"):
        next(tensors)


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, random(0.1)) / manifest.SINGLE
    preadv = os.preadv

    def while_others_write(*arguments: Any) -> int:
        os.utime(path, ns=(0, 0))
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", while_others_write)
    with pytest.raises(CheckpointError, match="was changed after its header was read"):
        loader.load_file(path)


def test_a_file_and_a_directory_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path, random(0.1)) / manifest.SINGLE
    with pytest.raises(IsADirectoryError) as refused:
        loader.load_file(tmp_path)
    told = f"[Errno 21] a directory, not a file: load_checkpoint takes a directory: '{tmp_path}'"
    assert str(refused.value) == told
    hub = "; if it is the hub's, serverless-llm pull Qwen/Qwen3-0.6B brings it and prints where it is"
    for source, kind, told in (
        (file, NotADirectoryError, "[Errno 20] a file, not a directory: name its directory, or load_file takes a file"),
        (tmp_path / "none", FileNotFoundError, "[Errno 2] there is no such directory"),
        ("Qwen/Qwen3-0.6B", FileNotFoundError, f"[Errno 2] there is no such directory{hub}"),
    ):
        for load in LOADS[1:]:
            with pytest.raises(kind) as wrong:
                load(source, "cpu")
            assert str(wrong.value) == f"{told}: '{source}'"


def test_saving_over_a_file_leaves_the_old_one_to_its_other_names(tmp_path: Path) -> None:
    path, other = tmp_path / "a.safetensors", tmp_path / "other"
    loader.save_file({"a": BASE}, path)
    other.hardlink_to(path)
    loader.save_file({"b": BASE}, path)
    assert (*loader.load_file(path), *loader.load_file(other)) == ("b", "a")


def test_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing"):
        loader.load_file(tmp_path / "nothing")
    with pytest.raises(
        FileNotFoundError, match=r"a URL is no file \(load_checkpoint .*: 'https://host/a.safetensors'$"
    ):
        loader.load_file("https://host/a.safetensors")
    with pytest.raises(CheckpointError, match="has neither model"):
        loader.load_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing"):
        next(loader.iterate(tmp_path / "nothing"))
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file"):
        loader.load_checkpoint(tmp_path / "file")
    with pytest.raises(ValueError, match="backend 'io' is none of mmap, pread, gds"):
        loader.load_file(tmp_path / "nothing", backend="io")


BASE = torch.arange(6.0).view(2, 3)


@pytest.mark.parametrize(
    "tensors",
    [
        [("a", BASE)],
        {"a": 1},
        {"a": BASE.to_sparse()},
        {"a": BASE.t()},
        {"a": BASE, "b": BASE[1]},
        {"a": BASE, "b": BASE},
        {"a": BASE[:, :1], "b": BASE[:, 1:]},
        {1: BASE},
        {"\ud800": BASE},
        {"a": BASE.to("meta")},
    ],
)
def test_what_cannot_be_saved_is_refused_as_there(tmp_path: Path, tensors: Any) -> None:
    path = tmp_path / "kept"
    path.write_text("before")
    with pytest.raises((TypeError, ValueError, RuntimeError)) as theirs:
        reference.save(tensors)
    with pytest.raises(theirs.type):
        loader.save_file(tensors, path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("tensors", "metadata", "kind", "message"),
    [
        ({"a": BASE.to(torch.complex128)}, None, ValueError, "'a' has the type torch.complex128, which safetensors"),
        ({"__metadata__": BASE}, None, ValueError, "is no name for a tensor"),
        ({"a": contents((), PACKED, 0)}, None, ValueError, "has no dimension"),
        ({"a": BASE}, {"b": 1}, TypeError, "metadata are strings by strings, not 'b': 1"),
        ({"a": BASE}, "b", TypeError, "metadata are a dict of strings, not str"),
        ({"a": BASE}, dict.fromkeys(map(str, range(1025)), ""), ValueError, "__metadata__ has more than 1024 pairs"),
    ],
)
def test_what_no_reader_would_open_is_not_written(
    tensors: Any, metadata: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        loader.save(tensors, metadata)


@pytest.mark.parametrize("data", ["text", memoryview(b"bytes"), 3])
def test_what_is_no_bytes_is_refused_as_there(data: Any) -> None:
    for load in (reference.load, loader.load):
        with pytest.raises(TypeError):
            load(data)


def test_no_name_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="'\\.'"):
        loader.save_file({"a": BASE}, "")
    assert list(tmp_path.iterdir()) == []


def test_parts_without_overlap_and_lazy_values_are_saved() -> None:
    turned = torch.tensor([1 + 2j], dtype=torch.complex64).conj()
    parameter = torch.nn.Parameter(BASE[1])
    got = loader.load(loader.save({"a": BASE[0], "b": parameter, "c": turned, "d": BASE[0][:0]}))
    assert [got[name].tolist() for name in "abcd"] == [[0, 1, 2], [3, 4, 5], [1 - 2j], []]


def tied(scale: float = 1.0) -> torch.nn.Module:
    model = torch.nn.ModuleDict({"head": torch.nn.Linear(4, 4), "embed": torch.nn.Embedding(4, 4)})
    assert isinstance(model["head"], torch.nn.Linear)
    assert isinstance(model["embed"], torch.nn.Embedding)
    torch.nn.init.constant_(model["head"].weight, scale)
    model["embed"].weight = model["head"].weight
    return model


@pytest.mark.parametrize(("save", "load"), [(loader, reference), (reference, loader), (loader, loader)])
def test_models_with_tied_tensors_come_back(tmp_path: Path, save: Any, load: Any) -> None:
    path = tmp_path / "model.safetensors"
    saved, loaded = tied(3.0), tied()
    metadata = {"format": "pt"}
    save.save_model(saved, str(path), metadata)
    assert load.load_model(loaded, path) == (set(), [])
    assert equal(dict(loaded.state_dict()), dict(saved.state_dict()))
    content = path.read_bytes()
    assert header.parse(content, len(content)).metadata == {"format": "pt", "head.weight": "embed.weight"}


def strided() -> torch.nn.Module:
    model = torch.nn.Linear(2, 3, bias=False)
    model.weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3).t())
    return model


def test_models_that_are_not_contiguous_are_copied_or_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "model.safetensors")
    loader.save_model(strided(), path)
    assert loader.load_file(path)["weight"].tolist() == [[0, 3], [1, 4], [2, 5]]
    with pytest.raises(ValueError, match=r"'weight' is not contiguous.*force_contiguous=True"):
        loader.save_model(strided(), path, force_contiguous=False)


def test_a_model_that_shares_parts_of_nothing_whole_is_refused(tmp_path: Path) -> None:
    model = torch.nn.Module()
    model.a, model.b = (torch.nn.Parameter(part) for part in (BASE[0], BASE.view(-1)[2:]))
    for save in (loader.save_model, reference.save_model):
        with pytest.raises(RuntimeError):
            save(model, str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("strict", [True, False])
def test_names_that_do_not_fit_are_told(tmp_path: Path, strict: bool) -> None:
    path = tmp_path / "model.safetensors"
    loader.save_file({"weight": torch.zeros(2, 2), "other": torch.zeros(1), "more": torch.zeros(1)}, path)
    model = torch.nn.Linear(2, 2)
    if strict:
        with pytest.raises(RuntimeError, match=r"missing are \['bias'\], unknown \['more', 'other'\]"):
            loader.load_model(model, path)
    else:
        missing, unexpected = loader.load_model(model, path, strict=False)
        assert (missing, sorted(unexpected)) == ({"bias"}, ["more", "other"])
    assert not model.weight.any()


def test_both_names_of_a_tied_tensor_are_one_too_many(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    both = {name: tensor.clone() for name, tensor in tied().state_dict().items()}
    reference.save_file(both, path)
    answers = [load(tied(), path, strict=False) for load in (loader.load_model, reference.load_model)]
    assert answers == [(set(), ["head.weight"])] * 2


def examples() -> list[str]:
    """Of the page: that of torch alone, that of transformers, and that of experts, which goes on from it."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs/library.md").read_text(), flags=re.DOTALL)


def test_the_page_runs_as_it_stands(tmp_path: Path) -> None:
    script, _, _ = examples()
    script += "\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert not {"aiohttp", "msgspec", "safetensors", "transformers"} & set(json.loads(lines.pop()))
    assert lines == re.findall(r"  # (.*)", examples()[0])


def test_the_page_s_models_compute(tmp_path: Path) -> None:
    _, dense, experts = examples()
    make_checkpoint("tiny-mixtral", tmp_path)
    parts = (
        dense.replace("path/to/model", str(tasks.checkpoint_dir("demo-add"))),
        experts.replace("path/to/model", str(tmp_path)),
    )
    found: dict[str, Any] = {}
    for script in parts:
        exec(script, found)
        assert found["model"](torch.ones(1, 3, dtype=torch.int64)).logits.isfinite().all()


def test_the_package_alone_brings_no_torch() -> None:
    script = "import sys, serverless_llm.loader, serverless_llm.loader.pipeline; print('torch' in sys.modules)"
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "model.safetensors"
    with pytest.raises(FileNotFoundError) as refused:
        loader.save_file({"a": torch.zeros(1)}, path)
    assert (refused.value.filename, refused.value.strerror) == (str(path), "No such file or directory")
