"""`pull`, and hub ids as sources: the real `huggingface_hub` in real processes against a hub on loopback."""

from __future__ import annotations

import functools
import json
import os
import pty
import random
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from serverless_llm.demo import tasks
from serverless_llm.node.processes import command, environment
from serverless_llm.quantities import size
from tests.integration.hub import Hub, Repository
from tests.serving import hear_ctrl_c, until

pytestmark = pytest.mark.slow

PATIENCE = 60.0
DEMO = {path.name: path.read_bytes() for path in tasks.checkpoint_dir("demo-add").iterdir()}
OTHERS = {"README.md": b"#", "pytorch_model.bin": b"\x80", "consolidated.safetensors": b"x", "onnx/model.onnx": b"o"}
SHARDS = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]


def sharded(seed: int, nbytes: int = 3 << 20) -> dict[str, bytes]:
    """A repository whose weights are in two files of random bytes."""
    small = {name: DEMO[name] for name in ("config.json", "tokenizer.json")}
    weights = {name: random.Random(f"{seed}{name}").randbytes(nbytes) for name in SHARDS}
    index = json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}).encode()
    return small | weights | {"model.safetensors.index.json": index}


@pytest.fixture
def hub() -> Iterator[Hub]:
    repositories = {
        "owner/demo": Repository(DEMO | OTHERS, ("main", "v1")),
        "owner/shards": Repository(sharded(1) | OTHERS),
        "owner/pickle": Repository({"config.json": b"{}", "tokenizer.json": b"{}", "pytorch_model.bin": b"\x80"}),
        "owner/wordless": Repository({name: DEMO[name] for name in ("config.json", "model.safetensors")}),
        "owner/gated": Repository(DEMO, gated=True),
        "owner/torn": Repository({name: data for name, data in sharded(2).items() if name != SHARDS[1]}),
    }
    with Hub(repositories) as running:
        yield running


class Shell:
    """Runs command lines whose hub is `hub` and whose cache is in `folder`."""

    def __init__(self, folder: Path, hub: Hub) -> None:
        self.cache = folder / "hf" / "hub"
        self.environment = {
            **{name: value for name, value in environment().items() if not name.startswith("HF_")},
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(folder / "hf"),
            "HF_TOKEN": "hf_secret",
            "HF_HUB_ETAG_TIMEOUT": "60",  # a busy machine is not a hub that is down
            "HF_HUB_DOWNLOAD_TIMEOUT": "60",
            "SERVERLESS_LLM_STATE_DIR": str(folder / "state"),
            "SERVERLESS_LLM_DEVICES": "cpu:1",
            "PYTHONUNBUFFERED": "1",
            "SERVERLESS_LLM_DRAM": "32MiB",
        }

    def __call__(self, *arguments: str, most: int = -1, **changes: str) -> subprocess.CompletedProcess[str]:
        """`most`: bytes that a file it writes may have, as on a disk that is full then."""
        return subprocess.run(
            command("serverless_llm", *arguments),
            env=self.environment | changes, capture_output=True, text=True, timeout=PATIENCE, check=False,
            preexec_fn=functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (most, most)),
        )  # fmt: skip

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command("serverless_llm", *arguments),
            env=self.environment, stdout=subprocess.DEVNULL, preexec_fn=hear_ctrl_c,
        )  # fmt: skip


@pytest.fixture
def shell(tmp_path: Path, hub: Hub) -> Shell:
    return Shell(tmp_path, hub)


def held(directory: str) -> dict[str, bytes]:
    root = Path(directory)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_pull_reads_what_is_needed_and_nothing_twice(shell: Shell, hub: Hub) -> None:
    first = shell("pull", "owner/demo")
    assert first.returncode == 0, first.stderr
    assert held(first.stdout.strip()) == DEMO
    assert Path(first.stdout.strip()).is_relative_to(shell.cache)
    assert "model.safetensors: " in first.stderr
    assert "\x1b" not in first.stderr
    ours = [one for one in hub.asked if "owner/demo" in one.path]
    assert {one.token for one in ours if not one.path.startswith("/elsewhere/")} == {"Bearer hf_secret"}
    assert [one.token for one in hub.gets("model.safetensors")] == [None]  # another host
    assert "hf_secret" not in first.stdout + first.stderr
    kept = [path for path in shell.cache.parent.rglob("*") if path.is_file()]
    assert not any(b"hf_secret" in path.read_bytes() for path in kept)
    hub.asked.clear()
    again = json.loads(shell("pull", "owner/demo", "--json").stdout)
    assert again["directory"] == first.stdout.strip()
    assert (again["files"], again["commit"]) == (len(DEMO), hub.repositories["owner/demo"].commit)
    assert [one.path for one in hub.asked if "/resolve/" in one.path and one.method == "GET"] == []


