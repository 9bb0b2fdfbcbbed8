"""Models that failed at the start, and are looked at again: what they lie on is mounted later, or never."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from serverless_llm.cli.make_checkpoint import make_checkpoint
from serverless_llm.domain import ModelSpec
from serverless_llm.loader import disk_tier
from serverless_llm.node import head
from serverless_llm.node.state import Deployed, State
from tests.unit.node.desk import Desk, on_a_desk


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "LOOK_AGAIN", 0.01)


def kept(directory: Path, **sources: Path) -> Path:
    """A state directory with these models deployed."""
    state = State(directory / "state")
    for name, source in sources.items():
        state.save(Deployed(ModelSpec(name, str(source)), created=1))
    state.close()
    return directory / "state"


@asynccontextmanager
async def running(desk: Desk) -> AsyncIterator[None]:
    work = asyncio.create_task(desk.head.run())
    try:
        yield
        assert not work.done()
    finally:
        work.cancel()
        await asyncio.wait([work])


async def shown(desk: Desk, name: str, **wanted: Any) -> None:
    """Until `show` says so."""
    async with asyncio.timeout(20):
        while not wanted.items() <= (await desk.ask("show", name))[1].items():
            await asyncio.sleep(0.01)


def test_a_model_whose_directory_is_mounted_after_the_start_is_served(tmp_path: Path) -> None:
    mounted, unmounted = tmp_path / "mounted", tmp_path / "unmounted"
    make_checkpoint("tiny-llama", unmounted, dtype="float32")

    async def tell(desk: Desk) -> None:
        async with running(desk):
            await shown(desk, "m", state="failed")
            unmounted.rename(mounted)
            await shown(desk, "m", state="unloaded")
            assert desk.catalogs[-1].models[0].state == "unloaded"
        assert (await desk.ask("load", "m"))[0] == 200

    on_a_desk(kept(tmp_path, m=mounted), tell)


def test_a_model_whose_configuration_names_another_directory_is_never_served_from_the_former(
    tmp_path: Path, checkpoint: Path
) -> None:
    later, mounted = tmp_path / "later", tmp_path / "mounted"
    make_checkpoint("tiny-llama", later, dtype="float32")
    state = kept(tmp_path, m=checkpoint)

    async def tell(desk: Desk) -> None:
        async with running(desk):
            await shown(desk, "m", state="failed")
            status, body = await desk.ask("load", "m")
            assert (status, body["error"]["code"]) == (503, "model_load_failed")
            assert str(mounted) in body["error"]["message"]
            later.rename(mounted)
            await shown(desk, "m", state="unloaded", source=str(mounted))
        (saved,) = desk.kept.models()
        assert saved == Deployed(ModelSpec("m", str(mounted), keep_alive=120.0), created=1)

    on_a_desk(state, tell, wanted={"m": json.dumps({"source": str(mounted)}).encode()})


def test_why_a_model_fails_is_what_the_last_look_found(
    tmp_path: Path, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gone = tmp_path / "gone"

    async def tell(desk: Desk) -> None:
        async with running(desk):
            await shown(desk, "m", state="failed")
            first = (await desk.ask("show", "m"))[1]["error"]
            gone.mkdir()
            async with asyncio.timeout(20):
                while desk.catalogs[-1].models[0].error == first:
                    await asyncio.sleep(0.01)
        assert "neither model.safetensors nor" in desk.catalogs[-1].models[0].error

    on_a_desk(kept(tmp_path, m=gone), tell)
    assert len(caplog.records) == 2  # one for each cause


def test_a_mount_that_does_not_answer_is_asked_once_and_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint("tiny-llama", tmp_path / "later", dtype="float32")
    back, asked = threading.Event(), threading.Event()
    hung: list[Path] = []
    exists = os.path.exists

    def hang(path: Any) -> bool:
        if path == str(tmp_path / "hung"):
            hung.append(path)
            asked.set()
            back.wait(60)
        return exists(path)

    monkeypatch.setattr(os.path, "exists", hang)

    async def tell(desk: Desk) -> None:
        async with running(desk):
            await asyncio.to_thread(asked.wait, 20)
            (tmp_path / "later").rename(tmp_path / "mounted")
            await shown(desk, "m", state="unloaded")
            assert len(hung) == 1

    try:
        on_a_desk(kept(tmp_path, hung=tmp_path / "hung", m=tmp_path / "mounted"), tell)
    finally:
        back.set()


def test_what_nobody_thought_of_ends_neither_the_server_nor_the_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint("tiny-llama", tmp_path / "later", dtype="float32")
    faults = [ValueError("nobody thought of that")]

    def hold(path: Path) -> None:
        if faults:
            raise faults.pop()

    monkeypatch.setattr(disk_tier, "hold", hold)

    async def tell(desk: Desk) -> None:
        async with running(desk):
            (tmp_path / "later").rename(tmp_path / "mounted")
            await shown(desk, "m", state="unloaded")
        assert not faults

    on_a_desk(kept(tmp_path, m=tmp_path / "mounted"), tell)
