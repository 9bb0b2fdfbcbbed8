"""What came from a server, held against what was promised: names, digests, headers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from serverless_llm.errors import CheckpointError, TransientError
from serverless_llm.loader import manifest
from serverless_llm.loader.remote import Remote, RemoteFile


def check_names(source: Remote, files: Sequence[RemoteFile], needed: Sequence[str]) -> None:
    """
    Raises:
        CheckpointError: one of the names that are needed is none of a file.
    """
    there = {file.name for file in files}
    for name in needed:
        if name not in there:
            raise CheckpointError(f"{source.url} has no {name}")


def check(source: Remote, files: Sequence[RemoteFile], checkpoint: Path) -> None:
    """
    Raises:
        CheckpointError: a digest is not the one that the server knows, or as `check_headers`.
        TransientError: the server or the disk does not tell.
    """
    for file in files:
        known = source.digest(file)
        if known is None:
            continue
        algorithm, wanted = known
        with (checkpoint / file.name).open("rb") as opened:
            if hashlib.file_digest(opened, algorithm).hexdigest() != wanted:
                raise CheckpointError(f"{source.url}/{file.name}: what came has another {algorithm} than {wanted}")
    check_headers(source, checkpoint)


def check_headers(source: Remote, checkpoint: Path) -> None:
    """
    Raises:
        CheckpointError: names the URL and what is wrong.
        TransientError: the disk does not tell.
    """
    try:
        manifest.weights(checkpoint)
    except TransientError:
        raise
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(checkpoint), source.url)) from error
