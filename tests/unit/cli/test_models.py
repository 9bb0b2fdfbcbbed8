"""`deploy`, `rm`, `ls`, `ps`, and how they find and reach a server."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from serverless_llm.cli import models
from serverless_llm.cli.client import Server
from serverless_llm.cli.sources import is_source, name_of, named, resolve, same
from serverless_llm.demo import tasks
from serverless_llm.quantities import size
from tests.range_server import RangeServer
from tests.unit.cli.conftest import CommandLine, Scripted

ROW = {
    "name": "m", "source": "/models/m", "bytes": 3_800_000, "state": "loaded", "tier": "device", "progress": 1.0,
    "error": "", "devices": ["node0/1"], "keep_alive": 300.0, "pinned": False, "until": None,
    "running": 1, "waiting": 0, "url": "",
}  # fmt: skip


def rows(server: Scripted, *changes: dict[str, Any]) -> None:
    status = {"models": [ROW | change for change in changes], "nodes": [], "problems": []}
    server.answers["GET", "/admin/status"] = (200, status)


# --- finding a server ---


def test_nobody_there_is_69(cli: CommandLine) -> None:
    outcome = cli("ls")
    assert outcome.status == 69
    assert "no server is running" in outcome.err


def test_a_url_that_nobody_listens_on_is_69(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVERLESS_LLM_URL", "http://127.0.0.1:1")
    outcome = cli("ls")
    assert outcome.status == 69
    assert "no server answers at http://127.0.0.1:1" in outcome.err


def test_the_state_directory_names_the_server_and_its_key(cli: CommandLine, server: Scripted, tmp_path: Path) -> None:
    (tmp_path / "head.json").write_text(json.dumps({"url": server.url, "generation": 1, "pid": os.getpid()}))
    rows(server)
    assert cli("ls").status == 0
    (tmp_path / "api-key").write_text("kept\n")
    assert cli("ls").status == 0
    assert [key for _, _, _, key in server.seen] == [None, "Bearer kept"]


@pytest.mark.parametrize("arguments", [("ls",), ("ps",), ("rm", "m"), ("deploy", "m", "demo-add"), ("run", "m", "x")])
def test_a_given_state_directory_names_the_server_whatever_the_environment_says(
    cli: CommandLine, server: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setenv("SERVERLESS_LLM_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("SERVERLESS_LLM_API_KEY", "of another")
    assert cli(*arguments, "--state-dir", str(other)).status == 69
    (other / "head.json").write_text(json.dumps({"url": server.url, "generation": 1, "pid": os.getpid()}))
    (other / "api-key").write_text("kept\n")
    cli(*arguments, "--state-dir", str(other))
    assert server.seen[0][3] == "Bearer kept"


def test_the_environment_names_server_and_key(
    cli: CommandLine, running: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVERLESS_LLM_API_KEY", "mine")
    rows(running)
    assert cli("ls").status == 0
    assert running.seen[0][3] == "Bearer mine"


def test_an_error_answer_is_shown(cli: CommandLine, running: Scripted) -> None:
    running.answers["DELETE", "/admin/models/m"] = (404, {"error": {"message": "no model m", "code": None}})
    outcome = cli("rm", "m")
    assert (outcome.status, outcome.err) == (1, "Error: no model m\n")


def test_an_error_that_is_no_json_is_of_somebody_else(cli: CommandLine, running: Scripted) -> None:
    outcome = cli("rm", "m")
    assert (outcome.status, outcome.err) == (1, "Error: HTTP 404 of something that is no serverless-llm server\n")


def test_a_url_without_its_s_is_told(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that speaks TLS hangs up on a request that is no hello."""
    with listening(lambda one: one.recv(1000)) as port:
        monkeypatch.setenv("SERVERLESS_LLM_URL", f"http://127.0.0.1:{port}")
        outcome = cli("ls")
    assert outcome.status == 69
    assert "if it speaks TLS, its URL begins with https://" in outcome.err
    assert "start one" not in outcome.err


