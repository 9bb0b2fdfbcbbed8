"""Checkpoints as head and agents know them alike."""

from __future__ import annotations

from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

from serverless_llm.demo import tasks
from serverless_llm.errors import TransientError
from serverless_llm.loader import manifest
from serverless_llm.loader.manifest import Manifest


def read(source: Path) -> Manifest:
    """As `manifest.build`. A bundled checkpoint is known by its bytes, a few MB, instead of its files' times: whoever
    installs the package again writes the same files anew, under servers that run.

    Raises:
        CheckpointError: as `manifest.build`.
    """
    found = manifest.build(source)
    if source.name not in tasks.NAMES or source.resolve() != tasks.checkpoint_dir(source.name).resolve():
        return found
    digest = blake2b(digest_size=16)
    try:
        for path in sorted(path for path in source.iterdir() if path.is_file()):
            content = path.read_bytes()
            digest.update(repr((path.name, len(content))).encode())
            digest.update(content)
    except OSError as error:
        raise TransientError(f"{error.filename}: {error.strerror}") from error
    return replace(found, checkpoint=digest.hexdigest())


def written_anew(found: Manifest) -> bool:
    """Whether a bundled checkpoint's files have other times than when it was read. Looks at no other's files."""
    home = found.files[0].path.parent
    if home.name not in tasks.NAMES or home != tasks.checkpoint_dir(home.name).resolve():
        return False
    try:
        return any(file.path.stat().st_mtime_ns != file.mtime_ns for file in found.files)
    except OSError:  # nothing is there just now, and perhaps nothing of it is needed
        return False