def test_a_cached_snapshot_needs_no_hub(shell: Shell, hub: Hub) -> None:
    refused = shell("pull", "owner/shards", HF_HUB_OFFLINE="1")
    assert refused.returncode == 1
    assert "owner/shards is not in the cache" in refused.stderr
    directory = shell("pull", "owner/shards").stdout
    hub.asked.clear()
    offline = shell("pull", "owner/shards", HF_HUB_OFFLINE="1")
    assert (offline.returncode, offline.stdout) == (0, directory)
    assert "taken from the cache, since HF_HUB_OFFLINE is set" in offline.stderr
    assert hub.asked == []
    away = shell("pull", "owner/shards", HF_ENDPOINT="http://127.0.0.1:1")
    assert (away.returncode, away.stdout) == (0, directory)
    (Path(directory.strip()) / SHARDS[1]).unlink()
    assert shell("pull", "owner/shards", HF_HUB_OFFLINE="1").returncode == 1


def test_a_killed_pull_is_gone_on_with(shell: Shell, hub: Hub) -> None:
    hub.repositories["owner/shards"] = Repository(sharded(3, 12 << 20))
    most = 11 << 20  # more than the 10 MB that `huggingface_hub` writes at a time
    hub.stalls = dict.fromkeys(SHARDS, most)
    victim = shell.start("pull", "owner/shards")

    def begun() -> bool:
        return [path.stat().st_size > 0 for path in shell.cache.glob("*/blobs/*.partial")] == [True, True]

    try:
        until(begun, "both files to begin", PATIENCE)
    finally:
        victim.kill()
        victim.wait()
    hub.stalls = {}
    hub.asked.clear()
    done = shell("pull", "owner/shards")
    assert done.returncode == 0, done.stderr
    assert {name: held(done.stdout.strip())[name] for name in SHARDS} == {
        name: hub.repositories["owner/shards"].files[name] for name in SHARDS
    }
    assert all(0 < one.begin <= most for one in hub.gets(".safetensors"))
    assert list(shell.cache.glob("*/blobs/*.partial")) == []


def test_a_hub_that_is_late_is_waited_for_where_the_cache_has_nothing(shell: Shell, hub: Hub) -> None:
    hub.late = {"model.safetensors"}
    late = shell("pull", "owner/demo", HF_HUB_ETAG_TIMEOUT="1")
    assert late.returncode == 0, late.stderr
    assert hub.late == set()


def test_what_the_cache_cannot_take_is_not_the_hubs_fault(shell: Shell, hub: Hub) -> None:
    """What is cached is of an older commit: it must not be taken for the one that was asked for."""
    assert shell("pull", "owner/shards").returncode == 0
    hub.repositories["owner/shards"] = Repository(sharded(4))
    hub.asked.clear()
    full = shell("pull", "owner/shards", most=1 << 20)
    assert (full.returncode, full.stdout) == (1, "")
    assert "owner/shards cannot be kept in" in full.stderr
    assert "File too large; the next pull goes on with what came" in full.stderr
    done = shell("pull", "owner/shards")
    assert done.returncode == 0, done.stderr
    assert {one.begin for one in hub.gets(".safetensors")} == {0, 1 << 20}


def test_only_what_is_missing_must_fit_on_the_disk(shell: Shell, hub: Hub) -> None:
    repository = hub.repositories["owner/demo"]
    vast = repository.sizes["model.safetensors"] = 1 << 50
    refused = shell("pull", "owner/demo")
    assert refused.returncode == 1
    assert f"model.safetensors has {size(vast)}; the hub gives out" in refused.stderr
    blobs = shell.cache / "models--owner--demo" / "blobs"
    begun = blobs / f"{repository.etags['model.safetensors']}.partial"
    begun.write_bytes(b"x")
    refused = shell("pull", "owner/demo")
    assert refused.returncode == 1
    assert f"owner/demo needs {size(vast - 1)} in {blobs.parent}, where " in refused.stderr
    large = repository.sizes["model.safetensors"] = shutil.disk_usage(blobs).free + (1 << 30)
    os.truncate(begun, large - 1000)  # holds no block
    done = shell("pull", "owner/demo")
    assert done.returncode == 0, done.stderr
    assert held(done.stdout.strip()) == DEMO


def test_ctrl_c_ends_a_pull_that_is_stuck(shell: Shell, hub: Hub) -> None:
    hub.stalls = dict.fromkeys(SHARDS, 1)
    with shell.start("pull", "owner/shards") as process:
        until(lambda: len(hub.gets(".safetensors")) == 2, "both files to begin", PATIENCE)
        process.send_signal(signal.SIGINT)
        assert process.wait(9) == 130  # `huggingface_hub` waits for 10 s before it tries again