def test_a_url_with_an_s_too_many_is_told(cli: CommandLine, running: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVERLESS_LLM_URL", running.url.replace("http", "https"))
    outcome = cli("ls")
    assert outcome.status == 69
    assert "does not speak TLS" in outcome.err


def test_a_certificate_of_nobody_known_is_told(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = ssl.SSLCertVerificationError(1, "certificate verify failed")
    failure.verify_message = "self-signed certificate"

    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(http.client.HTTPSConnection, "request", fail)
    monkeypatch.setenv("SERVERLESS_LLM_URL", "https://gpu.invalid")
    outcome = cli("ls")
    assert outcome.status == 69
    assert "the certificate of https://gpu.invalid is not trusted here (self-signed certificate)" in outcome.err
    assert "SSL_CERT_FILE" in outcome.err


@contextlib.contextmanager
def listening(meet: Callable[[socket.socket], object]) -> Iterator[int]:
    """A port where one connection is met so, then closed."""
    with socket.create_server(("127.0.0.1", 0)) as there:

        def wait() -> None:
            one, _ = there.accept()
            with one:
                meet(one)

        thread = threading.Thread(target=wait)
        thread.start()
        yield there.getsockname()[1]
        thread.join()


# --- deploy and rm ---


def test_deploy_a_directory(cli: CommandLine, running: Scripted, tmp_path: Path) -> None:
    running.answers["PUT", "/admin/models/a%2Fb"] = (200, {"name": "a/b"})
    outcome = cli(
        "deploy", "a/b", str(tmp_path), "--keep-alive", "5m", "--pinned", "--max-replicas", "2", "--verify", "full"
    )
    assert (outcome.status, outcome.out) == (0, f"a/b: {running.url}/models/a/b/v1\n")
    body = {"source": str(tmp_path), "keep_alive": "5m", "pinned": True, "max_replicas": 2, "verify": "full"}
    assert outcome.err == ""
    assert running.seen[-1][:3] == ("PUT", "/admin/models/a%2Fb", body)


def test_deploy_says_that_a_model_cannot_chat(cli: CommandLine, running: Scripted, tmp_path: Path) -> None:
    running.answers["PUT", "/admin/models/m"] = (200, {"name": "m", "chat": False})
    outcome = cli("deploy", "m", str(tmp_path))
    assert (outcome.status, outcome.out) == (0, f"m: {running.url}/models/m/v1\n")
    assert "no chat template" in outcome.err
    assert "run --raw" in outcome.err


def test_an_endpoint_can_be_given_to_any_client(cli: CommandLine, running: Scripted) -> None:
    running.answers["PUT", "/admin/models/a%2Fn%C3%A4me"] = (200, {})
    assert cli("deploy", "a/näme", "demo-add").out == f"a/näme: {running.url}/models/a/n%C3%A4me/v1\n"


def test_deploy_prints_the_endpoint_that_clients_reach(cli: CommandLine, server: Scripted, tmp_path: Path) -> None:
    """With TLS the command line has a port of its own."""
    head = {"url": server.url, "public": "https://gpu.example:8000", "generation": 1, "pid": os.getpid()}
    (tmp_path / "head.json").write_text(json.dumps(head))
    server.answers["PUT", "/admin/models/m"] = (200, {})
    assert cli("deploy", "m", str(tmp_path)).out == "m: https://gpu.example:8000/models/m/v1\n"


def test_hub_ids_need_a_library(cli: CommandLine, running: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    outcome = cli("deploy", "m", "owner/name")
    assert outcome.status == 78
    assert "pip install -c constraints.txt '.[hub]'" in outcome.err


def test_paths_mean_what_they_do_on_the_servers_machine(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SERVERLESS_LLM_URL", "http://gpu.invalid:8000")
    for source in ("owner/name", "demo-add", "."):
        outcome = cli("deploy", "m", source)
        assert outcome.status == 2
        assert "the server is on another machine: name a directory there by its absolute path" in outcome.err
    assert cli("deploy", "m", "/models/there/alone").status == 69  # it is asked
    assert models.spec_of("/models/there/alone", Server("", local=False)) == {"source": "/models/there/alone"}


def test_a_directory_that_is_gone_is_told_before_what_the_hub_says(
    cli: CommandLine, running: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    outcome = cli("deploy", "m", "models/gone")
    assert outcome.err.startswith("Error: there is no directory models/gone here, and of the hub: ")


def test_deploy_a_demo_by_its_name(cli: CommandLine, running: Scripted) -> None:
    running.answers["PUT", "/admin/models/demo-add"] = (200, {"name": "demo-add"})
    outcome = cli("deploy", "demo-add", "--json")
    assert json.loads(outcome.out) == {"name": "demo-add"}
    assert running.seen[-1][2] == {"source": str(tasks.checkpoint_dir("demo-add"))}


def test_a_url_is_announced_only_where_the_server_believes_it(
    cli: CommandLine, running: Scripted, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    theirs = tmp_path / "theirs" / "serverless-llm" / "remote"
    running.answers["GET", "/admin/status"] = (200, {"models": [], "disk_tier": str(theirs)})
    running.answers["GET", "/v1/models"] = (200, {"data": []})
    running.answers["PUT", "/admin/models/m"] = (200, {})
    files = {f"m/{path.name}": path.read_bytes() for path in tasks.checkpoint_dir("demo-add").iterdir()}
    with RangeServer(files) as store:
        url = f"{store.url}/m"
        for refused in (cli("deploy", "m", url), cli("run", url, "1")):
            assert (refused.status, refused.out) == (78, "")
            assert f"give this command XDG_CACHE_HOME={tmp_path / 'theirs'}\n" in refused.err
        assert (store.gets, (tmp_path / "mine").exists()) == ([], False)
        theirs.mkdir(parents=True)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "linked"))
        (tmp_path / "linked").symlink_to(tmp_path / "theirs")
        assert cli("deploy", "m", url).status == 0
        (method, _, body, _) = running.seen[-1]
        assert method == "PUT"
        assert Path(body["source"]).is_relative_to(theirs)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
        there = [{"name": "there", "source": body["source"], "url": url}]
        running.answers["GET", "/admin/status"] = (200, {"models": there, "disk_tier": str(theirs), "problems": []})
        cli("run", url, "1")  # deployed already
        assert running.seen[-1][2]["model"] == "there"


def test_deploy_over_a_name_says_what_it_replaces(cli: CommandLine, running: Scripted) -> None:
    running.answers["GET", "/admin/models/m"] = (200, ROW)
    running.answers["PUT", "/admin/models/m"] = (200, ROW)
    outcome = cli("deploy", "m", "demo-add")
    assert outcome.status == 0
    assert "m was deployed already from /models/m and is replaced; what was not given is at its default" in outcome.err
    again = cli("deploy", "m", "/models/m")
    assert again.status == 2  # nothing is there
    running.answers["GET", "/admin/models/m"] = (200, ROW | {"source": str(tasks.checkpoint_dir("demo-add"))})
    assert "m was deployed already and is replaced" in cli("deploy", "m", "demo-add").err
    running.answers["GET", "/admin/models/m"] = (200, ROW | {"url": "s3://bucket/m"})
    assert "m was deployed already from s3://bucket/m and is replaced" in cli("deploy", "m", "demo-add").err


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("/models/a", "/models/a/", True),
        ("/models/a", "/models/b", False),
        ("/cache/models--o--n/snapshots/1", "/cache/models--o--n/snapshots/2", True),
        ("/cache/models--o--n/snapshots/1", "/cache/models--o--m/snapshots/1", False),
        ("/cache/remote/1/2/checkpoint", "/cache/remote/1/3/checkpoint", True),
        ("/cache/remote/1/2/checkpoint", "/cache/remote/2/2/checkpoint", False),
    ],
)
def test_versions_of_one_source_are_the_same_source(one: str, other: str, expected: bool) -> None:
    assert same(one, other) == expected


def test_deploy_without_a_name_of_its_own_replaces_nothing_else(cli: CommandLine, running: Scripted) -> None:
    running.answers["GET", "/admin/models/demo-add"] = (200, ROW)
    outcome = cli("deploy", "demo-add")
    assert outcome.status == 1
    assert "'demo-add' is deployed from /models/m: name what is to be replaced" in outcome.err
    assert [seen[0] for seen in running.seen] == ["GET"]


def test_deploy_where_looking_is_refused(cli: CommandLine, running: Scripted) -> None:
    running.answers["GET", "/admin/models/m"] = (401, {"error": {"message": "no key", "code": "invalid_api_key"}})
    outcome = cli("deploy", "m", "demo-add")
    assert outcome.status == 1
    assert "no key" in outcome.err
    assert len(running.seen) == 1


@pytest.mark.parametrize(
    "source",
    ["owner/de--mo", "owner/demo.git", "owner/demo-", "owner/demo@../../v1", "owner/demo@/v1", f"owner/{'x' * 97}",
     "~nobody-has-this-name/model"],
)  # fmt: skip
def test_what_no_hub_can_name_is_no_source(source: str) -> None:
    with pytest.raises(click.UsageError, match="is neither a directory nor"):
        resolve(source)
    assert not is_source(source)


def test_deploy_refuses_what_is_no_source(cli: CommandLine, running: Scripted) -> None:
    outcome = cli("deploy", "m", "/nowhere/at/all")
    assert outcome.status == 2
    assert "neither a directory nor one of demo-count" in outcome.err
    assert "did you mean" not in outcome.err
    assert "did you mean 'demo-count'?" in cli("deploy", "m", "demo-cuont").err
    assert not running.seen


def test_deploy_refuses_what_is_no_time(cli: CommandLine, running: Scripted, tmp_path: Path) -> None:
    outcome = cli("deploy", "m", str(tmp_path), "--keep-alive", "soon")
    assert outcome.status == 2
    assert "Invalid value for '--keep-alive': 'soon' is no duration" in outcome.err
    assert not running.seen


def test_rm_says_what_it_did(cli: CommandLine, running: Scripted) -> None:
    running.answers["DELETE", "/admin/models/m"] = (200, {"configured": False})
    assert cli("rm", "m") == (0, "m: no longer deployed\n", "")


@pytest.mark.parametrize(("verb", "method"), [(("rm",), "DELETE"), (("deploy", "demo-add"), "PUT")])
def test_who_changes_a_configured_model_is_told_that_a_restart_undoes_it(
    cli: CommandLine, running: Scripted, verb: tuple[str, ...], method: str
) -> None:
    running.answers[method, "/admin/models/m"] = (200, {"configured": True})
    told = "m is in the server's configuration: a restart with that deploys it as it is there\n"
    assert cli(verb[0], "m", *verb[1:]).err == told


# --- lists ---


def test_rm_as_json(cli: CommandLine, running: Scripted) -> None:
    running.answers["DELETE", "/admin/models/m"] = (200, {})
    assert json.loads(cli("rm", "m", "--json").out) == {"id": "m", "deleted": True}


def test_ls_shows_all(cli: CommandLine, running: Scripted) -> None:
    rows(
        running,
        {},
        {"name": "long-name", "state": "failed", "error": "pickle file", "tier": "disk"},
        {"name": "n", "state": "loading", "progress": 0.5, "tier": "dram", "bytes": 12},
    )
    outcome = cli("ls")
    assert outcome.out.splitlines() == [
        "NAME       SIZE   STATE        TIER    SOURCE",
        "m          3.8MB  loaded       device  /models/m",
        "long-name  3.8MB  failed       disk    /models/m",
        "n          12B    loading 50%  dram    /models/m",
    ]
    assert [line.split()[2] for line in outcome.out.splitlines()] == ["STATE", "loaded", "failed", "loading"]
    assert outcome.err == "long-name failed: pickle file\n"


def test_ps_shows_what_holds_memory(cli: CommandLine, running: Scripted) -> None:
    rows(running, {"devices": ["node0/1", "node1/0"]}, {"name": "idle", "state": "unloaded", "devices": []})
    assert cli("ps").out.splitlines() == [
        "NAME  SIZE   STATE   TIER    DEVICE           UNTIL",
        "m     3.8MB  loaded  device  node0/1,node1/0  in use",
    ]


def test_ps_shows_what_still_leaves(cli: CommandLine, running: Scripted) -> None:
    """A removed model has its memory until its last request has ended."""
    rows(running, {}, {"name": "unloaded", "state": "unloaded", "tier": "dram", "devices": []})
    held = [
        {"model": "m", "state": "ready", "weight_bytes": 3_800_000, "running": 1},
        {"model": "removed", "state": "ready", "weight_bytes": 3_400_000, "running": 1},
        {"model": "unloaded", "state": "unloading", "weight_bytes": 12, "running": 0},
        {"model": "decided", "state": "claiming", "weight_bytes": 12, "running": 0},
    ]
    _, status = running.answers["GET", "/admin/status"]
    status["nodes"] = [{"devices": [{"device": "node0/1", "replicas": held}]}]
    assert cli("ps").out.splitlines() == [
        "NAME      SIZE   STATE    TIER    DEVICE   UNTIL",
        "m         3.8MB  loaded   device  node0/1  in use",
        "removed   3.4MB  leaving  device  node0/1  in use",
        "unloaded  12B    leaving  device  node0/1  now",
    ]
    assert [row["name"] for row in json.loads(cli("ps", "--json").out)] == ["m", "removed", "unloaded"]


def test_ps_tells_which_device_is_not_up(cli: CommandLine, running: Scripted) -> None:
    problem = "node0/0 is not up (3 boots failed): no driver"
    running.answers["GET", "/admin/status"] = (200, {"models": [], "nodes": [], "problems": [problem]})
    assert cli("ps") == (0, "NAME  SIZE  STATE  TIER  DEVICE  UNTIL\n", f"{problem}\n")


@pytest.mark.parametrize("verb", ["ls", "ps"])
def test_lists_as_json(cli: CommandLine, running: Scripted, verb: str) -> None:
    rows(running, {})
    assert json.loads(cli(verb, "--json").out) == [ROW]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"until": 1000.5}, "now"),
        ({"until": 1090.0}, "90 s"),
        ({"until": 1299.0}, "5 min"),
        ({"until": 6390.0}, "1 h 30 min"),
        ({"pinned": True}, "forever"),
        ({"keep_alive": None}, "forever"),
        ({}, "in use"),
        ({"running": 0, "waiting": 1}, "in use"),
        ({"running": 0}, "kept"),
    ],
)
def test_until(change: dict[str, Any], text: str) -> None:
    assert models.until(ROW | change, now=1000.0) == text


@pytest.mark.parametrize(("count", "text"), [(999, "999 B"), (1500, "1.5 KB"), (16_400_000_000, "16.4 GB")])
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text


# --- sources ---


def test_names_are_made_of_the_last_part(tmp_path: Path) -> None:
    (tmp_path / "_My model").mkdir()
    assert name_of(str(tmp_path / "_My model")) == "My-model"
    assert name_of("demo-count") == "demo-count"


def test_models_with_and_without_a_name(tmp_path: Path) -> None:
    expected = {"demo-add": str(tasks.checkpoint_dir("demo-add")), "mine": str(tmp_path)}
    assert named(("demo-add", f"mine={tmp_path}")) == expected


def test_root_has_no_name(cli: CommandLine, running: Scripted) -> None:
    outcome = cli("deploy", "/")
    assert outcome.status == 2
    assert "no name can be made of '/'" in outcome.err


def test_directories_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve(".") == str(tmp_path)
