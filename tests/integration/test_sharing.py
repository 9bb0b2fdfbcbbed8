"""Two models that have most of their tensors in common: what the second reads, and what stays when the first goes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from serverless_llm.cli.make_checkpoint import make_checkpoint
from tests.serving import Server, until

pytestmark = pytest.mark.storm  # ten seconds, to learn digests while nothing is loaded

DEVICES = ["--devices", "cpu:1", "--device-memory", "512MiB"]
CHANGED = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "checkpoint"
    make_checkpoint("smollm2-135m", path, layers=2, shards=2)  # 71 MB
    return path


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another value of one tensor, in one file with a header of an odd length: nothing lies where it lay."""
    path = tmp_path_factory.mktemp("tuned") / "checkpoint"
    shutil.copytree(base, path, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors: dict[str, torch.Tensor] = {}
    for part in sorted(base.glob("*.safetensors")):
        tensors |= load_file(part)
    tensors[CHANGED] = -tensors[CHANGED]
    save_file(tensors, path / "model.safetensors", {"format": "pt", "of": "a fine-tune"})
    return path


def bytes_of(source: Path) -> int:
    return sum(path.stat().st_size for path in source.glob("*.safetensors"))


def deploy(server: Server, name: str, source: Path) -> None:
    server.put(f"/admin/models/{name}", {"source": str(source)})


def ask(server: Server, name: str) -> Any:
    prompt = {"model": name, "prompt": "abc", "max_tokens": 8, "temperature": 0, "logprobs": 1}
    return server.put("/v1/completions", prompt, "POST")["choices"]


def unload(server: Server, name: str) -> None:
    server.put(f"/admin/models/{name}/unload", {}, "POST")
    until(lambda: all(one["model"] != name for one in server.devices()[0]["replicas"]), "the unload")


def read_bytes(server: Server) -> int:
    """What the agent has read, from whatever file."""
    fields = Path(f"/proc/{server.devices()[0]['agent_pid']}/io").read_text().split()
    return int(fields[fields.index("rchar:") + 1])


def used(server: Server) -> int:
    (node,) = server.status()["nodes"]
    return int(node["dram_used"])


@pytest.mark.parametrize("weights", ["view", "copy"])
def test_a_fine_tune_reads_what_is_its_own(base: Path, tuned: Path, tmp_path: Path, weights: str) -> None:
    size, state = bytes_of(tuned), tmp_path / "state"
    # Slots of 1 MiB: of those of a larger pool none holds what is the base's alone
    with Server(state, *DEVICES, "--weights", weights, "--dram", "192MiB") as server:
        deploy(server, "tuned", tuned)
        deploy(server, "base", base)
        expected = {name: ask(server, name) for name in ("tuned", "base")}
        assert expected["tuned"] != expected["base"]
        until(lambda: len(list(state.glob("agents/*.tensors/*.digests"))) == 2, "digests")
        server.put("/admin/models/tuned", {}, "DELETE")
        alone = until(lambda: (now := used(server)) < 1.1 * size and now, "the fine-tune to leave")

        deploy(server, "tuned", tuned)
        before = read_bytes(server)
        assert ask(server, "tuned") == expected["tuned"]
        assert read_bytes(server) - before <= 0.11 * size
        both = until(lambda: (now := used(server)) > alone and now, "a heartbeat")
        assert both - alone <= 0.11 * size
        (node,) = server.status()["nodes"]
        own = node["own_bytes"][server.get("/admin/models/tuned")["checkpoint"]]
        assert 0 < own <= both - alone

        server.put("/admin/models/base", {}, "DELETE")
        until(lambda: used(server) < both, "what only the base had to leave")
        assert ask(server, "tuned") == expected["tuned"]
        unload(server, "tuned")
        before = read_bytes(server)
        assert ask(server, "tuned") == expected["tuned"]
        assert read_bytes(server) - before >= 0.8 * size  # nobody lends any more
        server.put("/admin/models/tuned", {}, "DELETE")
        until(lambda: not used(server), "an empty tier")


def private(server: Server) -> int:
    """Bytes of memory that are the worker's alone."""
    fields = Path(f"/proc/{server.devices()[0]['worker_pid']}/status").read_text().split()
    return int(fields[fields.index("RssAnon:") + 1]) * 1024


def weights(server: Server) -> tuple[int, dict[str, Any]]:
    """What weights take of the device, and its replicas by their models."""
    (device,) = server.devices()
    return device["memory"]["weights"], {one["model"]: one for one in device["replicas"]}


def test_a_device_that_copies_holds_equal_tensors_once(base: Path, tuned: Path, tmp_path: Path) -> None:
    size, state = bytes_of(tuned), tmp_path / "state"
    with Server(state, *DEVICES, "--weights", "copy", "--dram", "256MiB") as server:
        for name, source in (("tuned", tuned), ("base", base)):
            deploy(server, name, source)
        expected = {name: ask(server, name) for name in ("tuned", "base")}
        until(lambda: len(list(state.glob("agents/*.tensors/*.digests"))) == 2, "digests")
        twice, there = weights(server)
        whole = there["base"]["weight_bytes"]
        assert (twice, there["base"]["shared_bytes"], there["tuned"]["shared_bytes"]) == (2 * whole, 0, 0)

        # the second holds what is its own
        unload(server, "tuned")
        until(lambda: weights(server)[0] == whole, "the device to hold one")
        alone, uploaded = private(server), server.status()["nodes"][0]["link_bytes"]["upload"]
        assert ask(server, "tuned") == expected["tuned"]
        assert private(server) - alone <= 0.3 * size
        both, there = weights(server)
        own = both - whole
        assert 0 < own <= 0.11 * whole
        assert [there[name]["shared_bytes"] for name in ("base", "tuned")] == [whole - own] * 2
        floors = sum(one["bytes"] - whole for one in there.values())
        assert server.devices()[0]["granted"] == both + floors
        checkpoint = server.get("/admin/models/tuned")["checkpoint"]
        node = until(lambda: (node := server.status()["nodes"][0])["own_bytes"] and node, "a heartbeat")
        for told in (node["own_bytes"][checkpoint], node["link_bytes"]["upload"] - uploaded):
            assert abs(told - own) <= 0.01 * size  # headers, and padding

        # the first goes, and the second stays what it was; then the other way round
        for gone, left in (("base", "tuned"), ("tuned", "base")):
            unload(server, gone)
            assert weights(server)[0] == whole
            assert weights(server)[1][left]["shared_bytes"] == 0
            assert ask(server, left) == expected[left]
            assert ask(server, gone) == expected[gone]
            assert weights(server)[0] == both

        # the bytes go with the last
        full = private(server)
        for name in expected:
            unload(server, name)
        assert weights(server) == (0, {})
        until(lambda: private(server) <= full - 0.9 * both, "the memory to go back")
