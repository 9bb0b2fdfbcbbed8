"""Checkpoints with random weights and real shapes, written once and used by every bench that loads something."""

from __future__ import annotations

import tempfile
from pathlib import Path

from serverless_llm.cli.make_checkpoint import make_checkpoint
from serverless_llm.loader import manifest

SHAPE = "llama-3.2-1b"  # 2.5 GB in bfloat16
CUDA_SHAPE = "llama-3.1-8b"  # 16 GB
SMOKE_SHAPE, SMOKE_LAYERS = "smollm2-135m", 2  # 71 MB


def default_folder() -> Path:
    return Path(tempfile.gettempdir()) / "serverless-llm-checkpoints"


def checkpoint(folder: Path, shape: str, layers: int | None = None, shards: int = 1) -> Path:
    """The directory of a bfloat16 checkpoint, made if it is not there yet."""
    name = "-".join(str(part) for part in (shape, layers, f"{shards}x") if part is not None)
    directory = folder / name
    if not directory.exists():
        make_checkpoint(shape, directory, layers, "bfloat16", shards)
    return directory


def weight_files(directory: Path) -> list[Path]:
    return [directory / file.name for file in manifest.build(directory).files]
