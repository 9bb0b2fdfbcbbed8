"""`logs`: the order of time over several files, and following them across rotation."""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import os
import subprocess
import sys
from pathlib import Path

import pytest

from serverless_llm.cli import log, logs
from serverless_llm.errors import ConfigurationError
from serverless_llm.node.state import lock
from tests.unit.cli.conftest import CommandLine

LOCAL = "2026-11-21 07:48:{:02},000"


def head_line(second: int, **fields: object) -> str:
    stamp = {"time": f"2026-11-21T07:48:{second:02}.000", "level": "INFO", "logger": "serverless_llm.node.head"}
    return json.dumps(stamp | fields)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A state directory with the head's log and two agents'."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "head.log").write_text(
        head_line(1, message="begins")
        + "\n"
        + head_line(5, logger="serverless_llm.request", request_id="abc", status=200, ms=1.5)
        + "\n"
    )
    agent = [f"{LOCAL.format(2)} WARNING agent slow", "Traceback", f"{LOCAL.format(6)} INFO agent ends"]
    (tmp_path / "logs" / "agent-node0.log").write_text("\n".join(agent) + "\n")
    (tmp_path / "logs" / "agent-node1.log").write_text(f"{LOCAL.format(3)} INFO agent begins\n")
    return tmp_path


def test_all_logs_in_the_order_of_time(cli: CommandLine, folder: Path) -> None:
    assert cli("logs").out.splitlines() == [
        "head  2026-11-21 07:48:01,000 INFO serverless_llm.node.head begins",
        "node0  2026-11-21 07:48:02,000 WARNING agent slow",
        "node0  Traceback",
        "node1  2026-11-21 07:48:03,000 INFO agent begins",
        "head  2026-11-21 07:48:05,000 INFO serverless_llm.request request_id=abc status=200 ms=1.5",
        "node0  2026-11-21 07:48:06,000 INFO agent ends",
    ]


def test_some_of_them(cli: CommandLine, folder: Path) -> None:
    assert cli("logs", "node1", "head", "-n", "1").out.splitlines() == [
        "node1  2026-11-21 07:48:03,000 INFO agent begins",
        "head  2026-11-21 07:48:05,000 INFO serverless_llm.request request_id=abc status=200 ms=1.5",
    ]
    assert cli("logs", "-n", "0") == (0, "", "")
    (line,) = cli("logs", "--requests", "--json").out.splitlines()
    assert json.loads(line)["source"] == "head"
    assert json.loads(line)["request_id"] == "abc"
    assert json.loads(cli("logs", "node1", "--json").out)["message"].endswith("agent begins")


def test_the_last_requests_are_counted_among_requests(cli: CommandLine, folder: Path) -> None:
    with (folder / "logs" / "head.log").open("a") as log:
        log.write(head_line(8, message="ends") + "\n")
    (line,) = cli("logs", "head", "--requests", "-n", "1").out.splitlines()
    assert "request_id=abc" in line


def test_no_logs_is_a_failure(cli: CommandLine, folder: Path, tmp_path: Path) -> None:
    outcome = cli("logs", "node9")
    assert (outcome.status, outcome.err) == (
        1,
        f"Error: there are no logs of node9 in {tmp_path / 'logs'}; there are node0, node1, head\n",
    )
    other = tmp_path / "other"
    outcome = cli("logs", "node9", "--state-dir", str(other))
    assert outcome.err == f"Error: there are no logs of node9 in {other / 'logs'}\n"


def texts(lines: list[logs.Line]) -> list[str]:
    return [line.text for line in lines]


def test_following_rotation_a_cut_and_a_half_line(tmp_path: Path) -> None:
    path = tmp_path / "head.log"
    path.write_text("1\n")
    read = logs.Log(path)
    assert texts(read.last(10)) == ["1"]
    with path.open("a") as file:
        file.write("2\nhal")
    assert texts(read.more()) == ["2"]
    with path.open("a") as file:
        file.write("f\n3\n")
    path.rename(tmp_path / "head.log.1")
    path.write_text("4\nlonger than what the former file held\n")
    assert texts(read.more()) == ["half", "3", "4", "longer than what the former file held"]
    path.write_text("")  # cut in place, as agents' logs are
    assert texts(read.more()) == []
    with path.open("a") as file:
        file.write("5\n")
    assert texts(read.more()) == ["5"]
    path.unlink()
    assert texts(read.more()) == []
    path.write_text("6\n")
    assert texts(read.more()) == ["6"]
    read.close()
    again = logs.Log(path)
    assert texts(again.last(3)) == ["half", "3", "6"]
    again.close()


