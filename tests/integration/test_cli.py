"""`serve`, `run` and `stop` as a user calls them: real processes, real signals."""

from __future__ import annotations

import http.client
import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from serverless_llm.cli.stop import STOP
from serverless_llm.demo import tasks
from serverless_llm.node.processes import STREAMING, command, environment
from tests.serving import hear_ctrl_c, until

pytestmark = pytest.mark.slow

PATIENCE = 60.0


class Serve:
    """`serverless-llm serve` with a state directory of its own, ready when made."""

    def __init__(self, state: Path, *options: str, stderr: int = subprocess.PIPE) -> None:
        self.state = state
        self.environment = environment() | {"SERVERLESS_LLM_STATE_DIR": str(state)}
        small = ["--port", "0", "--devices", "cpu:1", "--device-memory", "16MiB", "--dram", "32MiB"]
        self.process = subprocess.Popen(
            command("serverless_llm", "serve", *small, *options),
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )

    def url(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert "serves on http://127.0.0.1:" in line
        return line.split()[-1]

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command("serverless_llm", *arguments),
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=PATIENCE)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Serve]:
    serve = Serve(tmp_path / "state", "--model", "demo-reverse")
    yield serve
    serve.end()


def agents(state: Path) -> list[int]:
    return [int((path.read_text() or "0").strip() or 0) for path in (state / "agents").glob("*.lock")]


def test_serve_run_list_and_stop(served: Serve) -> None:
    url = served.url()
    assert json.loads((served.state / "head.json").read_text())["url"] == url
    answer = served.cli("run", "demo-reverse", "hello")
    assert (answer.returncode, answer.stdout) == (0, "olleh\n")
    assert "cold start" in answer.stderr
    assert "warm" in served.cli("run", "demo-reverse", "abc").stderr
    (row,) = json.loads(served.cli("ps", "--json").stdout)
    assert (row["name"], row["state"], row["devices"]) == ("demo-reverse", "loaded", ["node0/0"])
    bad = served.state / "bad"
    shutil.copytree(tasks.checkpoint_dir("demo-reverse"), bad)
    (bad / "chat_template.jinja").write_text("{% if %}")
    answer = served.cli("deploy", "bad", str(bad))
    assert answer.returncode == 1
    assert "chat template does not compile" in answer.stderr
    assert served.cli("rm", "demo-reverse").returncode == 0
    assert json.loads(served.cli("ls", "--json").stdout) == []
    (agent,) = agents(served.state)
    below = psutil.Process(agent).children(recursive=True)
    assert psutil.Process(agent).environ().items() >= STREAMING.items()
    assert not any("GLIBC_TUNABLES" in child.environ() for child in below)
    named = [child.cmdline() for child in below]
    assert ["worker node0/0 (serverless-llm)"] in [[text for text in line if text] for line in named]
    assert served.cli("stop").stdout == f"stopped the server (pid {served.process.pid})\n"
    assert served.process.wait(PATIENCE) == 0
    assert not is_alive(agent)
    assert served.cli("ls").returncode == 69


def streamed(url: str, tokens: int) -> http.client.HTTPResponse:
    """A stream of so many tokens, which has begun."""
    body = {"model": "demo-reverse", "prompt": "a", "max_tokens": tokens, "ignore_eos": True, "stream": True}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode())
    stream: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=PATIENCE)
    assert stream.readline().startswith(b"data: ")
    return stream


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_the_status_and_what_is_not_drained_is_told(tmp_path: Path, number: int, status: int) -> None:
    serve = Serve(tmp_path / "state", "--model", "demo-reverse", "--drain", "50ms")
    with streamed(serve.url(), 900) as stream:
        serve.process.send_signal(number)
        assert b'"the server is stopping"' in stream.read()
    assert serve.process.wait(PATIENCE) == status
    assert f"stopping: {signal.Signals(number).name}" in (serve.state / "logs" / "head.log").read_text()
    serve.end()


