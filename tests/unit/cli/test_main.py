"""The command line as a whole: help, statuses, what an error looks like."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

from serverless_llm.__main__ import start
from serverless_llm.cli import main as cli_main
from serverless_llm.cli.main import VERBS, Verbs, cli, main
from serverless_llm.errors import CheckpointError, ConfigurationError
from serverless_llm.node.processes import command, environment
from tests.unit.cli.conftest import CommandLine


def test_help_lists_every_verb(cli: CommandLine) -> None:
    outcome = cli("--help")
    assert outcome.status == 0
    assert all(verb in outcome.out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(cli: CommandLine, verb: str) -> None:
    outcome = cli(verb, "--help")
    assert outcome.status == 0
    assert outcome.out.startswith(f"Usage: serverless-llm {verb}")


def test_version_is_told_installed_or_not(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def known(_: str) -> str:
        return "1.2.3"

    def unknown(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", known)
    assert cli("--version") == (0, "serverless-llm 1.2.3\n", "")
    monkeypatch.setattr(importlib.metadata, "version", unknown)
    assert cli("--version") == (0, "serverless-llm (a checkout that is not installed)\n", "")


def test_verbs_are_listed_without_import() -> None:
    assert Verbs().list_commands(click.Context(cli)) == list(VERBS)


def test_an_unknown_verb_is_a_usage_error(cli: CommandLine) -> None:
    outcome = cli("sreve")
    assert outcome.status == 2
    assert "there is no command 'sreve'; did you mean 'serve'?" in outcome.err


@pytest.mark.parametrize(
    ("error", "status"),
    [(ConfigurationError("bad port"), 78), (CheckpointError("no header"), 1), (KeyboardInterrupt(), 130)],
)
def test_errors_become_a_line_and_a_status(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setitem(VERBS, "fail", cli_main.Verb("main", "fail", ""))
    monkeypatch.setattr(cli_main, "fail", click.command("fail")(fail), raising=False)
    outcome = cli("fail")
    assert outcome.status == status
    assert outcome.err.strip() in {f"Error: {error}", ""}


def test_a_package_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "serverless_llm.cli.main")
    monkeypatch.setitem(sys.modules, "click", None)
    assert start() == 1
    told = "Error: serverless-llm needs click: in a clone of this project, pip install -c constraints.txt .\n"
    assert capsys.readouterr() == ("", told)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_verb_that_is_ended_puts_away_what_it_has(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    put_away: list[bool] = []

    def work() -> None:
        try:
            signal.raise_signal(number)
        finally:
            put_away.append(True)

    monkeypatch.setitem(VERBS, "work", cli_main.Verb("main", "work", ""))
    monkeypatch.setattr(cli_main, "work", click.command("work")(work), raising=False)
    former = signal.signal(number, signal.SIG_IGN)
    assert cli("work") == (0, "", "")  # as below nohup
    signal.signal(number, former)
    assert cli("work") == (status, "", "")
    assert put_away == [True, True]
    assert signal.getsignal(number) == former


@pytest.mark.slow
def test_a_pipe_that_nobody_reads_is_a_failure_without_a_word() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        command("serverless_llm", "completion", "bash"), env=environment(), stdout=writing, stderr=subprocess.PIPE,
        check=False,
    )  # fmt: skip
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.slow
@pytest.mark.parametrize(("closed", "line", "status"), [(">&-", "completion bash", 0), ("<&-", "run demo-add", 2)])
def test_a_stream_that_is_closed_is_an_empty_one(closed: str, line: str, status: int) -> None:
    script = f'"$0" -m serverless_llm {line} {closed}'
    done = subprocess.run(["bash", "-c", script, sys.executable], env=environment(), capture_output=True, check=False)
    assert done.returncode == status
    assert b"Traceback" not in done.stderr


@pytest.mark.slow
def test_an_output_that_is_full_is_one_line_and_1() -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            command("serverless_llm", "completion", "bash"), env=environment() | {"PYTHONUNBUFFERED": ""}, stdout=full,
            stderr=subprocess.PIPE, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, b"Error: [Errno 28] No space left on device\n")


@pytest.mark.slow
def test_a_letter_that_the_locale_lacks_costs_no_answer() -> None:
    script = "import sys; from serverless_llm.cli import main; main.cli.main = lambda *_, **__: print('a…b')"
    done = subprocess.run(
        [sys.executable, "-c", f"{script}; sys.exit(main.main())"], env=environment() | {"PYTHONIOENCODING": "latin-1"},
        capture_output=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, b"a?b\n")


def test_other_platforms_are_told(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    outcome = cli("ls")
    assert outcome.status == 78
    assert "Linux only" in outcome.err


def test_a_bad_configuration_is_78(cli: CommandLine, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("prot: 1\n")
    outcome = cli("serve", "--config", str(file))
    assert outcome.status == 78
    assert "did you mean 'port'" in outcome.err


def test_a_file_that_cannot_be_made_is_named_as_files_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["make-checkpoint", "/proc/none/tiny", "--like", "tiny-llama"]) == 1
    assert capsys.readouterr().err == "Error: /proc/none: No such file or directory\n"
