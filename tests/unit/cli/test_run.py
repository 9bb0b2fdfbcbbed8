"""`run` against a running server, and `stop`."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from serverless_llm.cli import stop
from serverless_llm.cli.client import Server
from serverless_llm.cli.run import Answer, phases, standing
from serverless_llm.cli.stop import STOP
from serverless_llm.demo import tasks
from serverless_llm.loader import disk_tier
from serverless_llm.loader.manifest import CHECKPOINT
from tests.unit.cli.conftest import CommandLine, Scripted, events

URL = "http://127.0.0.1:1/m"  # where nothing listens
CHAT = ("POST", "/v1/chat/completions")
STATUS = ("GET", "/admin/status")
PHASES = {"load_disk_ms": 9, "load_queue_ms": 1.0}
USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
METRICS = {"time_to_first_token_ms": 41.26, "cold_start_ms": 31.0, "cold_start_phases": PHASES}


@pytest.fixture
def known(running: Scripted) -> Scripted:
    """A server with the model `m`, which answers `44 45`."""
    running.answers["GET", "/v1/models"] = (200, {"data": [{"id": "m"}]})
    running.answers[STATUS] = (200, {"models": [], "problems": []})
    running.answers[CHAT] = (
        200,
        events(
            {"choices": [{"delta": {"role": "assistant"}}]},
            {"choices": [{"delta": {"content": "44"}}]},
            {"choices": [{"delta": {"content": " 45"}}]},
            {"choices": [{"delta": {}, "finish_reason": "stop"}], "metrics": METRICS},
            {"choices": [], "usage": USAGE},
        ),
    )
    return running


def test_answer_on_stdout_phases_on_stderr(cli: CommandLine, known: Scripted) -> None:
    outcome = cli("run", "m", "43", "--seed", "3", "--max-tokens", "2")
    assert (outcome.status, outcome.out) == (0, "44 45\n")
    assert outcome.err.endswith("cold start 31 ms: queue 1.0 ms, disk -> DRAM 9.0 ms | time to first token 41.3 ms\n")
    assert known.seen[-1][2] == {
        "model": "m", "stream": True, "seed": 3, "max_tokens": 2, "messages": [{"role": "user", "content": "43"}],
        "stream_options": {"include_usage": True},
    }  # fmt: skip


def test_a_start_from_a_network_says_so() -> None:
    inner = {"load_queue_ms": 1.0, "load_remote_ms": 9.0, "load_disk_ms": 0.0, "load_upload_ms": 2.0}
    told = phases(Answer("", None, {}, {"cold_start_ms": 12.0, "cold_start_phases": inner}))
    assert told.endswith(": queue 1.0 ms, network -> DRAM 9.0 ms, DRAM -> device 2.0 ms")
    told = phases(Answer("", None, {}, {"cold_start_ms": 12.0, "cold_start_phases": inner | {"load_remote_ms": 0.0}}))
    assert told.endswith(": queue 1.0 ms, disk -> DRAM 0.0 ms, DRAM -> device 2.0 ms")


def test_the_whole_answer_as_json(cli: CommandLine, known: Scripted) -> None:
    outcome = cli("run", "m", "43", "--json")
    assert outcome.err == ""
    answer = json.loads(outcome.out)
    assert answer.pop("first_text_s") > 0
    assert answer == {"model": "m", "text": "44 45", "usage": USAGE, "metrics": METRICS}


def test_an_answer_of_tokens_that_are_no_text_is_told(cli: CommandLine, known: Scripted) -> None:
    usage = {"completion_tokens": 8}
    known.answers[CHAT] = (200, events({"choices": [{"delta": {}}]}, {"choices": [], "usage": usage}))
    outcome = cli("run", "m", "43")
    assert (outcome.status, outcome.out, outcome.err) == (0, "", "8 token(s), none of them text\n")
    answer = json.loads(cli("run", "m", "43", "--json").out)
    assert (answer["text"], answer["first_text_s"]) == ("", None)


def test_prompt_from_standard_input(cli: CommandLine, known: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    assert cli("run", "m", "-q") == (0, "44 45\n", "")
    assert known.seen[-1][2]["messages"][0]["content"] == "from a pipe"


@pytest.mark.parametrize(("piped", "prompt"), [(b"41 42\n", "41 42"), (b"a\nb\n\n", "a\nb"), ("ü".encode(), "ü")])
def test_a_pipe_ends_with_a_newline_that_is_no_part_of_the_prompt(
    cli: CommandLine, known: Scripted, monkeypatch: pytest.MonkeyPatch, piped: bytes, prompt: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped), "utf-8"))
    assert cli("run", "m", "-q").status == 0
    assert known.seen[-1][2]["messages"][0]["content"] == prompt


@pytest.mark.parametrize(("piped", "message"), [(b"", "is empty"), (b"\n", "is empty"), (b"\xff\xfe", "is no text")])
def test_a_pipe_without_a_prompt_is_a_usage_error(
    cli: CommandLine, known: Scripted, monkeypatch: pytest.MonkeyPatch, piped: bytes, message: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped), "utf-8"))
    outcome = cli("run", "m")
    assert outcome.status == 2
    assert f"standard input {message}" in outcome.err
    assert not known.seen


def test_bytes_that_the_locale_cannot_read_are_sent_if_they_are_utf_8(cli: CommandLine, known: Scripted) -> None:
    assert cli("run", "m", b"1 \xc3\xa4".decode("ascii", "surrogateescape"), "-q").status == 0
    assert known.seen[-1][2]["messages"][0]["content"] == "1 ä"
    asked = len(known.seen)
    outcome = cli("run", "m", b"1+\xff".decode("utf-8", "surrogateescape"), "-q")
    assert outcome.status == 2
    assert "the prompt, name or path that was given is not UTF-8: invalid start byte" in outcome.err
    assert CHAT not in [(method, path) for method, path, *_ in known.seen[asked:]]


@pytest.mark.parametrize(
    ("row", "problems", "told"),
    [
        ({"state": "unloaded"}, ["node0/0 is not up", "node0/1 is drained"], "m: unloaded, node0/0 is not up"),
        ({"state": "unloaded"}, [], "m: unloaded, no text yet"),
        ({"state": "loading", "progress": 0.25}, ["node0/1 is drained"], "m: loading 25%"),
        ({"state": "loaded"}, ["node0/1 is drained"], "m: loaded, no text yet"),
    ],
)
def test_what_an_answer_waits_for(known: Scripted, row: dict[str, object], problems: list[str], told: str) -> None:
    known.answers["GET", "/admin/models/m"] = (200, row)
    known.answers[STATUS] = (200, {"problems": problems})
    assert standing(Server(known.url), "m") == told


def test_no_prompt_on_a_terminal(cli: CommandLine, known: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    assert cli("run", "m").status == 2


def test_raw_completes_the_prompt(cli: CommandLine, known: Scripted) -> None:
    known.answers["POST", "/v1/completions"] = (200, events({"choices": [{"text": "!"}]}))
    assert cli("run", "m", "hello", "--raw", "-q").out == "!\n"
    body = known.seen[-1][2]
    assert body.pop("stream_options") == {"include_usage": True}
    assert body == {"model": "m", "stream": True, "prompt": "hello"}


def test_unknown_source_is_deployed_first(cli: CommandLine, known: Scripted) -> None:
    known.answers["PUT", "/admin/models/demo-add"] = (201, {})
    outcome = cli("run", "demo-add", "1+1")
    assert outcome.out == "44 45\n"
    assert outcome.err.startswith("demo-add is deployed now and stays so; serverless-llm rm demo-add takes it away\n")
    assert cli("run", "demo-add", "1+1", "-q").err == ""
    assert known.seen[-2][:3] == (
        "PUT", "/admin/models/demo-add", {"source": str(tasks.checkpoint_dir("demo-add"))},
    )  # fmt: skip
    assert known.seen[-1][2]["model"] == "demo-add"


def test_a_directory_that_is_deployed_under_another_name_is_not_deployed_again(
    cli: CommandLine, known: Scripted, tmp_path: Path
) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "tiny")
    rows = [
        {"name": "other", "source": "/models/other", "url": ""},
        {"name": "m", "source": str(tmp_path / "link"), "url": ""},
    ]
    known.answers[STATUS] = (200, {"models": rows, "problems": []})
    assert cli("run", str(tmp_path / "tiny"), "1", "-q") == (0, "44 45\n", "")
    assert known.seen[-1][2]["model"] == "m"
    assert {method for method, *_ in known.seen} == {"GET", "POST"}


def test_what_keeps_a_server_from_answering_is_told(cli: CommandLine, known: Scripted) -> None:
    known.answers[STATUS] = (200, {"models": [], "problems": ["node0/cpu:0 is drained"]})
    outcome = cli("run", "m", "1")
    assert (outcome.status, outcome.out) == (0, "44 45\n")
    assert outcome.err.startswith("node0/cpu:0 is drained; the answer may wait for that\n")
    assert cli("run", "m", "1", "-q").err == ""


def test_a_key_for_models_alone_is_told_no_problems(cli: CommandLine, known: Scripted) -> None:
    known.answers[STATUS] = (403, {"error": {"message": "no scope", "code": "permission_denied"}})
    assert cli("run", "m", "1")[:2] == (0, "44 45\n")


def test_a_directory_that_is_deployed_is_used_as_it_is(cli: CommandLine, known: Scripted, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    for source in (tmp_path / "m", tmp_path / "link" / "m"):
        known.answers[STATUS] = (200, {"models": [{"name": "m", "source": str(source), "url": ""}], "problems": []})
        assert cli("run", str(tmp_path / "m"), "1", "-q").status == 0
        assert known.seen[-1][2]["model"] == "m"
    assert {method for method, *_ in known.seen} == {"GET", "POST"}


def test_a_directory_of_a_deployed_name_gets_no_answer_from_another(
    cli: CommandLine, known: Scripted, tmp_path: Path
) -> None:
    (tmp_path / "m").mkdir()
    known.answers["GET", "/admin/models/m"] = (200, {"source": "/models/m", "url": ""})
    outcome = cli("run", str(tmp_path / "m"), "1")
    assert (outcome.status, outcome.out) == (1, "")
    assert f"'m' is deployed from /models/m, not from {tmp_path / 'm'}: give this one a name of its own" in outcome.err
    assert {method for method, *_ in known.seen} == {"GET"}


@pytest.fixture
def brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The disk tier has a checkpoint of `URL`; its directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = disk_tier.tier().home(URL) / "newer"
    shutil.copytree(tasks.checkpoint_dir("demo-add"), place / CHECKPOINT)
    (place / disk_tier.URL).write_text(URL)
    return place / CHECKPOINT


def test_a_url_is_what_was_deployed_from_it_under_another_name(
    cli: CommandLine, known: Scripted, brought: Path
) -> None:
    """Also when another model has the name that it would get, and after a newer version was pulled."""
    row = {"name": "other", "source": str(brought.parents[1] / "older" / CHECKPOINT), "url": URL}
    named = {"name": "m", "source": "/models/m", "url": ""}
    known.answers[STATUS] = (200, {"models": [named, row], "problems": []})
    known.answers["GET", "/admin/models/m"] = (200, named)
    assert cli("run", f"{URL}/", "1", "-q") == (0, "44 45\n", "")
    assert known.seen[-1][2]["model"] == "other"
    exact = {"name": "exact", "source": str(brought), "url": URL}
    known.answers[STATUS] = (200, {"models": [row, exact], "problems": []})
    assert cli("run", URL, "1", "-q").status == 0
    assert known.seen[-1][2]["model"] == "exact"
    known.answers[STATUS] = (200, {"models": [named], "problems": []})
    assert f"'m' is deployed from /models/m, not from {URL}: give this one" in cli("run", URL, "1").err
    assert {method for method, *_ in known.seen} == {"GET", "POST"}


def test_a_url_prefers_the_model_that_has_its_name(cli: CommandLine, known: Scripted, brought: Path) -> None:
    rows = [{"name": name, "source": str(brought), "url": URL} for name in ("other", "m")]
    known.answers[STATUS] = (200, {"models": rows, "problems": []})
    assert cli("run", URL, "1", "-q").status == 0
    assert known.seen[-1][2]["model"] == "m"


def test_an_unknown_name_is_for_the_server_to_refuse(cli: CommandLine, known: Scripted) -> None:
    known.answers[CHAT] = (404, {"error": {"message": "no model 'n' is deployed", "code": "model_not_found"}})
    assert cli("run", "n", "x") == (1, "", "Error: no model 'n' is deployed\n")


def test_error_inside_the_stream(cli: CommandLine, known: Scripted) -> None:
    known.answers[CHAT] = (200, events({"error": {"message": "the engine failed", "code": "engine_error"}}))
    outcome = cli("run", "m", "x")
    assert (outcome.status, outcome.err) == (1, "Error: the engine failed\n")


def test_unreachable_url_starts_no_server(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVERLESS_LLM_URL", "http://127.0.0.1:1")
    assert cli("run", "demo-count", "1").status == 69


@pytest.mark.parametrize("cut", [14, 30], ids=["between two lines", "in a line"])
def test_a_stream_that_breaks_off_is_no_answer(cli: CommandLine, known: Scripted, cut: int) -> None:
    whole = events({"choices": [{"text": "he"}]}, {"choices": [{"text": "llo"}]})
    known.answers["POST", "/v1/completions"] = (200, whole[:-cut])
    status, out, err = cli("run", "m", "hello", "--raw")
    assert status == 69
    assert out.startswith("he")
    assert err.startswith(f"Error: the server at {known.url} broke off before the end")


def test_a_prompt_that_is_empty_is_no_argument(cli: CommandLine) -> None:
    outcome = cli("run", "demo-count", "")
    assert outcome.status == 2
    assert "the prompt is empty" in outcome.err


def test_a_name_without_a_server_says_that_none_runs_and_how_to_start_one(cli: CommandLine) -> None:
    outcome = cli("run", "no-such-model", "x")
    assert outcome.status == 69
    assert "'no-such-model' is no directory, hub id, URL or demo checkpoint; and no server is running" in outcome.err
    assert "checkpoint; did you mean 'demo-count'?; and no" in cli("run", "demo-cuont", "x").err
    assert "start one: serverless-llm serve" in outcome.err


@pytest.mark.slow
def test_a_server_of_its_own_is_told_of_and_so_is_what_it_cannot_run_with(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVERLESS_LLM_DRAM", "lots")
    outcome = cli("run", "demo-add", "1+1")
    told, why = outcome.err.splitlines()
    assert outcome.status == 78
    assert told == "no server is running: one is started for this answer"
    assert why.startswith("Error: SERVERLESS_LLM_DRAM: 'lots' is no size")


def test_phases_of_an_answer_without_tokens_or_metrics() -> None:
    assert phases(Answer("", None, {}, {})) == "no text"
    assert phases(Answer("a", 0.5, {}, {"time_to_first_token_ms": 2.0})) == (
        "first token 0.50 s after the command | warm | time to first token 2.0 ms"
    )


def test_a_server_of_its_own_is_part_of_the_time() -> None:
    told = phases(Answer("a", 14.1, {}, {"cold_start_ms": 88.0}), start_s=13.9)
    assert told == "first token 14.10 s after the command, 13.90 s to start the server | cold start 88 ms"


# --- stop ---


def head(folder: Path, pid: int) -> None:
    (folder / "head.json").write_text(json.dumps({"url": "http://127.0.0.1:1", "generation": 1, "pid": pid}))


def test_stop_waits_for_the_end(cli: CommandLine, tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "60"])
    head(tmp_path, process.pid)
    assert cli("stop") == (0, f"stopped the server (pid {process.pid})\n", "")
    assert process.wait() == -STOP


def test_stop_now_is_more_than_two_stops(cli: CommandLine, tmp_path: Path) -> None:
    """A second `stop` waits with the first, so that it cuts nobody off."""
    deaf = "trap '' USR1; echo deaf; read forever"
    with subprocess.Popen(["sh", "-c", deaf], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        head(tmp_path, process.pid)
        assert cli("stop", "--timeout", "0").status == 1
        assert cli("stop", "--timeout", "0").status == 1
        assert process.poll() is None
        assert cli("stop", "--now", "--timeout", "5").status == 0
        assert process.wait() == -signal.SIGTERM


def test_stop_in_another_state_directory(cli: CommandLine, tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "60"])
    (tmp_path / "other").mkdir()
    head(tmp_path / "other", process.pid)
    assert cli("stop").status == 69
    assert cli("stop", "--state-dir", str(tmp_path / "other")).status == 0
    assert process.wait() == -STOP


def test_stop_tells_what_it_waits_for(cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "TELL_AFTER", 0.0)
    slow = "trap 'sleep 0.3; exit' USR1; echo slow; while :; do sleep 0.1; done"
    with subprocess.Popen(["sh", "-c", slow], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        head(tmp_path, process.pid)
        outcome = cli("stop")
        assert outcome.status == 0
        assert outcome.err == "requests still run; serverless-llm stop --now ends them at once\n"


def test_stop_gives_up(cli: CommandLine, tmp_path: Path) -> None:
    deaf = "trap '' USR1 TERM; echo deaf; read forever"
    with subprocess.Popen(["sh", "-c", deaf], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        head(tmp_path, process.pid)
        outcome = cli("stop", "--now", "--timeout", "0.1")
        assert outcome.status == 1
        assert outcome.err == f"Error: the server (pid {process.pid}) still runs after 0.1 s\n"
        assert "serverless-llm stop --now ends it at once" in cli("stop", "--timeout", "0").err
        process.kill()


def test_stop_without_a_server_is_69(cli: CommandLine, tmp_path: Path) -> None:
    head(tmp_path, 2**22 + 1)  # over the kernel's largest pid
    assert cli("stop").status == 69
