"""Reads that fail as those of a dying disk do: the system's `preadv` in other processes, with a fault before it."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


class FaultyReads:
    """A fault for processes that are started through `command`; there is none at first."""

    def __init__(self, directory: Path) -> None:
        self._told = directory / "fault"
        self.command: list[str] = []
        compiler = shutil.which("cc")
        if compiler is not None:
            library = directory / "faulty_reads.so"
            source = Path(__file__).with_suffix(".c")
            subprocess.run([compiler, "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, source], check=True)
            self.command = ["env", f"LD_PRELOAD={library}", f"READ_FAULTS={self._told}"]

    def tell(self, kind: str, value: int | Path) -> None:
        """As in `faulty_reads.c`, from the next read on. Skips the test where there is no C compiler."""
        if not self.command:
            pytest.skip("there is no C compiler")
        other = self._told.with_suffix(".new")
        other.write_text(f"{kind} {value}")
        other.replace(self._told)

    @contextlib.contextmanager
    def held(self, path: Path) -> Iterator[None]:
        """Meanwhile a load that needs this file does not end."""
        self.tell("hold", path.resolve())
        try:
            yield
        finally:
            self.mend()

    def mend(self) -> None:
        self._told.unlink(missing_ok=True)