def test_a_name_that_leads_out_of_the_cache_is_refused(shell: Shell, hub: Hub) -> None:
    hub.repositories["owner/demo"].etags["model.safetensors"] = "../../../escaped"
    refused = shell("pull", "owner/demo")
    assert refused.returncode == 1
    assert "which is no name of a file" in refused.stderr
    assert list(shell.cache.parent.parent.glob("**/escaped*")) == []


def test_what_was_left_of_another_file_is_read_anew(shell: Shell, hub: Hub) -> None:
    etags = hub.repositories["owner/shards"].etags
    blobs = shell.cache / "models--owner--shards" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{etags[SHARDS[0]]}.partial").write_bytes(b"\0" * 1000)  # as a lost page cache leaves it
    done = shell("pull", "owner/shards")
    assert done.returncode == 0, done.stderr
    assert [one.begin for one in hub.gets(SHARDS[0])] == [1000, 0]
    assert held(done.stdout.strip())[SHARDS[0]] == hub.repositories["owner/shards"].files[SHARDS[0]]


def test_what_is_not_what_the_hub_names_is_refused(shell: Shell, hub: Hub) -> None:
    hub.repositories["owner/demo"].etags["model.safetensors"] = "0" * 64
    refused = shell("pull", "owner/demo")
    assert refused.returncode == 1
    assert f"model.safetensors: what came is not what the hub names by {'0' * 64}" in refused.stderr
    assert list(shell.cache.glob("*/snapshots/*/model.safetensors")) == []


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("owner/pickle", 1, "has weights only as pytorch_model.bin: not opened, since unpickling runs code"),
        ("owner/wordless", 1, "owner/wordless has no tokenizer.json"),
        ("owner/gated", 1, "owner/gated: its terms must be accepted on the hub, and HF_TOKEN set"),
        ("owner/nothing", 1, "the hub has no repository 'owner/nothing', or it is private"),
        ("owner/demo@v9", 1, "owner/demo has no revision 'v9'"),
        ("owner/torn", 1, f"owner/torn has no {SHARDS[1]}, which its index names"),
        ("demo", 2, "'demo' is not of the form owner/name or owner/name@revision"),
        ("owner/de--mo", 2, "'owner/de--mo' is not of the form"),
        ("owner/demo@../../v1", 2, "'owner/demo@../../v1' is not of the form"),
    ],
)
def test_what_cannot_be_pulled(shell: Shell, hub: Hub, name: str, status: int, message: str) -> None:
    refused = shell("pull", name)
    assert refused.returncode == status, refused.stderr
    assert message in refused.stderr
    assert hub.gets(".bin") == hub.gets(".safetensors") == []


def test_bars_on_a_terminal(shell: Shell) -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        command("serverless_llm", "pull", "owner/demo@v1"),
        env=shell.environment | {"TERM": "xterm"}, stdout=subprocess.PIPE, stderr=theirs,
    ) as process:  # fmt: skip
        os.close(theirs)
        seen = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # EIO: the other side is closed
                break
            seen += piece
    os.close(ours)
    assert process.returncode == 0
    assert b"model.safetensors" in seen
    assert b"\x1b[" in seen


def test_hub_ids_are_sources(shell: Shell, hub: Hub, tmp_path: Path) -> None:
    """In the configuration of `serve`, and of `deploy`; the cache is asked first."""
    (tmp_path / "serverless-llm.yaml").write_text("models: {mine: owner/demo, owner/demo: owner/demo@v1}\n")
    with subprocess.Popen(
        command("serverless_llm", "serve", "--port", "0", "--device-memory", "32MiB"),
        env=shell.environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as server:  # fmt: skip
        try:
            assert server.stdout is not None
            assert "serves on" in server.stdout.readline()
            weights = len(hub.gets("model.safetensors"))
            assert shell("run", "mine", "12+34", "-q").stdout == "46\n"
            assert shell("deploy", "again", "owner/demo").returncode == 0
            rows = json.loads(shell("ls", "--json").stdout)
        finally:
            shell("stop", "--now")
            server.communicate(timeout=PATIENCE)
    assert {row["name"] for row in rows} == {"again", "mine", "owner/demo"}
    assert all(Path(row["source"]).is_relative_to(shell.cache) for row in rows)
    assert weights == len(hub.gets("model.safetensors")) == 1


def test_a_hub_id_runs_without_a_server(shell: Shell) -> None:
    answer = shell("run", "owner/demo", "12+34")
    assert (answer.returncode, answer.stdout) == (0, "46\n"), answer.stderr
    assert "model.safetensors: " in answer.stderr
