"""On the PYTHONPATH of a server: its wall clock is off by what the file `WALL_CLOCK_STEP` says, in seconds."""

import os
import pathlib
import time

_true = time.time


def _stepped() -> float:
    try:
        return _true() + float(pathlib.Path(os.environ["WALL_CLOCK_STEP"]).read_text())
    except (OSError, ValueError):
        return _true()


if "WALL_CLOCK_STEP" in os.environ:
    time.time = _stepped
