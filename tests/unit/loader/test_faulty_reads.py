"""Disks that read less than they were asked for, or nothing: real calls that fail, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faulty_reads import FaultyReads

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[3]


def read(tmp_path: Path, kind: str, *numbers: int) -> None:
    path, faulty = tmp_path / "file", FaultyReads(tmp_path)
    path.write_bytes(os.urandom(3 << 19))
    for number in numbers:
        faulty.tell(kind, number)
        command = [*faulty.command, sys.executable, "-m", "tests.unit.loader.reading_faults", str(path), kind]
        environ = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_calls_that_return_less_are_gone_on_with(tmp_path: Path) -> None:
    read(tmp_path, "short", 100_001, 3_000)


def test_bytes_that_cannot_be_read_are_named_and_may_be_readable_later(tmp_path: Path) -> None:
    read(tmp_path, "eio", 0, 1 << 20)
