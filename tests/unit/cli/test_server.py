"""The head's parts that need no process: options, keys, deploys, observations."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
from pathlib import Path

import pytest
from aiohttp import web

from serverless_llm import framing, wire
from serverless_llm.cli.serve import announce, made
from serverless_llm.cli.server import (
    deploy_body,
    draining,
    gateway_options,
    kv_usage,
    memory,
    model_roots,
    observe,
    status_of,
)
from serverless_llm.cli.stop import STOP
from serverless_llm.cluster.commands import Decided, Evicted, Outcome
from serverless_llm.cluster.events import Delete
from serverless_llm.config import Config, ModelEntry, load
from serverless_llm.demo import tasks
from serverless_llm.domain import DeviceId, LoadPhases
from serverless_llm.errors import ConfigurationError, RequestError
from serverless_llm.gateway.keys import full
from serverless_llm.gateway.metrics import Metrics
from serverless_llm.node.admin import spec_of
from serverless_llm.node.links import WebSocketLink
from serverless_llm.node.peers import Peer
from tests.unit.cluster.desk import Desk

DEVICE = DeviceId("node0", 0)


def configured(state: Path, **flags: object) -> Config:
    return load({"state_dir": state, "devices": "cpu:1", **flags}, {"HOME": "/nowhere"}, memory=1 << 30)


def test_loopback_needs_no_key(tmp_path: Path) -> None:
    options = gateway_options(configured(tmp_path, hosts=("gpu.example",), hold="5s", heartbeat="comment"))
    assert (options.keys, options.open_metrics, options.hosts) == ((), True, ("gpu.example",))
    assert (options.hold, options.heartbeat) == (5.0, "comment")
    assert list(tmp_path.iterdir()) == []


def test_elsewhere_a_key_is_made_and_kept(tmp_path: Path) -> None:
    options = gateway_options(configured(tmp_path, host="0.0.0.0"))
    made = (tmp_path / "api-key").read_text()
    assert options.keys == (full(made),)
    assert not options.open_metrics
    assert len(made) >= 32
    assert (tmp_path / "api-key").stat().st_mode & 0o777 == 0o600
    assert gateway_options(configured(tmp_path, host="0.0.0.0")).keys == options.keys


def test_elsewhere_an_empty_key_opens_nothing(tmp_path: Path) -> None:
    (tmp_path / "api-key").touch()
    with pytest.raises(ConfigurationError, match="api-key is empty"):
        gateway_options(configured(tmp_path, host="0.0.0.0"))


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_given_key_is_taken(tmp_path: Path, host: str) -> None:
    assert gateway_options(configured(tmp_path, host=host, api_key="mine")).keys == (full("mine"),)
    assert gateway_options(configured(tmp_path, host=host, api_key="mine\n")).keys == (full("mine"),)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_keys_stands_beside_the_one_or_instead(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(f"- {{id: ada, sha256: {'a' * 64}}}")
    read = gateway_options(configured(tmp_path, host="0.0.0.0", keys_file=file)).keys
    assert [key.id for key in read] == ["ada"]
    both = gateway_options(configured(tmp_path, keys_file=file, api_key="mine")).keys
    assert [key.id for key in both] == ["ada", "default"]
    assert not (tmp_path / "api-key").exists()


@pytest.mark.parametrize(
    ("mode", "holds", "then"),
    [
        (0o755, "", 0o700),
        (0o750, "state.db", 0o700),
        (0o705, "state.db", 0o700),
        (0o755, "notes", 0o755),  # not for this alone
        (0o755, "state.db notes", 0o755),
        (0o1777, "state.db", 0o1777),  # as /tmp is
    ],
)
def test_a_state_directory_is_closed_to_others(tmp_path: Path, mode: int, holds: str, then: int) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    for name in holds.split():
        (folder / name).touch()
    folder.chmod(mode)
    assert made(folder) == folder / "logs"
    assert stat.S_IMODE(folder.stat().st_mode) == then


def test_a_state_directory_that_is_another_users_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o755)
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    made(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


def test_model_roots_never_shut_out_the_demos(tmp_path: Path) -> None:
    assert model_roots(configured(tmp_path)) == ()
    roots = model_roots(configured(tmp_path, model_roots=(str(tmp_path),)))
    body = json.dumps({"source": str(tasks.checkpoint_dir("demo-add"))}).encode()
    assert spec_of("demo-add", body, 300.0, roots).source == str(tasks.checkpoint_dir("demo-add"))
    assert spec_of("m", b'{"source": "demo-add"}', 300.0, roots).source == str(tasks.checkpoint_dir("demo-add"))
    with pytest.raises(RequestError, match="outside the model roots"):
        spec_of("m", b'{"source": "/elsewhere"}', 300.0, roots)
    with pytest.raises(RequestError, match="source has 5001 characters"):
        spec_of("m", b'{"source": "/%s"}' % (b"a" * 5000), 300.0, roots)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (STOP, 0)])
def test_a_stop_that_was_asked_for_is_no_failure(number: int, status: int) -> None:
    assert status_of(number) == status


@pytest.mark.parametrize(
    ("requests", "text"),
    [(1, "1 request is running, for at most 30 s; Ctrl-C again ends it"), (2, "2 requests are running,")],
)
def test_who_waits_for_the_end_is_told_for_what(requests: int, text: str) -> None:
    assert text in draining(requests, 30.0)


def test_a_configured_model_is_a_deploy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    body = json.loads(deploy_body(ModelEntry(source="m", context=512)))
    assert body["source"] == str(tmp_path / "m")
    assert body["context"] == 512
    assert "keep_alive" not in body
    assert json.loads(deploy_body(ModelEntry(source="m", keep_alive=float("inf"))))["keep_alive"] == -1
    assert json.loads(deploy_body(ModelEntry(source="m", keep_alive=5.0)))["keep_alive"] == 5.0


def test_kv_is_of_replicas_whose_model_is_there() -> None:
    desk = Desk()
    desk.join()
    desk.serve("m", 1)
    state, reported = desk.machine.state, {"n0": {0: (1, 3)}}
    assert kv_usage(state, reported) == {("m", "n0/0"): 0.25}
    assert kv_usage(state, {}) == {("m", "n0/0"): 0.0}
    desk.tell(Delete("m"))
    assert state.replicas  # still leaving
    assert kv_usage(state, reported) == {}


def test_decisions_and_outcomes_are_counted() -> None:
    metrics = Metrics()
    observe(metrics, Decided(1, "m", DEVICE, 0.5, ()))
    observe(metrics, Outcome(1, "m", DEVICE, 0.5, 1.0, LoadPhases(disk_s=0.75, total_s=0.8, disk_bytes=10)))
    observe(metrics, Evicted(1, "m", DEVICE, "memory"))
    lines = metrics.page().decode().splitlines()
    assert 'serverless_llm_cold_starts_total{model_name="m",source="disk"} 1.0' in lines
    assert 'serverless_llm_load_seconds_sum{model_name="m",phase="disk"} 0.75' in lines
    assert 'serverless_llm_estimate_ratio_sum{model_name="m"} 2.0' in lines
    assert 'serverless_llm_evictions_total{reason="memory"} 1.0' in lines


def test_what_is_announced(capsys: pytest.CaptureFixture[str]) -> None:
    announce("http://127.0.0.1:8000", "127.0.0.1", None, False)
    announce("http://127.0.0.1:8000", "0.0.0.0", Path("/state/api-key"), False)
    assert capsys.readouterr().out.splitlines() == [
        "serverless-llm serves on http://127.0.0.1:8000",
        "dashboard: http://127.0.0.1:8000/",
        "serverless-llm serves on http://127.0.0.1:8000",
        "clients need the key in /state/api-key",
        "it listens on every address of this machine (0.0.0.0)",
        "dashboard: http://127.0.0.1:8000/",
    ]


async def agent(hello: wire.Hello) -> Peer:
    """One that is connected; its link lives on a loop."""
    return Peer(0, WebSocketLink(web.WebSocketResponse(), lambda _frame: None), hello, kv={0: (7, 1)})


def test_memory_is_that_of_connected_nodes() -> None:
    desk = Desk()
    desk.join()
    desk.serve("m", 1)
    state = desk.machine.state
    (device,) = state.devices.values()
    hello = wire.Hello(framing.PROTOCOL, "n0", 4, 900, [], [], [], [("c", 300)], {})
    peer = asyncio.run(agent(hello))
    (replica,) = state.replicas.values()
    assert memory(state, {"n0": peer}) == {
        "dram_used_bytes": {"n0": 300},
        "dram_budget_bytes": {"n0": 900},
        "device_used_bytes": {"n0/0": replica.footprint.weight_bytes + 7},
        "device_budget_bytes": {"n0/0": device.spec.budget},
    }
    assert memory(state, {})["device_used_bytes"] == {}
