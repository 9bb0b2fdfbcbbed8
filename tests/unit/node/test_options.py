"""From the configuration to what each agent is started with."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pynvml
import pytest

from serverless_llm.config import load
from serverless_llm.errors import CapacityError
from serverless_llm.node import processes
from serverless_llm.node.devices import CUDA_RESERVE, budgets, handle
from serverless_llm.node.options import AgentOptions, DeviceOptions, local_agents
from tests.serving import until


def test_every_node_gets_an_agent(tmp_path: Path) -> None:
    flags = {"state_dir": str(tmp_path), "nodes": 2, "devices": "cpu:3", "device_memory": "2GiB", "dram": "4GiB",
             "weights": "copy", "limits": "disk=20MB/s,remote=5MB/s", "threads": 2, "orphan_grace": "5s"}  # fmt: skip
    agents = local_agents(load(flags, {}, memory=16 << 30))
    assert [agent.node for agent in agents] == ["node0", "node1"]
    assert agents[0].devices == (DeviceOptions("cpu", 2 << 30, "copy"),) * 3
    assert (agents[0].dram, agents[0].disk_rate, agents[0].upload_rate) == (4 << 30, 20e6, 0.0)
    assert agents[0].limits == {"remote": 5e6, "disk": 20e6}
    assert (agents[0].threads, agents[0].orphan_grace) == (2, 5.0)
    assert agents[1].lock_path == tmp_path / "agents" / "node1.lock"
    assert msgspec.json.decode(msgspec.json.encode(agents[0]), type=AgentOptions) == agents[0]


@pytest.mark.parametrize(("said", "grace"), [("-1", math.inf), ("0", 0.0), ("2m", 120.0)])
def test_any_grace_survives_the_command_line(tmp_path: Path, said: str, grace: float) -> None:
    (agent,) = local_agents(load({"state_dir": str(tmp_path), "dram": "1GiB", "orphan_grace": said}, {}))
    assert msgspec.json.decode(msgspec.json.encode(agent), type=AgentOptions).grace == grace


def test_weights_are_copied_to_gpus(tmp_path: Path) -> None:
    (agent,) = local_agents(load({"state_dir": str(tmp_path), "devices": "cuda:1", "dram": "1GiB"}, {}))
    assert agent.devices == (DeviceOptions("cuda", 0, "copy"),)


def test_a_stated_budget_needs_no_driver() -> None:
    assert budgets([DeviceOptions("cuda", 7, "copy"), DeviceOptions("cpu", 8, "view")]) == [7, 8]


def test_a_missing_driver_is_said(caplog: pytest.LogCaptureFixture) -> None:
    if any(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("this machine has one")
    assert budgets([DeviceOptions("cuda", 7, "copy"), DeviceOptions("cuda", 0, "copy")]) == [7, 0]
    assert "NVIDIA driver for device 1" in caplog.text


@pytest.mark.parametrize(("left", "budget"), [(CUDA_RESERVE + 5, 5), (CUDA_RESERVE, 0)])
def test_a_gpu_without_free_memory_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, left: int, budget: int
) -> None:
    for name in ("nvmlInit", "nvmlShutdown"):
        monkeypatch.setattr(pynvml, name, lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda number: number)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda _: SimpleNamespace(free=left))
    assert budgets([DeviceOptions("cuda", 0, "copy")]) == [budget]
    assert ("device 0 has 2.1 GB free" in caplog.text) == (budget == 0)


@pytest.mark.parametrize(
    ("visible", "number", "gpu"),
    [({}, 1, 1), ({"CUDA_VISIBLE_DEVICES": "3, 1"}, 0, 3), ({"CUDA_VISIBLE_DEVICES": "3, 1"}, 1, 1),
     ({"CUDA_VISIBLE_DEVICES": "GPU-5"}, 0, "GPU-5")],
)  # fmt: skip
def test_the_driver_is_asked_for_the_gpu_that_cuda_means(
    monkeypatch: pytest.MonkeyPatch, visible: dict[str, str], number: int, gpu: object
) -> None:
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda name: name)
    assert handle(number, visible) == gpu


def test_a_gpu_that_cuda_may_not_see_is_none() -> None:
    with pytest.raises(CapacityError, match="CUDA_VISIBLE_DEVICES='0,-1,1' shows no device 1"):
        handle(1, {"CUDA_VISIBLE_DEVICES": "0,-1,1"})


def test_a_process_has_the_name_it_gives_itself() -> None:
    script = (
        "from serverless_llm.node.processes import retitle; retitle('worker n/0 (ours)'); import sys; sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", script], env=processes.environment(), stdin=subprocess.PIPE) as child:
        until(lambda: Path(f"/proc/{child.pid}/comm").read_text() == "worker n/0 (our\n", "its short name")
        assert Path(f"/proc/{child.pid}/cmdline").read_bytes().rstrip(b"\0") == b"worker n/0 (ours)"
        assert child.stdin is not None
        child.stdin.close()


def test_children_find_this_package(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import serverless_llm; print(serverless_llm.__file__)"]
    found = subprocess.run(command, cwd=tmp_path, env=processes.environment(), capture_output=True, check=True)
    import serverless_llm

    assert found.stdout.decode().strip() == serverless_llm.__file__


def test_how_a_process_died() -> None:
    assert processes.died(signal.SIGKILL) == "killed by SIGKILL"
    assert processes.died(3 << 8) == "exited with 3"


def test_an_agent_without_sense_says_so(tmp_path: Path) -> None:
    (tmp_path / "agents").mkdir()
    options = AgentOptions(str(tmp_path), "n", (DeviceOptions("cpu", 1 << 20, "view"),), dram=100)
    command = processes.command("serverless_llm.node.agent", msgspec.json.encode(options).decode())
    ended = subprocess.run(command, env=processes.environment(), capture_output=True, check=False)
    assert ended.returncode == 1
    assert b"a pool of 100 B holds no slot" in ended.stderr
    assert b"Traceback" not in ended.stderr


def test_an_agent_takes_the_descriptors_that_there_are(tmp_path: Path) -> None:
    (tmp_path / "agents").mkdir()
    options = AgentOptions(str(tmp_path), "n", (DeviceOptions("cpu", 1 << 20, "view"),), dram=100)
    code = (
        "import resource; from serverless_llm.node import agent;"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 256)); agent.main();"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    command = [sys.executable, "-c", code, msgspec.json.encode(options).decode()]
    ended = subprocess.run(command, env=processes.environment(), capture_output=True, check=True)
    assert ended.stdout == b"(256, 256)\n"


def test_the_agent_imports_neither_torch_nor_the_control_plane() -> None:
    foreign = {"torch", "numpy", "serverless_llm.cluster"}
    code = f"import sys, serverless_llm.node.agent; print({foreign} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], env=processes.environment(), capture_output=True, check=True)
    assert done.stdout == b"set()\n", done
