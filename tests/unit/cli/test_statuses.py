"""Which status a mistake ends with, and what it says: 2 on the command line, 78 in what a server is configured with."""

from __future__ import annotations

from pathlib import Path

import pytest

from serverless_llm.cli.serve import look_at_roots
from tests.unit.cli.conftest import CommandLine

USAGE = [  # a value that cannot be, whichever verb it is given to
    ("serve --port many", "Invalid value for '--port': 'many' is not a valid whole number."),
    ("logs --lines few", "Invalid value for '--lines' / '-n': 'few' is not a valid whole number."),
    ("serve --port 70000", "Invalid value for '--port'"),
    ("serve --nodes 0", "Invalid value for '--nodes'"),
    ("serve --threads -1", "Invalid value for '--threads'"),
    ("serve --devices tpu:1", "Invalid value for '--devices': 'tpu:1' is neither cpu:N nor"),
    ("serve --devices cpu:0", "'cpu:0' is neither cpu:N nor cuda:N nor auto, N from 1 on"),
    ("serve --dram lots", "Invalid value for '--dram': 'lots' is no size"),
    ("serve --device-memory 5x", "Invalid value for '--device-memory': '5x' is no size"),
    ("serve --drain soon", "Invalid value for '--drain': 'soon' is no duration"),
    ("serve --drain -1", "Invalid value for '--drain': '-1' is no duration; write seconds, 500ms, 5m, or 1h30m"),
    ("serve --hold -5", "Invalid value for '--hold': '-5' is no duration"),
    ("deploy m demo-add --keep-alive -7", "'-7' is no duration; write seconds, 500ms, 5m, 1h30m, or -1 for ever"),
    ("serve --limit disk", "Invalid value for '--limit': 'disk' is not of the form name=value"),
    ("serve --limit disk=fast", "Invalid value for '--limit': 'fast' is no rate; write 500MB/s"),
    ("serve --model no-such-model", "'no-such-model' is neither a directory nor one of demo-count"),
    ("serve --model x=demo-add --model x=demo-count", "Invalid value for '--model': 'x' is given twice"),
    ("serve --model demo-add --model demo-add=demo-count", "Invalid value for '--model': 'demo-add' is given twice"),
    ("serve --limit disk=1GB/s --limit disk=2GB/s", "Invalid value for '--limit': 'disk' is given twice"),
    ("serve --model =demo-add", "Invalid value for '--model': '' is no name of a model"),
    ("deploy mine;rm demo-add", "Invalid value for 'NAME': 'mine;rm' is no name of a model: letters, digits"),
    ("rm a//b", "Invalid value for 'NAME': 'a//b' is no name of a model"),
    ("teapot", "there is no command 'teapot'"),
    ("serve --no-such-flag", "No such option"),
    ("deploy m demo-add --min-replicas -1", "Invalid value for '--min-replicas'"),
    ("deploy m demo-add --context 0", "Invalid value for '--context'"),
    ("run demo-add x --max-tokens 0", "Invalid value for '--max-tokens'"),
    ("run demo-add x --temperature -1", "Invalid value for '--temperature'"),
    ("run demo-add x --temperature 9", "Invalid value for '--temperature'"),
    ("deploy m demo-add --min-replicas 2 --max-replicas 1", "--min-replicas is more than --max-replicas"),
    ("deploy m s3://user:password@bucket/m", "Invalid value for '[SOURCE]': a URL of bucket has a user or a password"),
    ("pull ftp://host/model", "no source begins with ftp://; there are s3://, gs://, az://, http://, https://"),
    ("stop --timeout -1", "Invalid value for '--timeout'"),
    ("logs --lines -1", "Invalid value for '--lines'"),
    ("completion tcsh", "Invalid value for '{bash|zsh|fish}'"),
    ("make-checkpoint DIR --like nothing", "nothing"),
    ("make-checkpoint DIR --like qwen3-0.6b --layers 0", "Invalid value for '--layers'"),
    ("make-checkpoint DIR --like qwen3-0.6b --layers 1 --shards 1000", "cannot fill 1000 shards"),
    ("repack nowhere DIR", "'nowhere' is neither a directory nor one of"),
    ("repack demo-add DIR --shard-size 0", "Invalid value for '--shard-size'"),
    (
        "repack demo-add DIR --shard-size 10",
        "Invalid value for '--shard-size': '10' is less than 1 MB: a bare number is of bytes; write 512MiB or 10GB",
    ),
    ("pull nothing", "'nothing' is not of the form owner/name"),
]


@pytest.mark.parametrize(("line", "message"), USAGE, ids=[line for line, _ in USAGE])
def test_a_value_that_cannot_be_is_a_usage_error(cli: CommandLine, tmp_path: Path, line: str, message: str) -> None:
    outcome = cli(*line.replace("DIR", str(tmp_path / "new")).split())
    assert outcome.status == 2
    assert message in outcome.err
    assert "Traceback" not in outcome.err


def test_no_name_at_all_is_a_usage_error(cli: CommandLine) -> None:
    outcome = cli("deploy", "", "demo-add")
    assert outcome.status == 2
    assert "'' is no name of a model" in outcome.err


