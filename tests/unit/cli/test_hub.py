"""Which files of a hub's snapshot are needed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from serverless_llm.cli import hub
from serverless_llm.errors import CheckpointError, TransientError
from serverless_llm.loader import manifest


def test_an_index_is_read_as_that_of_a_directory(tmp_path: Path) -> None:
    index = tmp_path / manifest.INDEX
    index.write_text('{"weight_map": {"x": "b.safetensors", "y": "a.safetensors"}}')
    names = [manifest.INDEX]
    assert hub.shards(tmp_path, names) == [manifest.INDEX, "a.safetensors", "b.safetensors"]
    os.truncate(index, manifest.MAX_INDEX + 1)
    with pytest.raises(CheckpointError, match=rf"index\.json is larger than {manifest.MAX_INDEX} bytes$"):
        hub.shards(tmp_path, names)
    index.write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"index\.json is not UTF-8$"):
        hub.shards(tmp_path, names)
    index.unlink()
    with pytest.raises(TransientError, match=rf"index\.json is missing in {tmp_path}$"):
        hub.shards(tmp_path, names)