def test_a_server_whose_terminal_closes_ends_as_if_told_to(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    serve = Serve(tmp_path / "state", "--model", "demo-reverse", stderr=theirs)
    with streamed(serve.url(), 100) as stream:
        (agent,) = agents(serve.state)
        os.close(theirs)
        os.close(ours)
        serve.process.send_signal(signal.SIGHUP)
        assert stream.read().endswith(b"data: [DONE]\n\n")  # it had its time
    assert serve.process.wait(PATIENCE) == 128 + signal.SIGHUP
    assert not is_alive(agent)
    serve.end()


def test_a_second_stop_joins_the_drain_of_which_the_terminal_is_told(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    serve = Serve(tmp_path / "state", "--model", "demo-reverse", stderr=theirs)
    with streamed(serve.url(), 300) as stream:
        serve.process.send_signal(STOP)
        told = b""
        while b"draining: 1 request is running, for at most" not in told:
            told += os.read(ours, 65536)
        serve.process.send_signal(STOP)
        assert stream.read().endswith(b"data: [DONE]\n\n")
    assert serve.process.wait(PATIENCE) == 0
    serve.end()
    os.close(theirs)
    os.close(ours)


def test_second_signal_ends_at_once(served: Serve) -> None:
    with streamed(served.url(), 900) as stream:
        (agent,) = agents(served.state)
        assert served.cli("stop", "--now").returncode == 0
        with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
            stream.read()
    assert served.process.wait(PATIENCE) == 0
    assert not is_alive(agent)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_two_servers_on_one_state_directory(served: Serve) -> None:
    served.url()
    second = served.cli("serve", "--port", "0")
    assert second.returncode == 78
    assert f"(pid {served.process.pid}) already uses" in second.stderr


def test_a_taken_port_is_a_bad_configuration(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        serve = Serve(tmp_path / "state", "--port", str(port))
        _, errors = serve.process.communicate(timeout=PATIENCE)
    assert serve.process.returncode == 78
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in errors
    assert "choose another --port, 0 takes a free one" in errors


def test_a_model_that_cannot_be_served_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    serve = Serve(tmp_path / "state", "--model", f"bad={tmp_path / 'empty'}")
    _, errors = serve.process.communicate(timeout=PATIENCE)
    assert serve.process.returncode == 78
    assert str(tmp_path / "empty") in errors


def test_off_loopback_a_key_is_made_and_found(tmp_path: Path) -> None:
    serve = Serve(tmp_path / "state", "--host", "0.0.0.0", "--model", "demo-reverse")
    try:
        url = serve.url()
        key_file = tmp_path / "state" / "api-key"
        assert serve.process.stdout is not None
        assert serve.process.stdout.readline() == f"clients need the key in {key_file}\n"
        assert key_file.stat().st_mode & 0o777 == 0o600
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{url}/v1/models", timeout=PATIENCE)
        assert serve.cli("run", "demo-reverse", "key", "-q").stdout == "yek\n"
        assert key_file.read_text() not in Path(f"/proc/{serve.process.pid}/cmdline").read_text()
    finally:
        serve.end()


def test_run_without_a_server_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "tmp"
    folder.mkdir()
    surroundings = environment() | {"SERVERLESS_LLM_STATE_DIR": str(tmp_path / "state"), "TMPDIR": str(folder)}
    surroundings |= {"SERVERLESS_LLM_DRAM": "32MiB", "SERVERLESS_LLM_DEVICES": "cpu:1"}
    done = subprocess.run(
        command("serverless_llm", "run", "demo-reverse", "stressed"),
        env=surroundings, capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "desserts\n")
    assert " s to start the server | cold start" in done.stderr
    assert list(folder.iterdir()) == []
    assert not any(str(folder) in line for line in command_lines())


def command_lines() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_text())
        except OSError:
            continue
    return found


def test_module_runs_as_the_script_does() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "serverless_llm", "--help"], capture_output=True, text=True, env=os.environ, check=True
    )
    assert done.stdout.startswith("Usage: serverless-llm")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_run_that_is_ended_leaves_nothing(tmp_path: Path, number: int) -> None:
    folder = tmp_path / "tmp"
    folder.mkdir()
    surroundings = environment() | {"SERVERLESS_LLM_STATE_DIR": str(tmp_path / "state"), "TMPDIR": str(folder)}
    surroundings |= {"SERVERLESS_LLM_DRAM": "32MiB", "SERVERLESS_LLM_DEVICES": "cpu:1"}
    with subprocess.Popen(
        command("serverless_llm", "run", "demo-count", "1 2 3"),
        env=surroundings, stdout=subprocess.PIPE, preexec_fn=hear_ctrl_c,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.read(1)  # it answers
        process.send_signal(number)
        process.stdout.read()
        assert process.wait(PATIENCE) == (-number if number == signal.SIGKILL else 128 + number)
    if number == signal.SIGKILL:  # its server, which hears of its end, puts away everything
        until(lambda: list(folder.iterdir()) == [], "the end of its server", PATIENCE)
        until(lambda: not any(str(folder) in line for line in command_lines()), "the end of its processes", PATIENCE)
    assert list(folder.iterdir()) == []
    assert not any(str(folder) in line for line in command_lines())


def test_logs_are_kept_and_followed(served: Serve) -> None:
    served.url()
    with subprocess.Popen(
        command("serverless_llm", "logs", "head", "-f", "--requests", "--json"),
        env=served.environment, stdout=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c,
    ) as follow:  # fmt: skip
        assert follow.stdout is not None
        served.cli("run", "demo-reverse", "canary", "-q")
        lines = (json.loads(line) for line in follow.stdout)
        line = next(line for line in lines if line.get("model"))
        follow.send_signal(signal.SIGINT)
        assert follow.wait(PATIENCE) == 130
    assert (line["source"], line["model"], line["end"]) == ("head", "demo-reverse", "stop")
    assert "canary" not in (served.state / "logs" / "head.log").read_text()
    assert "joined: pid" in served.cli("logs").stdout


def test_a_shell_completes_verbs_and_models(served: Serve, tmp_path: Path) -> None:
    served.url()
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "serverless-llm"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m serverless_llm "$@"\n')
    script.chmod(0o755)
    lines = """
        eval "$(serverless-llm completion bash)"
        ask() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _serverless_llm_completion "$1"
                echo "${COMPREPLY[@]}"; }
        ask serverless-llm mak
        ask serverless-llm rm demo
    """
    done = subprocess.run(
        ["bash", "-c", lines], env=served.environment | {"PATH": f"{folder}:{os.environ['PATH']}"},
        capture_output=True, text=True, timeout=PATIENCE, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["make-checkpoint", "demo-reverse"]
