"""File -> a CUDA device's memory, past the host's: GPUDirect Storage, through kvikio (the extra `gds`)."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch

from serverless_llm.errors import ConfigurationError, TransientError
from serverless_llm.extras import extra
from serverless_llm.loader.reader import THREADS
from serverless_llm.loader.source import SourceFile


@functools.cache  # a number of threads, once set, starts them anew
def kvikio() -> Any:
    """The package, with as many threads as our own reader has, unless the environment says how many.

    Raises:
        ConfigurationError: it is not installed, or libraries that it loads are not.
    """
    try:
        module = extra("gds", "kvikio", "files that a GPU reads by itself", "defaults")
    except (OSError, RuntimeError) as error:
        raise ConfigurationError(f"kvikio cannot be used: {error}") from error
    if "KVIKIO_NTHREADS" not in os.environ:
        module.defaults.set("num_threads", THREADS)
    return module


def read(file: SourceFile, start: int, stop: int, device: torch.device) -> torch.Tensor:
    """Bytes of a file in fresh memory of a CUDA device: uint8 of shape (stop - start,).

    Where the system has no GPUDirect Storage, kvikio takes its own way through the host's memory.

    Raises:
        ConfigurationError: as of `kvikio`.
        TransientError: the bytes cannot be read.
        CheckpointError: the file is not the one that was validated.
    """
    library = kvikio()
    content = torch.empty(stop - start, dtype=torch.uint8, device=device)
    torch.cuda.current_stream(device).synchronize()  # kernels of whoever had this memory before
    file.open().close()  # is it that file, before the read and after?
    try:
        with library.CuFile(file.path) as handle:
            count = handle.read(content, stop - start, start)
    except (OSError, RuntimeError) as error:
        raise TransientError(f"{file.path}, bytes {start} to {stop}: {error}") from error
    file.open().close()
    if count != stop - start:
        raise TransientError(f"{file.path}, bytes {start} to {stop}: {count} came")
    return content
