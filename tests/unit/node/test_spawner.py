"""The spawner with forkservers that do not start."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from serverless_llm.node import spawner as spawners
from serverless_llm.node.spawner import Spawner


def none(*_: int) -> None:
    raise AssertionError("there is no worker")


@pytest.mark.slow
def test_a_forkserver_that_never_gets_ready_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one hangs, the second one dies, the third one is well."""
    python, tries = tmp_path / "python", tmp_path / "tries"
    hang, die = (
        f"[ -e {tries}1 ] || {{ : > {tries}1; exec sleep 100; }}",
        f"[ -e {tries}2 ] || {{ : > {tries}2; exit 3; }}",
    )
    python.write_text(f'#!/bin/sh\n{hang}\n{die}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(spawners, "READY_LIMIT", 1.0)
    monkeypatch.setattr(spawners, "BACK_OFF", 0.01)

    async def tell() -> None:
        ready = asyncio.Event()
        causes: list[str] = []

        def lost(cause: str) -> None:
            causes.append(cause)
            monkeypatch.setattr(spawners, "READY_LIMIT", 60.0)

        spawner = Spawner(ready.set, none, none, lost, "n0")
        spawner.start()
        async with asyncio.timeout(60):
            await ready.wait()
        assert causes == ["the forkserver was not ready within 1 s", "the forkserver exited with 3"]
        spawner.stop()

    asyncio.run(tell())


def test_each_failure_doubles_the_pause_up_to_a_limit() -> None:
    assert [spawners.pause(failures) for failures in (0, 1, 2, 3, 50)] == [0.0, 1.0, 2.0, 4.0, 30.0]
