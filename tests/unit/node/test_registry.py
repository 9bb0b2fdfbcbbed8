"""Deployed models: what operators ask, what survives a restart, what gateways are shown."""

from __future__ import annotations

import asyncio
import fcntl
import json
import math
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest

from serverless_llm.cli.make_checkpoint import make_checkpoint
from serverless_llm.cluster import events
from serverless_llm.domain import DeviceId, DeviceSpec, ModelSpec, NodeSpec
from serverless_llm.errors import RequestError
from serverless_llm.loader import disk_tier, leases, manifest
from serverless_llm.node import admin
from serverless_llm.node.state import Deployed, State
from serverless_llm.surroundings import began
from tests.unit.node.desk import Desk, on_a_desk


@pytest.fixture
def version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> Path:
    """A checkpoint in the disk tier."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = disk_tier.tier().home("s3://bucket/m") / "version"
    shutil.copytree(checkpoint, place / manifest.CHECKPOINT)
    (place / disk_tier.URL).write_text("s3://bucket/m")
    return place


def test_the_life_of_a_deployed_model(tmp_path: Path, checkpoint: Path) -> None:
    async def tell(desk: Desk) -> None:
        status, row = await desk.ask("deploy", "org/tiny", source=str(checkpoint), keep_alive="5m", context=100)
        assert status == 200
        assert (row["name"], row["state"], row["keep_alive"], row["context"]) == ("org/tiny", "unloaded", 300.0, 100)
        assert row["estimate_s"] is None
        assert row.pop("chat")  # nobody looked
        assert not row.pop("configured")
        assert row["bytes"] == (checkpoint / "model.safetensors").stat().st_size
        assert desk.catalogs[-1].models[0].name == "org/tiny"
        assert not desk.catalogs[-1].ready
        assert await desk.ask("show", "org/tiny") == (200, row)
        assert (await desk.ask("pin", "org/tiny"))[1]["pinned"]
        assert not (await desk.ask("pin", "org/tiny", pinned=False))[1]["pinned"]
        assert (await desk.ask("load", "org/tiny"))[0] == 200
        assert (await desk.ask("unload", "org/tiny"))[0] == 200
        status, shown = await desk.ask("status")
        assert [one["name"] for one in shown["models"]] == ["org/tiny"]
        assert (shown["nodes"], shown["problems"]) == ([], ["no node has joined"])
        assert os.path.realpath(shown["disk_tier"]) == str(disk_tier.tier().root)
        assert await desk.ask("nodes") == (200, {"nodes": []})
        status, body = await desk.ask("drain", "node0")
        assert (status, body["error"]["message"]) == (404, "no node 'node0' has joined")
        _, body = await desk.ask("load", "org/tini")
        assert body["error"]["message"] == "no model 'org/tini' is deployed; did you mean 'org/tiny'?"
        assert await desk.ask("delete", "org/tiny") == (
            200,
            {"name": "org/tiny", "deleted": True, "configured": False},
        )
        assert desk.catalogs[-1].models == []
        for verb in ("show", "delete", "load", "unload", "pin"):
            status, body = await desk.ask(verb, "org/tiny")
            assert (status, body["error"]["code"]) == (404, "model_not_found")
        assert [one["event"] for one in desk.news] == ["deployed", "pinned", "pinned", "deleted"]
        assert all(one["model"] == "org/tiny" and one["time"] > 1.7e9 for one in desk.news)

    on_a_desk(tmp_path, tell)


def test_with_every_node_drained_the_server_is_not_ready(tmp_path: Path) -> None:
    async def tell(desk: Desk) -> None:
        async def published(ready: bool) -> list[str]:
            async with asyncio.timeout(5):
                while not desk.catalogs or desk.catalogs[-1].ready != ready:
                    await asyncio.sleep(0)
            return desk.catalogs[-1].problems

        node = NodeSpec("n0", 1, (DeviceSpec(0, "cpu", 1, "view"),))
        desk.head.controller.handle(events.NodeJoined(node, ((DeviceId("n0", 0), 1),), (), ()))
        assert await published(ready=True) == []
        desk.head.controller.handle(events.Drain("n0", True))
        undo = 'POST /admin/nodes/n0/drain {"drained": false}'
        assert await published(ready=False) == [f"n0/0 is drained ({undo} takes it back)"]
        desk.head.controller.handle(events.Drain("n0", False))
        assert await published(ready=True) == []

    on_a_desk(tmp_path, tell)


def test_deploys_are_kept_and_what_broke_meanwhile_is_shown(
    tmp_path: Path, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "copy"
    make_checkpoint("tiny-llama", copy, dtype="float32")

    async def first(desk: Desk) -> None:
        await desk.ask("deploy", "a", source=str(checkpoint), keep_alive=-1)
        await desk.ask("deploy", "b", source=str(copy))
        await desk.ask("pin", "a")

    async def second(desk: Desk) -> None:
        _, shown = await desk.ask("status")
        models = {one["name"]: one for one in shown["models"]}
        assert (models["a"]["keep_alive"], models["a"]["pinned"]) == (None, True)
        assert (models["b"]["state"], models["b"]["keep_alive"]) == ("failed", 120.0)
        assert "model.safetensors" in models["b"]["error"]
        status, body = await desk.ask("load", "b")
        assert (status, body["error"]["code"]) == (503, "model_load_failed")
        (failed,) = [one for one in desk.news if one["event"] == "model_failed"]
        assert (failed["model"], failed["error"]) == ("b", models["b"]["error"])
        assert (await desk.ask("delete", "b"))[0] == 200

    on_a_desk(tmp_path / "state", first)
    (copy / "model.safetensors").unlink()
    on_a_desk(tmp_path / "state", second)
    (said,) = caplog.records  # one line for the operator, though its load found the same
    assert said.exc_info is None
    assert said.message.startswith("b cannot be served: ")
    assert str(copy) in said.message
    assert said.message.endswith("serverless-llm rm b")


def test_what_the_disk_does_not_take_is_not_done(tmp_path: Path, checkpoint: Path) -> None:
    async def tell(desk: Desk) -> None:
        await desk.ask("deploy", "a", source=str(checkpoint))
        desk.kept._database.execute("PRAGMA query_only = ON")  # as a disk that went read-only
        deploy = json.dumps({"source": str(checkpoint)}).encode()
        for verb, name, raw in (("deploy", "b", deploy), ("pin", "a", b"{}"), ("delete", "a", b"{}")):
            status, answer = await desk.ask(verb, name, raw)
            assert (status, answer["error"]["code"]) == (503, "overloaded")
            assert "cannot be written" in answer["error"]["message"]
        desk.kept._database.execute("PRAGMA query_only = OFF")
        (row,) = (await desk.ask("status"))[1]["models"]
        assert (row["name"], row["pinned"]) == ("a", False)

    on_a_desk(tmp_path, tell)


def test_a_disk_that_is_full_takes_no_deploy(tmp_path: Path, checkpoint: Path) -> None:
    async def tell(desk: Desk) -> None:
        (pages,) = desk.kept._database.execute("PRAGMA page_count").fetchone()
        desk.kept._database.execute(f"PRAGMA max_page_count = {pages}")
        status, answer = await desk.ask("deploy", "a" * 10_000, source=str(checkpoint))
        assert (status, answer["error"]["code"]) == (503, "overloaded")
        assert "database or disk is full" in answer["error"]["message"]
        assert (await desk.ask("status"))[1]["models"] == []

    on_a_desk(tmp_path, tell)


def test_what_cannot_be_kept_on_the_disk_tier_is_not_deployed(tmp_path: Path, checkpoint: Path, version: Path) -> None:
    kept = version / manifest.CHECKPOINT
    (version / leases.LOCK).mkdir()  # no descriptor of it can be had

    async def tell(desk: Desk) -> None:
        assert (await desk.ask("deploy", "m", source=str(checkpoint)))[0] == 200
        status, answer = await desk.ask("deploy", "m", source=str(kept))
        assert (status, answer["error"]["code"]) == (503, "overloaded")
        assert answer["error"]["message"] == f"{kept} cannot be kept on the disk tier: Is a directory"
        assert [model.spec.source for model in desk.kept.models()] == [str(checkpoint)]
        assert (await desk.ask("deploy", "n", source=str(kept)))[0] == 503
        assert [model.spec.name for model in desk.kept.models()] == ["m"]

    on_a_desk(tmp_path / "state", tell)


def test_a_start_that_cannot_keep_a_model_on_the_disk_tier_serves_the_others(
    tmp_path: Path, checkpoint: Path, version: Path
) -> None:
    kept = version / manifest.CHECKPOINT
    why = f"{kept} cannot be kept on the disk tier: Is a directory"

    async def first(desk: Desk) -> None:
        for name, source in (("a", checkpoint), ("b", kept), ("c", kept)):
            assert (await desk.ask("deploy", name, source=str(source)))[0] == 200

    async def second(desk: Desk) -> None:
        models = {one["name"]: one for one in (await desk.ask("status"))[1]["models"]}
        assert {name: one["error"] for name, one in models.items()} == {"a": "", "b": why, "c": why}
        assert desk.head.controller.machine.state.models.keys() == {"a"}
        for _ in range(2):
            status, body = await desk.ask("load", "b")
            assert (status, body["error"]["message"]) == (503, f"{why}; it is tried again once a minute")
        (version / leases.LOCK).rmdir()
        assert (await desk.ask("load", "b"))[0] == 200
        assert desk.head.controller.machine.state.models.keys() == {"a", "b"}

    on_a_desk(tmp_path / "state", first)
    (version / leases.LOCK).unlink()
    (version / leases.LOCK).mkdir()
    on_a_desk(tmp_path / "state", second, wanted={"c": json.dumps({"source": str(kept)}).encode()})


def test_what_is_not_deployed_is_not_kept_on_the_disk_tier(tmp_path: Path, checkpoint: Path, version: Path) -> None:
    kept = version / manifest.CHECKPOINT

    def is_free() -> bool:
        lock = leases.lock_of(version, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if lock is not None:
            os.close(lock)
        return lock is not None

    async def tell(desk: Desk) -> None:
        (pages,) = desk.kept._database.execute("PRAGMA page_count").fetchone()
        desk.kept._database.execute(f"PRAGMA max_page_count = {pages}")
        assert (await desk.ask("deploy", "a" * 10_000, source=str(kept)))[0] == 503
        assert is_free()
        assert (await desk.ask("deploy", "m", source=str(kept)))[0] == 200
        assert not is_free()
        assert (await desk.ask("delete", "m"))[0] == 200
        assert is_free()

    on_a_desk(tmp_path / "state", tell)


BAD: list[tuple[str, dict[str, Any], int, str | None]] = [
    ("bad name", {}, 400, "name"),
    ("m", {"source": "relative"}, 400, "source"),
    ("m", {"source": "/nowhere"}, 400, "source"),
    ("m", {"dtype": "int8"}, 400, "dtype"),
    ("m", {"keep_alive": "soon"}, 400, "keep_alive"),
    ("m", {"keep_alive": -5}, 400, "keep_alive"),
    ("m", {"keep_alive": "-3m"}, 400, "keep_alive"),
    ("m", {"keep_alive": 1e300}, 400, "keep_alive"),
    ("m", {"keep_alive": 10**12}, 400, "keep_alive"),
    ("m", {"max_replicas": 0}, 400, "max_replicas"),
    ("m", {"max_concurrency": 0}, 400, "max_concurrency"),
    ("m", {"max_queue": -1}, 400, "max_queue"),
    ("m", {"min_replicas": 2}, 400, "min_replicas"),
    ("m", {"context": 0}, 400, "context"),
    ("m", {"context": 10**23}, 400, "context"),
    ("m", {"max_queue": 10**23}, 400, "max_queue"),
    ("m", {"source": "~no-such-user/x"}, 400, "source"),
    ("m", {"source": "/a\0b"}, 400, "source"),
    ("m", {"context": 1 << 20}, 400, "source"),
    ("m", {"colour": "red"}, 400, "colour"),
    ("m", {"x" * 1_000_000: 1}, 400, "x" * 99 + "…"),
    ("m", {"x\n": 1}, 400, "x\n"),
    ("m", {"context": "many"}, 400, "context"),
    ("m", {"verify": "some"}, 400, "verify"),
]


@pytest.mark.parametrize(("name", "change", "status", "param"), BAD)
def test_a_bad_deploy_is_refused_by_name(
    tmp_path: Path, checkpoint: Path, name: str, change: dict[str, Any], status: int, param: str | None
) -> None:
    async def tell(desk: Desk) -> None:
        given, body = await desk.ask("deploy", name, **({"source": str(checkpoint)} | change))
        assert (given, body["error"]["param"]) == (status, param)
        assert body["error"]["type"] == "invalid_request_error"
        assert len(body["error"]["message"]) < 500
        assert desk.kept.models() == []

    on_a_desk(tmp_path, tell)


def test_an_unexpected_error_is_answered(tmp_path: Path, checkpoint: Path) -> None:
    async def tell(desk: Desk) -> None:
        desk.kept._database.close()
        status, body = await desk.ask("deploy", "m", source=str(checkpoint))
        assert (status, body["error"]["code"], body["error"]["type"]) == (500, "engine_error", "server_error")
        assert (await desk.ask("status"))[0] == 200

    on_a_desk(tmp_path, tell)


def test_a_kept_model_that_breaks_unexpectedly_is_failed_alone(tmp_path: Path, checkpoint: Path) -> None:
    kept = State(tmp_path)
    for name, source in (("bad", "/a\0b"), ("good", str(checkpoint))):
        kept.save(Deployed(ModelSpec(name, source), created=1))
    kept.close()

    async def tell(desk: Desk) -> None:
        models = {one["name"]: one for one in (await desk.ask("status"))[1]["models"]}
        assert (models["bad"]["state"], models["good"]["state"]) == ("failed", "unloaded")
        assert "null byte" in models["bad"]["error"]

    on_a_desk(tmp_path, tell)


def test_sources_lie_inside_the_roots_links_resolved(tmp_path: Path, checkpoint: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "out").symlink_to(checkpoint)

    async def tell(desk: Desk) -> None:
        status, body = await desk.ask("deploy", "m", source=str(root / "out"))
        assert (status, body["error"]["code"]) == (403, "permission_denied")

    on_a_desk(tmp_path / "state", tell, roots=(root,))


def test_keep_alive_in_every_spelling() -> None:
    def parsed(value: object) -> float:
        body = json.dumps({"source": "/m", "keep_alive": value}).encode()
        return admin.spec_of("m", body, 120.0, ()).keep_alive

    assert [parsed(value) for value in ("90s", 7, 0, -1, None)] == [90.0, 7.0, 0.0, math.inf, 120.0]


def test_a_body_that_is_not_json_is_refused() -> None:
    with pytest.raises(RequestError) as refused:
        admin.parse(b"{", admin.PinBody)
    assert refused.value.status == 400


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"source": "/m", "contxt": 5}, "unknown field 'contxt'; did you mean 'context'?"),
        ({"source": "/m", "context": "many"}, "context: a whole number is needed, not text"),
        ({"source": "/m", "verify": "some"}, "verify: must be one of off, sample, full"),
        ({}, "Object missing required field `source`"),
        ([], "a mapping is needed, not a list"),
    ],
)
def test_a_refusal_says_what_would_do(body: object, message: str) -> None:
    with pytest.raises(RequestError) as refused:
        admin.parse(json.dumps(body).encode(), admin.DeployBody)
    assert refused.value.message == message


def test_what_is_deployed_from_the_disk_tier_stays_there(tmp_path: Path, checkpoint: Path, version: Path) -> None:

    def in_use() -> bool:
        with (version / "lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False

    async def deployed(desk: Desk) -> None:
        assert (await desk.ask("deploy", "m", source=str(version / "checkpoint")))[0] == 200
        assert in_use()
        assert (await desk.ask("deploy", "m", source=str(checkpoint)))[0] == 200
        assert not in_use()
        assert (await desk.ask("deploy", "m", source=str(version / "checkpoint")))[0] == 200
        assert (await desk.ask("delete", "m"))[0] == 200
        assert not in_use()
        desk.kept.save(Deployed(ModelSpec("m", str(version / "checkpoint")), 1))

    async def revived(desk: Desk) -> None:
        assert in_use()
        assert (await desk.ask("delete", "m"))[0] == 200
        assert not in_use()

    on_a_desk(tmp_path, deployed)
    on_a_desk(tmp_path, revived)


def test_a_models_url_is_kept_and_told_over_everything(tmp_path: Path, checkpoint: Path, version: Path) -> None:
    source = version / "checkpoint"
    state = tmp_path / "state"

    async def told(desk: Desk, url: str, place: Path = source) -> None:
        rows = [(await desk.ask("show", "m"))[1], (await desk.ask("status"))[1]["models"][0]]
        assert [(row["url"], row["source"]) for row in rows] == [(url, str(place))] * 2

    async def deployed(desk: Desk) -> None:
        for place, url in ((source, "s3://bucket/m"), (checkpoint, ""), (source, "s3://bucket/m")):
            assert (await desk.ask("deploy", "m", source=str(place)))[1]["url"] == url
            await told(desk, url, place)
        assert (await desk.ask("pin", "m", pinned=True))[0] == 200
        await told(desk, "s3://bucket/m")
        assert [one["url"] for one in desk.news if one["event"] == "deployed"] == ["s3://bucket/m", "", "s3://bucket/m"]

    async def kept(desk: Desk) -> None:
        await told(desk, "s3://bucket/m")

    body = json.dumps({"source": str(source)}).encode()
    on_a_desk(state, deployed)
    on_a_desk(state, kept)
    on_a_desk(state, kept, wanted={"m": body})

    async def gone(desk: Desk) -> None:
        error = (await desk.ask("show", "m"))[1]["error"]
        assert error.startswith("s3://bucket/m is not on the disk tier any more: deploy it again (")

    version.rename(tmp_path / "gone")
    on_a_desk(state, kept)
    on_a_desk(state, gone)
    on_a_desk(state, kept, wanted={"m": body})


def test_a_url_that_an_earlier_version_did_not_keep_is_found(tmp_path: Path, version: Path) -> None:
    old = State(tmp_path)
    spec = msgspec.msgpack.encode({"name": "m", "source": str(version / "checkpoint")})
    old._database.execute("INSERT INTO models VALUES ('m', ?, 1)", (spec,))
    old.close()

    async def tell(desk: Desk) -> None:
        assert (await desk.ask("show", "m"))[1]["url"] == "s3://bucket/m"

    on_a_desk(tmp_path, tell)


def test_the_head_publishes_where_it_listens(tmp_path: Path) -> None:
    async def tell(desk: Desk) -> None:
        desk.head.listening("http://127.0.0.1:8", "http://127.0.0.1:9", "https://127.0.0.1:8000")
        kept = json.loads((tmp_path / "head.json").read_bytes())
        agents, public = kept.pop("agents"), kept.pop("public")
        assert kept == {"url": "http://127.0.0.1:9", "generation": 1, "pid": os.getpid(), "began": began(os.getpid())}
        assert (agents, public) == ("http://127.0.0.1:8", "https://127.0.0.1:8000")
        assert stat.S_IMODE((tmp_path / "agent-token").stat().st_mode) == 0o600

    on_a_desk(tmp_path, tell)


def test_a_configured_model_that_breaks_fails_alone_but_a_new_one_is_refused_by_name(tmp_path: Path) -> None:
    make_checkpoint("tiny-llama", tmp_path / "tiny", dtype="float32")
    wanted = {"tiny": json.dumps({"source": str(tmp_path / "tiny")}).encode()}
    state = tmp_path / "state"

    async def restored(desk: Desk) -> None:
        await desk.head.restore(wanted)
        assert [model.state for model in desk.catalogs[-1].models] == ["unloaded"]

    async def removed(desk: Desk) -> None:
        await desk.head.restore(wanted)
        assert (await desk.ask("deploy", "tiny", source=str(tmp_path / "tiny"), context=100))[1]["configured"]
        assert (await desk.ask("delete", "tiny"))[1]["configured"]

    async def back(desk: Desk) -> None:
        await desk.head.restore(wanted)
        (model,) = desk.catalogs[-1].models
        assert model.context != 100

    async def broken(desk: Desk) -> None:
        await desk.head.restore(wanted)
        (model,) = desk.catalogs[-1].models
        assert model.state == "failed"
        assert "model.safetensors" in model.error
        with pytest.raises(RequestError, match=r"other: .*model\.safetensors"):
            await desk.head.restore({"other": wanted["tiny"]})

    on_a_desk(state, restored)
    on_a_desk(state, removed)
    on_a_desk(state, back)
    (tmp_path / "tiny" / "model.safetensors").write_bytes(b"cut")
    on_a_desk(state, broken)


def test_a_deploy_that_cannot_be_served_names_its_directory(tmp_path: Path, checkpoint: Path) -> None:
    """Once, also where the fault lies in a file that is named already."""
    source = tmp_path / "own"
    shutil.copytree(checkpoint, source)

    async def refused() -> str:
        desk = Desk(tmp_path / "state")
        status, answer = await desk.ask("deploy", "own", source=str(source))
        desk.kept.close()
        assert status == 400
        return str(answer["error"]["message"])

    (source / "config.json").write_text("{")
    assert asyncio.run(refused()).startswith(f"{source}/config.json is not JSON: ")
    (source / "config.json").unlink()
    assert asyncio.run(refused()).count(str(source)) == 1
