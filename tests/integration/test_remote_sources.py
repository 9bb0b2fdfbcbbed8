"""URLs as sources of every command that takes one: real processes against a server of ranges on loopback."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from serverless_llm.cli import inspect as show
from serverless_llm.cli import serve, sources
from serverless_llm.cli.diagnosis import directory_of
from serverless_llm.config import load
from serverless_llm.demo import tasks
from serverless_llm.loader.disk_tier import DiskTier
from serverless_llm.node.processes import command, environment
from tests.range_server import RangeServer
from tests.serving import hear_ctrl_c, until
from tests.unit.loader import checkpoints

pytestmark = pytest.mark.slow

PATIENCE = 60.0
DEMO = {path.name: path.read_bytes() for path in tasks.checkpoint_dir("demo-add").iterdir()}


@pytest.fixture
def server() -> Iterator[RangeServer]:
    with RangeServer({f"models/add/{name}": data for name, data in DEMO.items()}) as running:
        yield running


class Shell:
    """Runs command lines whose disk tier and state are in `folder`."""

    def __init__(self, folder: Path, server: RangeServer) -> None:
        self.tier = folder / "cache" / "serverless-llm" / "remote"
        self.environment = environment() | server.s3 | {
            "XDG_CACHE_HOME": str(folder / "cache"),
            "SERVERLESS_LLM_STATE_DIR": str(folder / "state"),
            "SERVERLESS_LLM_REMOTE_CACHE": "100MB",
            "SERVERLESS_LLM_DEVICES": "cpu:1",
            "SERVERLESS_LLM_DRAM": "32MiB",
        }  # fmt: skip

    def __call__(self, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command("serverless_llm", *arguments),
            env=self.environment | changes, capture_output=True, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip


@pytest.fixture
def shell(tmp_path: Path, server: RangeServer) -> Shell:
    return Shell(tmp_path, server)


def held(directory: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def test_pull_prints_a_directory_that_holds_the_checkpoint(shell: Shell, server: RangeServer) -> None:
    url = f"{server.url}/models/add"
    first = shell("pull", url)
    assert first.returncode == 0, first.stderr
    directory = first.stdout.strip()
    assert held(directory) == DEMO
    assert Path(directory).is_relative_to(shell.tier)
    assert "model.safetensors: " in first.stderr
    value = json.loads(shell("pull", "s3://bucket/models/add", "--json").stdout)
    assert (value["url"], value["files"], value["offline"]) == ("s3://bucket/models/add", len(DEMO), False)
    assert value["directory"] != directory
    assert held(value["directory"]) == DEMO
    away = shell("pull", "s3://bucket/models/add", AWS_ENDPOINT_URL="http://127.0.0.1:1")
    assert (away.returncode, away.stdout.strip()) == (0, value["directory"])
    assert "taken from the disk, since s3://bucket/models/add (at 127.0.0.1:1) cannot be reached: " in away.stderr


def test_a_url_runs_without_a_server_of_models(shell: Shell, server: RangeServer) -> None:
    answer = shell("run", f"{server.url}/models/add/", "12+34")
    assert (answer.returncode, answer.stdout) == (0, "46\n"), answer.stderr
    total = sum(map(len, DEMO.values()))
    assert total <= server.sent <= 1.02 * total


def test_a_server_for_one_answer_tells_what_it_has_not_kept(shell: Shell, server: RangeServer) -> None:
    url = f"{server.url}/models/add"
    answer = shell("run", f"{url}/", "12+34", SERVERLESS_LLM_REMOTE_CACHE="1MB")
    assert (answer.returncode, answer.stdout) == (0, "46\n"), answer.stderr
    assert f"3.1 MB are not kept on the disk; serverless-llm pull {url} brings them\n" in answer.stderr
    assert shell("pull", url).returncode == 0
    assert "not kept" not in shell("run", url, "12+34").stderr


def test_a_url_is_a_source(server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    url = f"{server.url}/models/add"
    assert (sources.is_source(url), sources.name_of(f"{url}/")) == (True, "add")
    first = sources.named((url,))["add"]
    assert held(first).keys() == DEMO.keys()
    assert server.sent < sum(map(len, DEMO.values())) - 0.99 * len(DEMO["model.safetensors"])
    server.gets.clear()
    server.faults.statuses = dict.fromkeys(server.files, 500)
    (tmp_path / "models.yaml").write_text(f"models: {{m: {url}}}\n")
    configured = serve.sourced(load({}, {"HOME": str(tmp_path)}, tmp_path / "models.yaml", memory=64 << 30))
    assert configured.models["m"].source == str(directory_of(url)) == first
    with click.Context(click.Command("show")):
        assert show.checkpoint(sources.resolve(url, served=True), "auto")["source"] == first
    assert server.gets == []
    server.faults.statuses = {}
    with click.Context(click.Command("repack")):
        assert sources.resolve(url) == first
    assert held(first) == DEMO


@pytest.mark.parametrize(
    ("url", "status", "message"),
    [
        ("{}/models/none", 1, "/models/none has neither model.safetensors nor model.safetensors.index.json"),
        ("{}/models/add/model.safetensors", 1, "index.json; if it is a file, name its directory: http://"),
        ("ftp://host/m", 2, "ftp://host/m: no source begins with ftp://; there are s3://"),
        ("{}/models/wordless", 1, "/models/wordless has no tokenizer.json"),
        ("{}/models/add?x=1", 2, "a source's URL is a directory's, without ? and #"),
    ],
)
def test_what_cannot_be_pulled(shell: Shell, server: RangeServer, url: str, status: int, message: str) -> None:
    server.files |= {f"models/wordless/{name}": DEMO[name] for name in ("config.json", "model.safetensors")}
    refused = shell("pull", url.format(server.url))
    assert (refused.returncode, refused.stdout) == (status, "")
    assert message in refused.stderr
    assert server.gets == []


def test_ctrl_c_ends_a_pull_that_is_stuck(shell: Shell, server: RangeServer) -> None:
    server.faults.budget = 1000
    with subprocess.Popen(
        command("serverless_llm", "pull", f"{server.url}/models/add"),
        env=shell.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=hear_ctrl_c,
    ) as process:  # fmt: skip
        until(lambda: "models/add/model.safetensors" in server.gets, "the weights to begin", PATIENCE)
        process.send_signal(signal.SIGINT)
        assert process.wait(9) == 130


@pytest.mark.storm
def test_killed_at_any_time_it_takes_no_half_for_whole(shell: Shell, server: RangeServer, tmp_path: Path) -> None:
    directory = checkpoints.write(tmp_path / "m", checkpoints.random(24, 1), checkpoints.random(24, 2))
    whole = {path.name: path.read_bytes() for path in directory.iterdir()} | {"tokenizer.json": DEMO["tokenizer.json"]}
    server.files = {f"m/{name}": data for name, data in whole.items()}
    url, chance = f"{server.url}/m", random.Random(1)
    began = time.monotonic()
    assert held(shell("pull", url).stdout.strip()) == whole
    takes = time.monotonic() - began
    shutil.rmtree(shell.tier)
    kills = 0
    while kills < 30:  # some are done before
        victim = subprocess.Popen(
            command("serverless_llm", "pull", url),
            env=shell.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        with contextlib.suppress(subprocess.TimeoutExpired):
            victim.wait(chance.uniform(takes / 4, takes))
        victim.kill()
        kills += victim.wait() < 0
        if lease := DiskTier(shell.tier).cached(url):
            with lease:
                assert held(str(lease.directory)) == whole
            shutil.rmtree(shell.tier)
    assert held(shell("pull", url).stdout.strip()) == whole
    assert [path.suffix for path in shell.tier.glob("*/*")] == [""]
