"""An agent's log: written by it, its forkserver and its workers through one descriptor, and so cut in place."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from serverless_llm.node.options import AgentOptions

LIMIT = 16 << 20  # bytes of a log, and about as many of the one before it; arbitrary


def log_path(options: AgentOptions) -> Path:
    return Path(options.state_dir) / "logs" / f"agent-{options.node}.log"


def cut(path: Path) -> None:
    """Moves what a log over the limit holds to `<path>.1`, in place of what was there.

    Its writers append (O_APPEND) and so go on from its new beginning. What they write while it is copied is lost, as
    is all of it when the disk is full. Left as it is where it cannot be reached: the log of an agent that was started
    by hand, a disk that fails.
    """
    with contextlib.suppress(OSError):
        if path.stat().st_size > LIMIT:
            with contextlib.suppress(OSError):
                shutil.copyfile(path, path.with_name(f"{path.name}.1"))
            os.truncate(path, 0)