CONFIGURATION = [
    ("PORT", "many", "serve", "SERVERLESS_LLM_PORT: "),
    ("PROT", "1", "serve", "did you mean 'SERVERLESS_LLM_PORT'?"),
    ("URL", "localhost:8000", "ls", "SERVERLESS_LLM_URL: 'localhost:8000' is not of the form http://host:port"),
    ("URL", "http://localhost:8000/v1/", "ps", "is what OpenAI clients take; here it ends before the /v1"),
    ("URL", "http://host:port", "ps", "SERVERLESS_LLM_URL: 'http://host:port' is not of the form"),
    ("DRAM", "1000TB", "serve", "SERVERLESS_LLM_DRAM: 1000.0 TB is more than the "),
    ("HOST", "no.such.host.invalid", "serve", "SERVERLESS_LLM_HOST: cannot listen on no.such.host.invalid port 8000: "),
    (
        "CUDA_VISIBLE_DEVICES",
        "",
        "serve --devices cuda:1",
        "--devices: cuda:1 on a machine where 0 NVIDIA GPU(s) can be seen",
    ),
    ("API_KEY", "", "serve", "SERVERLESS_LLM_API_KEY: it is empty, or the variable that it names is: give a key, or "),
    ("STATE_DIR", "/proc/nothing", "serve", "SERVERLESS_LLM_STATE_DIR: /proc/nothing: "),
]


@pytest.mark.parametrize(("name", "value", "line", "message"), CONFIGURATION, ids=lambda text: str(text)[:30])
def test_what_a_server_cannot_run_with_is_78(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch, name: str, value: str, line: str, message: str
) -> None:
    monkeypatch.setenv(name if name.startswith("CUDA") else f"SERVERLESS_LLM_{name}", value)
    monkeypatch.setenv("SERVERLESS_LLM_DEVICES", "cpu:1")
    outcome = cli(*line.split())
    assert outcome.status == 78
    assert message in outcome.err


def test_a_log_that_cannot_be_written_is_named(cli: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "logs" / "head.log").mkdir(parents=True)
    outcome = cli("serve", "--devices", "cpu:1", "--port", "0", "--state-dir", str(tmp_path))
    assert outcome.status == 78
    assert outcome.err == f"Error: --state-dir: {tmp_path}/logs/head.log: Is a directory\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keys_file: /no/such", "keys_file: keys file /no/such: No such file or directory"),
        ("devices: 'cuda:1'", "devices: cuda:1 on a machine where 0 NVIDIA GPU(s) can be seen"),
        ("host: no.such.host.invalid", "host: cannot listen on no.such.host.invalid port "),
        ("{tls_cert: /no/such, tls_key: /no/key}", "tls_cert: /no/such: No such file or directory"),
        ("tls_key: /no/key", "tls_key: tls_cert and tls_key belong together"),
    ],
)
def test_what_a_server_finds_out_later_is_named_with_its_file(
    cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    file = tmp_path / "serverless-llm.yaml"
    file.write_text(text)
    outcome = cli("serve", "--config", str(file), "--state-dir", str(tmp_path / "state"))
    assert outcome.err.splitlines()[-1].startswith(f"Error: {file}: {message}"), outcome.err
    assert outcome.status == 78


def test_a_model_root_that_is_not_there_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No error: it may be a mount that comes later."""
    look_at_roots((tmp_path, tmp_path / "no"), "--model-root")
    missing = f"there is no directory {tmp_path}/no by now: nothing can be deployed from there"
    assert [record.getMessage() for record in caplog.records] == [f"--model-root: {missing}"]


@pytest.mark.parametrize(
    ("source", "status", "message"),
    [
        ("/no/where", 78, "/no/where: No such file or directory"),
        ("own/file", 78, "own/file is a file; name its directory: own"),
        ("ftp://host/m", 1, "ftp://host/m: no source begins with ftp://"),
        ("own/model", 1, "there is no directory own/model here, and of the hub: "),
    ],
)
def test_a_model_that_is_not_there_is_named_with_its_file(
    cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, status: int, message: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "file").touch()
    file = tmp_path / "serverless-llm.yaml"
    file.write_text(f"{{port: 0, devices: 'cpu:1', device_memory: 32MiB, models: {{mine: '{source}'}}}}")
    outcome = cli("serve", "--config", str(file), "--state-dir", str(tmp_path / "state"))
    assert outcome.err.splitlines()[-1].startswith(f"Error: {file}: models: mine: {message}"), outcome.err
    assert outcome.status == status


def test_a_models_directory_is_no_state_directory(cli: CommandLine, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "model-00001-of-00002.safetensors").touch()
    (tmp_path / "config.yaml").write_text("{port: 0, devices: 'cpu:1', device_memory: 32MiB, models: {m: /no/where}}")
    outcome = cli("serve", "--config", str(tmp_path / "config.yaml"), "--state-dir", str(folder))
    assert outcome.err == f"Error: --state-dir: {folder} holds a model, not a server's state: choose another one\n"
    assert outcome.status == 78
    assert len(list(folder.iterdir())) == 1


def test_what_the_system_refuses_is_a_line_and_1(cli: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    outcome = cli("make-checkpoint", str(tmp_path / "file"), "--like", "qwen3-0.6b", "--layers", "1")
    assert outcome.status == 1
    assert "exists and is not an empty directory" in outcome.err
