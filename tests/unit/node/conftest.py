"""What several tests of a node need."""

from __future__ import annotations

from pathlib import Path

import pytest

from serverless_llm.cli.make_checkpoint import make_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("node") / "tiny"
    make_checkpoint("tiny-llama", directory, dtype="float32")
    return directory
