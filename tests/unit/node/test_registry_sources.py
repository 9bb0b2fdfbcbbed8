"""Deployed models whose sources do not answer, or whose text files cannot be used."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

import pytest

from serverless_llm.cli.make_checkpoint import make_checkpoint
from serverless_llm.domain import ModelSpec
from serverless_llm.errors import RequestError
from serverless_llm.node import registry
from serverless_llm.node.state import Deployed, State
from tests.dead_mount import dead
from tests.unit.node.desk import Desk, on_a_desk


@pytest.mark.parametrize("configured", [False, True])
def test_a_dead_mount_fails_its_models_alone_until_it_is_back(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, configured: bool
) -> None:
    monkeypatch.setattr(registry, "READ_LIMIT", 3.0)
    make_checkpoint("tiny-llama", tmp_path / "hung", dtype="float32")
    sources = {"hung": tmp_path / "hung", "good": checkpoint}
    bodies = {name: json.dumps({"source": str(source)}).encode() for name, source in sources.items()}

    async def whole() -> None:
        desk = Desk(tmp_path / "state")
        for name, source in sources.items():
            desk.kept.save(Deployed(ModelSpec(name, str(source)), created=1))
        with dead(tmp_path / "hung" / "config.json"):
            await asyncio.wait_for(desk.head.restore(bodies if configured else {}), 9)
            models = {one["name"]: one for one in (await desk.ask("status"))[1]["models"]}
            assert (models["hung"]["state"], models["good"]["state"]) == ("failed", "unloaded")
            assert models["hung"]["error"] == f"{sources['hung']} did not answer within 3 s"
            monkeypatch.setattr(registry, "READ_LIMIT", 120.0)
            loading = [asyncio.create_task(desk.ask("load", "hung")) for _ in range(2)]
            await asyncio.sleep(0)  # both are asked
            async with asyncio.timeout(60):  # nobody waits for the look of another
                assert (await desk.ask("pin", "good"))[0] == 200
                assert not configured or (await desk.ask("deploy", "hung", bodies["good"]))[0] == 200
        assert [status for status, _ in await asyncio.gather(*loading)] == [200, 200]
        assert (await desk.ask("show", "hung"))[1]["source"] == str(sources["good" if configured else "hung"])
        desk.kept.close()

    asyncio.run(whole())


def test_a_kept_model_whose_text_files_cannot_be_used_any_more_fails_until_they_can(
    tmp_path: Path, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A look that fails once is no sign: the machine may be busy."""
    kept = State(tmp_path)
    for name in ("bad", "busy", "good", "gone", "odd"):
        kept.save(Deployed(ModelSpec(name, str(checkpoint)), created=1))
    kept.close()
    faults = {"bad": registry.LOOKS, "busy": 1, "gone": registry.LOOKS}
    looks: list[str] = []

    async def check(name: str, source: str, checkpoint: str) -> bool:
        looks.append(name)
        if name == "odd":
            raise ValueError("nobody thought of that")
        faults[name] = faults.get(name, 0) - 1
        if faults[name] >= 0:
            raise RequestError(400, "invalid_checkpoint", f"{name} has no tokenizer.json", "source")
        return True

    async def tell(desk: Desk) -> None:
        assert looks == []  # none before the server listens
        assert (await desk.ask("delete", "gone"))[0] == 200
        await desk.head.registry.look()
        models = {one["name"]: one for one in (await desk.ask("status"))[1]["models"]}
        assert {name: one["state"] for name, one in models.items()} == {
            "bad": "failed", "busy": "unloaded", "good": "unloaded", "odd": "unloaded"
        }  # fmt: skip
        assert models["bad"]["error"] == "bad has no tokenizer.json"
        assert "bad" not in desk.head.controller.machine.state.models
        assert sorted(looks) == [*["bad"] * registry.LOOKS, "busy", "busy", "good", "odd"]
        faults["bad"] = registry.LOOKS
        assert (await desk.ask("load", "bad"))[0] == 503
        assert (await desk.ask("load", "bad"))[0] == 200  # mended

    on_a_desk(tmp_path, tell, check=check)
    said = [one.message for one in caplog.records]
    assert said[0] == "the text files of odd"
    assert said[1].startswith("bad cannot be served: bad has no tokenizer.json")


