"""Servers that are not what they should be, and what the command line says of each: a line and a status, no trace."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from serverless_llm.cli.client import read_head
from serverless_llm.surroundings import began, state_dir
from tests.unit.cli.conftest import CommandLine, Scripted

STATUS = ("GET", "/admin/status")
LOOKS = [("ls",), ("ps",), ("top",), ("show", "m"), ("run", "m", "x")]
ALL = [*LOOKS, ("rm", "m"), ("deploy", "m", "demo-add")]


def says(server: Scripted, answer: bytes) -> None:
    """Whatever it is asked."""
    for method in ("GET", "PUT", "POST", "DELETE"):
        for path in ("/admin/status", "/admin/models/m", "/v1/models", "/v1/chat/completions"):
            server.answers[method, path] = (200, answer)


@pytest.mark.parametrize("line", ALL, ids=lambda line: line[0])
@pytest.mark.parametrize("answer", [b"<html>hello</html>", b"\xff", b"[1]"])
def test_what_is_no_server_of_this_kind_is_told(
    cli: CommandLine, running: Scripted, line: tuple[str, ...], answer: bytes
) -> None:
    says(running, answer)
    assert cli(*line) == (69, "", f"Error: what answers at {running.url} is no serverless-llm server\n")


@pytest.mark.parametrize("line", LOOKS, ids=lambda line: line[0])
def test_a_server_of_another_version_may_lack_anything(
    cli: CommandLine, running: Scripted, line: tuple[str, ...]
) -> None:
    says(running, b"{}")
    outcome = cli(*line)
    assert outcome.status == 1
    assert outcome.err.startswith("Error: the server's answer lacks '")
    says(running, b"")
    assert cli(*line).status == 69


def test_a_server_of_another_version_is_one_that_lacks_a_key(cli: CommandLine, running: Scripted) -> None:
    running.answers[STATUS] = (200, {"models": [{"name": "m"}]})
    assert cli("ls") == (
        1, "", "Error: the server's answer lacks 'bytes': is it of another version than this command line?\n",
    )  # fmt: skip


def test_a_url_that_sends_on_is_a_bad_configuration(cli: CommandLine, running: Scripted) -> None:
    running.answers[STATUS] = (308, b"moved")
    outcome = cli("ls")
    assert outcome.status == 78
    assert f"SERVERLESS_LLM_URL: {running.url} sends on to" in outcome.err


@pytest.mark.parametrize("key", ["ключ", "one\ntwo"])
def test_a_key_that_no_request_can_hold_is_not_shown(
    cli: CommandLine, running: Scripted, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("SERVERLESS_LLM_API_KEY", key)
    outcome = cli("ls")
    assert outcome.status == 78
    assert "SERVERLESS_LLM_API_KEY holds what no request can" in outcome.err
    assert key.splitlines()[-1] not in outcome.err


def test_a_key_may_end_with_a_newline(cli: CommandLine, running: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVERLESS_LLM_API_KEY", "mine\n")
    running.answers[STATUS] = (200, {"models": [], "problems": []})
    assert cli("ls").status == 0
    assert running.seen[0][3] == "Bearer mine"


def test_nobody_is_told_to_start_a_server_on_another_machine(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVERLESS_LLM_URL", "http://127.0.0.2:1")
    outcome = cli("ls")
    assert outcome.status == 69
    assert "start one" not in outcome.err


def test_a_stream_that_is_no_json_breaks_off(cli: CommandLine, running: Scripted) -> None:
    running.answers["GET", "/v1/models"] = (200, {"data": [{"id": "m"}]})
    running.answers["POST", "/v1/chat/completions"] = (200, b"data: hello\n\n")
    outcome = cli("run", "m", "x")
    assert outcome.status == 69
    assert "broke off" in outcome.err


# --- the state directory ---


def head(folder: Path, **fields: Any) -> None:
    known = {"url": "http://127.0.0.1:1", "generation": 1, "pid": os.getpid()}
    (folder / "head.json").write_text(json.dumps(known | fields))


def test_another_process_with_the_number_of_a_dead_head_is_no_server(
    cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: heard.append(pid))
    now = began(os.getpid())
    assert now is not None
    head(tmp_path, began=now - 1)
    stopped = cli("stop")
    assert stopped.status == 69
    assert "start one" not in stopped.err
    assert heard == []
    head(tmp_path, began=now)
    assert read_head(tmp_path) is not None


@pytest.mark.parametrize("line", ["ls", "ls --state-dir DIR", "stop --state-dir DIR", "logs", "logs --state-dir DIR"])
def test_a_state_directory_of_another_user_is_named(
    cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.F_OK)
    outcome = cli(*line.replace("DIR", str(tmp_path)).split())
    assert outcome.status == 69
    assert f"{tmp_path} may not be read by this user, but by {tmp_path.owner()}: " in outcome.err
    assert outcome.err.endswith("; SERVERLESS_LLM_URL and SERVERLESS_LLM_API_KEY reach one without it\n")


def test_an_owner_without_a_name_is_a_number(cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.F_OK)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    assert f"but by user {os.geteuid()}: " in cli("ls").err


def test_a_state_directory_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert state_dir({"SERVERLESS_LLM_STATE_DIR": "~/state"}) == Path("/home/someone/state")


@pytest.mark.parametrize("line", ["stop", "logs"])
def test_what_is_of_this_machine_takes_no_url_of_another(
    cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("a server here was told to stop"))
    head(tmp_path)
    monkeypatch.setenv("SERVERLESS_LLM_URL", "http://gpu.example:8000")
    outcome = cli(line)
    assert outcome.status == 2
    assert (
        "SERVERLESS_LLM_URL names http://gpu.example:8000; for a server of this machine give --state-dir" in outcome.err
    )


def test_a_process_lives_as_long_as_one_of_its_threads() -> None:
    """Its files, locks among them, are open until then."""
    script = "import ctypes, threading; threading.Thread(target=input).start(); ctypes.CDLL(None).pthread_exit(0)"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        stat = Path(f"/proc/{process.pid}/stat")
        while stat.read_text().rpartition(")")[2].split()[0] != "Z":
            os.sched_yield()
        assert began(process.pid) is not None
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert began(process.pid) is None


def test_a_name_of_any_bytes_can_be_asked_for(cli: CommandLine, running: Scripted) -> None:
    outcome = cli("show", b"a\xff".decode("utf-8", "surrogateescape"))
    assert outcome.status == 1
    assert [path for _, path, *_ in running.seen] == ["/admin/models/a%FF"]