def test_a_log_that_begins_later_is_followed_too(folder: Path) -> None:
    known = logs.find_logs(folder, ())
    for one in known:
        one.last(0)
    coming = logs.following(folder, (), known)
    (folder / "logs" / "agent-node2.log").write_text(f"{LOCAL.format(9)} INFO agent begins\n")
    assert next(coming).source == "node2"
    for one in known:
        one.close()


def test_the_head_keeps_its_log_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with log.logged(tmp_path, verbose=False):
        logging.getLogger("a.b").info("hello %s", "you")
        logging.getLogger("a.b").info("told otherwise", extra={"fields": {"status": 200}})
        logging.getLogger("a.b").error("failed", exc_info=ValueError("bad"))
    kept = [json.loads(line) for line in (tmp_path / "head.log").read_text().splitlines()]
    assert kept == [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line.get("message") for line in kept] == ["hello you", None, "failed"]
    assert (kept[0]["level"], kept[0]["logger"], kept[1]["status"]) == ("INFO", "a.b", 200)
    assert "ValueError: bad" in kept[2]["exception"]


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    with log.logged(tmp_path / "nowhere", verbose=False):
        logging.getLogger("a.b").info("hello")
    assert not (tmp_path / "nowhere").exists()


def test_a_terminal_that_takes_nothing_holds_up_neither_the_file_nor_the_end(tmp_path: Path) -> None:
    """As after Ctrl-S, or with a pager that nobody scrolls."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    story = """
import logging, pathlib, sys
from serverless_llm.cli import log
log.PATIENCE = 0.01
with log.logged(pathlib.Path(sys.argv[1]), verbose=False):
    for word in ("one", "two"):
        logging.error(word)
"""
    subprocess.run([sys.executable, "-c", story, str(tmp_path)], stderr=writer, timeout=10, check=True)
    os.close(writer)
    os.close(reader)
    kept = [json.loads(line)["message"] for line in (tmp_path / "head.log").read_text().splitlines()]
    assert kept == ["one", "two"]


def test_a_log_that_is_behind_ends_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "BACKLOG", 1)
    with log.logged(tmp_path, verbose=False):
        for _ in range(10):
            logging.getLogger("a.b").info("hello")
    assert "hello" in (tmp_path / "head.log").read_text()


def test_the_log_is_rotated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "LIMIT", 1000)
    with log.logged(tmp_path, verbose=False):
        for _ in range(100):
            logging.getLogger("a.b").info("hello")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["head.log", "head.log.1"]
    assert all(path.stat().st_size <= 1000 for path in tmp_path.iterdir())


def test_a_second_server_writes_nothing_into_the_log_of_the_first(tmp_path: Path) -> None:
    first = lock(tmp_path / "lock", "another server")
    with pytest.raises(ConfigurationError, match="already uses"), log.logged(tmp_path, verbose=False):
        lock(tmp_path / "lock", "another server")
    os.close(first)
    assert not (tmp_path / "head.log").exists()


def test_what_ended_the_server_is_in_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = logging.getLogger().handlers[:]
    for error in (ConfigurationError("port taken"), RuntimeError("a bug")):
        with pytest.raises(type(error)), log.logged(tmp_path, verbose=False):
            raise error
    expected, unforeseen = (json.loads(line) for line in (tmp_path / "head.log").read_text().splitlines())
    assert (expected["message"], expected.get("exception")) == ("the server ended: port taken", None)
    assert "RuntimeError: a bug" in unforeseen["exception"]
    assert logging.getLogger().handlers == before
    assert capsys.readouterr().err == ""


def test_a_log_on_a_full_disk_hides_no_cause(tmp_path: Path) -> None:
    (tmp_path / "head.log").symlink_to("/dev/full")
    with pytest.raises(ConfigurationError, match="the cause"), log.logged(tmp_path, verbose=False):
        raise ConfigurationError("the cause")
