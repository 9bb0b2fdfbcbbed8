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
    with Server(state, *DEVICES, "--weights", weights, "--dram", "256MiB") as server:
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
