"""A server on a poor machine: full disks for its logs, a wall clock that jumps, a hasty operator."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.completing import Streamed, ask, checkpoint, deploy, status
from tests.integration.test_cli import PATIENCE, agents, is_alive
from tests.serving import Server, until

pytestmark = pytest.mark.slow

HOUR = 3600.0
SMALL = ("--devices", "cpu:1", "--device-memory", "16MiB", "--dram", "32MiB")


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clock") / "step"


@pytest.fixture(scope="module")
def poor(tmp_path_factory: pytest.TempPathFactory, step: Path) -> Iterator[Server]:
    """Logs that go to a full disk, and a wall clock that `step` sets; serves the model `m`."""
    folder = tmp_path_factory.mktemp("poor")
    stepped = Path(__file__).with_name("stepped")
    surroundings = f'export WALL_CLOCK_STEP={step} PYTHONPATH="{stepped}:$PYTHONPATH"'
    through = ("bash", "-c", f'{surroundings}; exec "$@" 2>/dev/full', "poor")
    (folder / "state" / "logs").mkdir(parents=True)
    for name in ("agent-node0.log", "head.log"):
        (folder / "state" / "logs" / name).symlink_to("/dev/full")
    with Server(folder / "state", *SMALL, "--verbose", through=through) as server:
        deploy(server, "m", checkpoint(folder / "m"))
        assert ask(server, "m")[0] == 200
        yield server


def test_logs_on_a_full_disk_cost_no_answer(poor: Server) -> None:
    assert poor.head is not None
    head, agent = poor.head.pid, poor.status()["nodes"][0]["agent_pid"]
    for pid in (head, agent):
        assert Path(f"/proc/{pid}/fd/2").readlink() == Path("/dev/full")
    expected = ask(poor, "m")
    assert expected[0] == 200
    os.kill(poor.devices()[0]["worker_pid"], signal.SIGKILL)  # both have something to say of it
    assert ask(poor, "m") == expected
    assert (poor.head.pid, poor.status()["nodes"][0]["agent_pid"]) == (head, agent)


@pytest.mark.parametrize("jump", [HOUR, -HOUR], ids=["forward", "back"])
def test_a_wall_clock_that_is_stepped_an_hour_ends_nothing_and_delays_nothing(
    poor: Server, step: Path, jump: float
) -> None:
    step.write_text("0")
    source = Path(poor.get("/admin/models/m")["source"])
    deploy(poor, "m", source, keep_alive=60)
    deploy(poor, "kept", source, keep_alive=60)
    deploy(poor, "brief", source, keep_alive=0.2)
    expected = ask(poor, "m", max_tokens=200)
    assert (ask(poor, "kept")[0], ask(poor, "brief")[0]) == (200, 200)
    running = Streamed(poor, "m", max_tokens=200).begin()
    step.write_text(str(jump))
    assert (200, running.rest()) == expected
    until(lambda: status(poor, "brief")["value"] == "unloaded", "the end of a fifth of a second", 5)
    assert [status(poor, name)["value"] for name in ("m", "kept")] == ["loaded", "loaded"]
    shown = until(lambda: poor.get("/admin/models/m")["until"], "the catalogue to tell that it is idle", 5)
    assert 0 < shown - (time.time() + jump) < 61  # what is shown is shown by the clock on the wall
    assert ask(poor, "brief")[0] == 200  # a cold start
    step.write_text("0")


def test_ctrl_c_twice_ends_at_once(tmp_path: Path) -> None:
    with Server(tmp_path / "state", *SMALL, "--drain", "1h") as server:
        deploy(server, "m", checkpoint(tmp_path / "m"))
        running = Streamed(server, "m", max_tokens=2000).begin()
        assert server.head is not None
        (agent,) = agents(server.state)
        server.head.send_signal(signal.SIGINT)
        until(lambda: refuses(server), "the drain")
        assert server.head.poll() is None
        server.head.send_signal(signal.SIGINT)
        assert server.head.wait(PATIENCE) == 128 + signal.SIGINT
        until(lambda: not is_alive(agent), "its agent's end")
        assert running.cut()


def refuses(server: Server) -> bool:
    return ask(server, "m", max_tokens=1)[0] == 503