def test_a_look_at_a_model_that_is_deployed_anew_meanwhile_does_not_fail_it(tmp_path: Path, checkpoint: Path) -> None:
    kept = State(tmp_path)
    kept.save(Deployed(ModelSpec("m", str(checkpoint)), created=1))
    kept.close()
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def check(name: str, source: str, checkpoint: str) -> bool:
        if not begun.is_set():
            begun.set()
            await go_on.wait()
        if not deployed:
            raise RequestError(400, "invalid_checkpoint", "no tokenizer.json", "source")
        return True

    deployed: list[int] = []

    async def tell(desk: Desk) -> None:
        look = asyncio.create_task(desk.head.registry.look())
        await begun.wait()
        deployed.append(1)
        assert (await desk.ask("deploy", "m", source=str(checkpoint)))[0] == 200
        deployed.clear()
        go_on.set()
        await look
        assert (await desk.ask("show", "m"))[1]["state"] == "unloaded"

    on_a_desk(tmp_path, tell, check=check)


def test_dead_mounts_of_configured_models_are_waited_for_together(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "READ_LIMIT", 3.0)
    make_checkpoint("tiny-llama", tmp_path / "hung", dtype="float32")
    names = [f"hung{number}" for number in range(8)]
    body = json.dumps({"source": str(tmp_path / "hung")}).encode()

    async def whole() -> None:
        desk = Desk(tmp_path / "state")
        for name in names:
            desk.kept.save(Deployed(ModelSpec(name, str(tmp_path / "hung")), created=1))
        with dead(tmp_path / "hung" / "config.json"):
            await asyncio.wait_for(desk.head.restore(dict.fromkeys(names, body)), 12)
        models = (await desk.ask("status"))[1]["models"]
        assert [one["state"] for one in models] == ["failed"] * 8
        desk.kept.close()

    asyncio.run(whole())


def test_a_deploy_from_a_dead_mount_is_told_and_holds_nobody_up(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even to resolve its links, which asks the mount."""
    monkeypatch.setattr(registry, "DEPLOY_LIMIT", 3.0)
    back = threading.Event()
    resolve = Path.resolve

    def hang(path: Path, strict: bool = False) -> Path:
        if path.name == "hung":
            back.wait(30)
        return resolve(path, strict)

    monkeypatch.setattr(Path, "resolve", hang)

    async def tell(desk: Desk) -> None:
        hung = asyncio.ensure_future(desk.ask("deploy", "hung", source="/mnt/hung"))
        assert (await desk.ask("deploy", "good", source=str(checkpoint)))[0] == 200
        status, body = await hung
        assert (status, body["error"]["message"]) == (400, "/mnt/hung did not answer within 3 s")

    try:
        on_a_desk(tmp_path / "state", tell)
    finally:
        back.set()


def test_a_deploy_tells_of_its_text_files_or_changes_nothing(tmp_path: Path, checkpoint: Path) -> None:
    checked: list[tuple[str, str]] = []

    async def check(name: str, source: str, checkpoint: str) -> bool:
        assert checkpoint
        checked.append((name, source))
        if name == "bad":
            raise RequestError(400, "invalid_checkpoint", "no tokenizer.json", "source")
        return name != "mute"

    async def tell(desk: Desk) -> None:
        assert (await desk.ask("deploy", "good", source=str(checkpoint)))[1]["chat"]
        status, body = await desk.ask("deploy", "bad", source=str(checkpoint))
        assert (status, body["error"]["message"]) == (400, "no tokenizer.json")
        assert (await desk.ask("show", "bad"))[0] == 404
        assert not (await desk.ask("deploy", "mute", source=str(checkpoint)))[1]["chat"]
        assert checked == [(name, str(checkpoint)) for name in ("good", "bad", "mute")]

    on_a_desk(tmp_path, tell, check=check)
