"""How an agent reads headers."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import pytest

from serverless_llm.cli.make_checkpoint import make_checkpoint
from serverless_llm.demo import tasks
from serverless_llm.domain import ModelSpec
from serverless_llm.errors import CheckpointError, TransientError
from serverless_llm.node import identity, manifests
from serverless_llm.node.admin import footprint
from serverless_llm.node.manifests import Manifests
from tests.dead_mount import dead
from tests.unit.node.test_state import unprivileged


@pytest.fixture
def bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundled checkpoint, as where the package is installed."""
    source = tmp_path / "demo-add"
    shutil.copytree(tasks.checkpoint_dir("demo-add"), source)
    monkeypatch.setattr(tasks, "__file__", str(tmp_path / "tasks.py"))
    return source


def test_a_reading_that_does_not_return_is_shared_for_a_while_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount may be back, and a thread still wait for what it asked before."""
    source = tmp_path / "tiny"
    make_checkpoint("tiny-llama", source, dtype="float32")

    async def tell() -> None:
        made = Manifests()
        with dead(source / "config.json"):
            first = made._read(str(source), "it")
            assert made._read(str(source), "it") is first
            assert made._read(str(source), "another") is not first
            monkeypatch.setattr(manifests, "SHARED_S", 0.0)
            second = made._read(str(source), "it")
            assert second is not first
        async with asyncio.timeout(30):
            assert (await second).checkpoint == (await first).checkpoint
            while made._reading:
                await asyncio.sleep(0)

    asyncio.run(tell())


def test_a_bundled_checkpoint_is_its_bytes_and_not_their_time(bundled: Path) -> None:
    """Installing the package again writes the same files anew, under a server that runs."""
    deployed = footprint(ModelSpec("m", str(bundled))).checkpoint
    for path in bundled.iterdir():
        os.utime(path, ns=(0, 0))
    assert asyncio.run(Manifests().of(str(bundled), deployed, {})).files[0].mtime_ns == 0
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        written = (bundled / name).read_bytes()
        (bundled / name).write_bytes(written[:-1] + bytes([written[-1] ^ 1 if name == "model.safetensors" else 32]))
        os.utime(bundled / name, ns=(0, 0))
        with pytest.raises(CheckpointError, match="was changed after it was deployed"):
            asyncio.run(Manifests().of(str(bundled), deployed, {}))
        (bundled / name).write_bytes(written)
    assert asyncio.run(Manifests().of(str(bundled), deployed, {})).checkpoint == deployed


def test_a_bundled_checkpoint_that_is_here_is_read_again_once_it_is_written_anew(bundled: Path) -> None:
    """What of it is not in DRAM is read from files whose times are compared."""

    async def tell() -> None:
        made, deployed = Manifests(), identity.read(bundled).checkpoint
        first = await made.of(str(bundled), deployed, {deployed})
        assert await made.of(str(bundled), deployed, {deployed}) is first
        os.utime(bundled / "model.safetensors", ns=(0, 0))
        second = await made.of(str(bundled), deployed, {deployed})
        assert second.files[0].mtime_ns == 0
        (bundled / "model.safetensors").unlink()
        assert await made.of(str(bundled), deployed, {deployed}) is second

    asyncio.run(tell())


def test_a_bundled_checkpoint_that_cannot_be_read_is_worth_another_try(tmp_path: Path, bundled: Path) -> None:
    with unprivileged(tmp_path):
        (bundled / "tokenizer.json").chmod(0o000)
        with pytest.raises(TransientError, match=r"demo-add/tokenizer\.json: Permission denied$"):
            identity.read(bundled)
        (bundled / "tokenizer.json").chmod(0o600)


def test_a_directory_that_is_gone_is_told_with_what_to_do(tmp_path: Path) -> None:
    source = tmp_path / "gone"
    with pytest.raises(TransientError) as told:
        asyncio.run(Manifests().of(str(source), "it", {}))
    assert str(told.value) == f"{source}: No such file or directory; mend that, and it is served again within a minute"


def test_any_other_checkpoint_is_another_with_another_time(tmp_path: Path) -> None:
    source = tmp_path / "demo-add"
    shutil.copytree(tasks.checkpoint_dir("demo-add"), source)
    deployed = footprint(ModelSpec("m", str(source))).checkpoint
    assert asyncio.run(Manifests().of(str(source), deployed, {})).checkpoint == deployed
    os.utime(source / "model.safetensors", ns=(0, 0))
    with pytest.raises(CheckpointError, match="was changed after it was deployed: deploy it again"):
        asyncio.run(Manifests().of(str(source), deployed, {}))
