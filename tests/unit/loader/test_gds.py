"""A device that reads files by itself: what is refused without one, and that what it reads is what they hold."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from serverless_llm import loader
from serverless_llm.errors import ConfigurationError
from serverless_llm.loader import gds, manifest
from serverless_llm.loader.views import view
from tests.unit.loader.checkpoints import random, same, write

CONTENT = {
    "bytes": torch.arange(3, dtype=torch.uint8),
    "none": torch.empty(2, 0),
    "halves": torch.arange(12.0, dtype=torch.bfloat16).view(3, 4),
    "whole": torch.arange(6.0),
}


def test_only_cuda_devices_read_files_by_themselves(tmp_path: Path) -> None:
    for load in (loader.load_file, loader.load_checkpoint):
        with pytest.raises(ValueError, match="the backend gds is for CUDA devices, not for cpu"):
            load(tmp_path, "cpu", backend="gds")


def test_what_is_missing_for_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gds.kvikio.cache_clear()
    monkeypatch.setitem(sys.modules, "kvikio", None)
    with pytest.raises(ConfigurationError, match=r"need kvikio .*pip install.*'\.\[gds\]'"):
        loader.load_file(tmp_path / "nothing", "cuda:0", backend="gds")
    monkeypatch.delitem(sys.modules, "kvikio")
    (tmp_path / "kvikio.py").write_text("raise RuntimeError('no libcufile.so.0')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigurationError, match=r"kvikio cannot be used: no libcufile\.so\.0"):
        loader.load_checkpoint(tmp_path, "cuda:0", backend="gds")


@pytest.mark.parametrize("before", [0, 5])
def test_tensors_lie_in_the_bytes_that_were_read(tmp_path: Path, before: int) -> None:
    path = write(tmp_path, CONTENT) / manifest.SINGLE
    content = torch.frombuffer(bytearray(before) + path.read_bytes(), dtype=torch.uint8)[before:]
    for entry in manifest.file_entry(path.name, path, path)[0].header.tensors:
        found = view(content, entry)
        assert same(found, CONTENT[entry.name])
        assert found.untyped_storage().nbytes() == entry.nbytes
        aligned = (before + entry.start) % found.element_size() == 0
        assert not entry.nbytes or (found.data_ptr() == content.data_ptr() + entry.start) == aligned


@pytest.mark.gpu
def test_a_cuda_device_reads_a_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("kvikio")
    content = CONTENT | random(200)
    found = loader.load_checkpoint(write(tmp_path, content), "cuda:0", backend="gds")
    assert {one.device for one in found.values()} == {torch.device("cuda:0")}
    assert found.keys() == content.keys()
    assert all(same(one.cpu(), content[name]) for name, one in found.items())
