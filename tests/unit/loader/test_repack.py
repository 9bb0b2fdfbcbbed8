"""A checkpoint written anew: the same tensors to the reference implementation, in files that read best."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from serverless_llm.errors import CapacityError, CheckpointError, TransientError
from serverless_llm.loader import header, manifest
from serverless_llm.loader.repack import PAGE, Shard, repack
from tests.unit.loader.checkpoints import opened, random, write

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)
WHOLE = 1 << 40


def repacked(source: Path, target: Path, most: int = WHOLE) -> list[Shard]:
    return repack(source, target, most, lambda name, done, total: None)


def loaded(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors, as the reference implementation reads them."""
    return {name: one for file in directory.glob("*.safetensors") for name, one in load_file(file).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    def seen(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[object, ...]]:
        return {
            n: (t.dtype, t.shape, t.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
            for n, t in tensors.items()
        }

    return seen(one) == seen(other)


def check_form(directory: Path) -> None:
    """Data from a page boundary, and every tensor aligned to its items."""
    for file in manifest.build(directory).files:
        assert file.data_offset % PAGE == 0
        for entry in file.header.tensors:
            assert entry.start * 8 % header.DTYPE_BITS[entry.dtype] == 0


def test_weights_alone_are_repacked(tmp_path: Path) -> None:
    source = write(tmp_path / "source", random(1, seed=1), random(1, seed=2))
    (source / "config.json").unlink()
    repacked(source, tmp_path / "target")
    assert [path.name for path in (tmp_path / "target").iterdir()] == [manifest.SINGLE]
    assert same(loaded(tmp_path / "target"), loaded(source))


def test_shards_become_one_file(tmp_path: Path) -> None:
    odd = {"a": torch.arange(3, dtype=torch.uint8), "b": torch.randn(5), "ü": torch.zeros(0, 4)}
    source = write(tmp_path / "source", odd, random(1, seed=1), {"one": torch.tensor(7)})
    (source / "tokenizer.json").write_text("{}")
    (source / "old.bin").write_text("a pickle")
    (source / "folder").mkdir()
    (written,) = repacked(source, tmp_path / "target")
    assert sorted(path.name for path in (tmp_path / "target").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (tmp_path / "target" / "model.safetensors").stat().st_size == written.nbytes
    assert same(loaded(source), loaded(tmp_path / "target"))
    check_form(tmp_path / "target")


def test_a_file_is_split_where_it_is_too_large(tmp_path: Path) -> None:
    tensors = random(3, count=6)
    source = write(tmp_path / "source", tensors)
    half = tensors["0.0"].nbytes
    written = repacked(source, tmp_path / "target", 2 * half)
    assert [len(shard.parts) for shard in written] == [2, 2, 2]
    assert [len(shard.parts) for shard in repacked(source, tmp_path / "small", half - 1)] == [1] * 6
    index = json.loads((tmp_path / "target" / manifest.INDEX).read_text())
    assert index["metadata"] == {"total_size": 6 * half}
    assert set(index["weight_map"].values()) == {f"model-{n:05}-of-00003.safetensors" for n in (1, 2, 3)}
    assert same(tensors, loaded(tmp_path / "target"))
    check_form(tmp_path / "target")


def test_metadata_stay_and_the_first_file_s_count(tmp_path: Path) -> None:
    source = write(tmp_path / "source", random(0.1), random(0.1, seed=1))
    for number, name in enumerate(sorted(path.name for path in source.glob("*.safetensors"))):
        save_file(load_file(source / name), source / name, {"format": "pt", "n": str(number), name: "here"})
    repacked(source, tmp_path / "target")
    with safe_open(tmp_path / "target" / manifest.SINGLE, "pt") as file:
        first, second = sorted(path.name for path in source.glob("*.safetensors"))
        assert file.metadata() == {"format": "pt", "n": "0", first: "here", second: "here"}


def test_metadata_that_one_file_may_not_have_are_told(tmp_path: Path) -> None:
    source = write(tmp_path / "source", random(0.1), random(0.1, seed=1))
    for number, path in enumerate(sorted(source.glob("*.safetensors"))):
        save_file(load_file(path), path, {f"{number}.{key}": "" for key in range(header.MAX_METADATA)})
    with pytest.raises(CheckpointError, match="of its files together __metadata__ has more than 1024 pairs"):
        repacked(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()


shapes = st.lists(st.integers(0, 5), max_size=3)


@given(st.lists(st.tuples(st.sampled_from(DTYPES), shapes), min_size=1, max_size=8), st.integers(1, 400))
def test_any_tensors_come_out_as_they_went_in(
    tmp_path_factory: pytest.TempPathFactory, wanted: list[tuple[torch.dtype, list[int]]], most: int
) -> None:
    folder = tmp_path_factory.mktemp("repack")
    tensors = {f"t{n}": (torch.rand(shape) * 9).to(dtype) for n, (dtype, shape) in enumerate(wanted)}
    source = write(folder / "source", tensors)
    written = repacked(source, folder / "target", most)
    assert same(tensors, loaded(folder / "target"))
    assert all(len(shard.parts) == 1 or shard.nbytes - len(shard.header) <= most for shard in written)
    check_form(folder / "target")


def test_each_file_is_told_to_its_end(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    for name, tensors in (("some", random(0.1)), ("empty", {"a": torch.empty(0)})):
        repack(write(tmp_path / name, tensors), tmp_path / f"to-{name}", WHOLE, lambda *row: told.append(row))
        assert told[-1][1] == told[-1][2] == (tmp_path / f"to-{name}" / told[-1][0]).stat().st_size


def test_what_is_there_is_left_alone(tmp_path: Path) -> None:
    source = write(tmp_path / "source", random(0.1))
    before = {path: path.read_bytes() for path in source.iterdir()}
    with pytest.raises(CheckpointError, match="exists and is not an empty directory"):
        repacked(source, source)
    with pytest.raises(CheckpointError, match="there is no directory"):
        repacked(source, tmp_path / "no" / "such")
    assert {path: path.read_bytes() for path in source.iterdir()} == before
    (tmp_path / "empty").mkdir()
    repacked(source, tmp_path / "empty")
    assert same(loaded(source), loaded(tmp_path / "empty"))


def test_a_file_that_changes_meanwhile_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "source", random(40, count=2))
    (path,) = source.glob("*.safetensors")

    def cut(_name: str, done: int, _total: int) -> None:
        os.truncate(path, min(path.stat().st_size, done + 1000))

    def touch(_name: str, _done: int, _total: int) -> None:
        os.utime(path)

    with pytest.raises(CheckpointError, match="changed while it was read"):
        repack(source, tmp_path / "target", WHOLE, touch)
    with pytest.raises(CheckpointError, match=r"ends at byte [0-9]+, which it did not before"):
        repack(source, tmp_path / "target", WHOLE, cut)
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def test_one_file_is_open_at_a_time(tmp_path: Path) -> None:
    source = write(tmp_path / "source", *(random(0.1, seed=seed) for seed in range(3)))
    seen: list[list[Path]] = []
    repack(source, tmp_path / "target", WHOLE, lambda name, done, total: seen.append(opened(source)))
    assert [len(paths) for paths in seen] == [0] + [1] * 9
    assert len({path for (path,) in seen[1:]}) == 3


def test_a_disk_that_takes_no_more_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "source", random(4))
    former, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, former[1]))
    try:
        with pytest.raises(TransientError, match="File too large"):
            repacked(source, tmp_path / "target")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def elsewhere(source: Path, target: Path, told: str) -> int:
    """The status of another process that does the same. `told`: what it does when it has written something."""
    code = f"""
import os, sys
from pathlib import Path
from serverless_llm.loader.repack import repack
repack(Path(sys.argv[1]), Path(sys.argv[2]), 1 << 40, lambda *_: {told})
"""
    return subprocess.run([sys.executable, "-c", code, source, target], check=False).returncode


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    source, target = write(tmp_path / "source", random(0.1)), tmp_path / "tar[get"
    assert elsewhere(source, target, "os.kill(os.getpid(), 9)") == -signal.SIGKILL
    assert len(list(tmp_path.glob(".tar[[]get.*.partial/*.safetensors"))) == 1
    (tmp_path / ".target.mine.partial").mkdir()
    (tmp_path / ".tar[get.1.partial").symlink_to(source)
    repacked(source, target)
    names = [".tar[get.1.partial", ".target.mine.partial", "source", "tar[get"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert same(loaded(source), loaded(target))


def test_what_another_run_writes_is_left_to_it(tmp_path: Path) -> None:
    source, target = write(tmp_path / "source", random(0.1)), tmp_path / "target"

    def told(_name: str, _done: int, _total: int) -> None:
        if not target.exists():
            assert elsewhere(source, target, "None") == 0
            assert len(list(tmp_path.glob(".target.*.partial/*.safetensors"))) == 1

    with pytest.raises(TransientError, match="not empty"):
        repack(source, target, WHOLE, told)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_there_must_be_room(tmp_path: Path) -> None:
    source = write(tmp_path / "source", random(0.1))
    with (source / "notes").open("wb") as file:
        file.truncate(1 << 42)  # a hole
    with pytest.raises(CapacityError, match=r"target needs 4\.4 TB, .* are free there"):
        repacked(source, tmp_path / "target")
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def test_all_of_it_is_synced_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target, synced = write(tmp_path / "source", random(0.4)), tmp_path / "target", set()

    def fsync(descriptor: int) -> None:
        assert not target.exists()
        synced.add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", fsync)
    repacked(source, target, 1 << 18)
    assert {path.name for path in target.iterdir()} >= {"config.json", manifest.INDEX}
    assert synced == {path.stat().st_ino for path in (target, *target.iterdir())}
