"""`show` and `top` of a scripted server, and of sources without one."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from serverless_llm.cli.top import headline
from serverless_llm.demo import tasks
from serverless_llm.loader import disk_tier
from serverless_llm.loader.manifest import CHECKPOINT
from serverless_llm.node.processes import command, environment
from tests.unit.cli.conftest import CommandLine, Scripted

SOURCE = str(tasks.checkpoint_dir("demo-add"))
ROW = {
    "name": "m", "source": SOURCE, "checkpoint": "c", "dtype": "float32", "context": 512, "bytes": 3_000_000_000,
    "state": "loaded", "tier": "device", "progress": 1.0, "error": "", "devices": ["node0/1"], "keep_alive": 300.0,
    "pinned": False, "until": None, "estimate_s": None, "waiting": 2, "running": 1, "min_replicas": 1,
    "verify": "off", "remote_bytes": 0, "url": "", "max_replicas": 2, "max_concurrency": 64, "max_queue": 1024,
}  # fmt: skip
DEVICE = {
    "device": "node0/1", "kind": "cpu", "weights": "view", "problem": "",
    "memory": {"weights": 3_000_000_000, "kv": 5_000_000, "free": 10}, "sequences": [{}], "replicas": [{"model": "m"}],
}  # fmt: skip
NODE = {
    "node": "node0", "state": "up", "dram": 8_000_000_000, "dram_used": 1_000_000_000, "bandwidth": {"disk": 1e9},
    "overhead_s": 0.02, "digests": [], "own_bytes": {}, "lent_bytes": {},
    "resident": [{"checkpoint": "c", "bytes": 1_000_000_000}], "devices": [DEVICE],
}  # fmt: skip
TRAFFIC = {
    "tokens_per_s": [0.0, 12.0], "requests_per_s": [0.0, 1.5], "errors_per_s": [0.0, 0.0],
    "first_token_p50_ms": [None, 31.0], "first_token_p95_ms": [None, 44.0],
}  # fmt: skip


@pytest.fixture
def busy(running: Scripted) -> Scripted:
    """A server with one node, one device and one model."""
    status = {"models": [ROW], "nodes": [NODE], "problems": ["node0/2 is not up"], "traffic": TRAFFIC}
    running.answers["GET", "/admin/status"] = (200, status)
    running.answers["GET", "/admin/models/m"] = (200, ROW)
    return running


# --- show ---


def test_show_a_deployed_model(cli: CommandLine, busy: Scripted) -> None:
    told = json.loads(cli("show", "m", "--json").out)
    assert told["deployed"] == ROW
    assert told["estimate"] == {"start_s": 2.02, "from_dram_s": 0.02}
    assert told["checkpoint"]["architecture"] == "Qwen3ForCausalLM"
    assert (told["checkpoint"]["dtypes"], told["checkpoint"]["served"]) == (["F32"], "float32")
    assert told["checkpoint"]["context"] == 1024
    lines = [line.split(maxsplit=1) for line in cli("show", "m").out.splitlines()[1:]]
    assert ["status", "loaded"] in lines
    assert next(text for name, text in lines if name == "files").endswith("F32 in the file, float32 when served")
    assert ["next", "start    about 2.0 s; 20 ms from DRAM"] in lines
    assert ["requests", "1 running, 2 waiting"] in lines
    assert ["replicas", "at least 1, at most 2"] in lines
    assert ["limits", "64 requests at a time in each replica, 1024 waiting"] in lines
    busy.answers["GET", "/admin/models/m"] = (200, ROW | {"pinned": True})
    assert "forever, pinned\n" in cli("show", "m").out


def test_show_writes_times_as_lists_do_and_says_what_auto_comes_to(cli: CommandLine, busy: Scripted) -> None:
    changed = ROW | {"dtype": "auto", "keep_alive": 300.0, "until": time.time() + 300.0}
    busy.answers["GET", "/admin/models/m"] = (200, changed)
    told = cli("show", "m").out
    assert re.search(r"\n  dtype +auto \(float32\)\n", told)
    assert re.search(r"\n  until +5 min\n", told)
    assert re.search(r"\n  keep alive +5 min\n", told)
    busy.answers["GET", "/admin/models/m"] = (200, changed | {"source": "/gone"})
    assert re.search(r"\n  dtype +auto\n", cli("show", "m").out)


def test_show_tells_of_what_is_verified_and_whether_it_can_be(cli: CommandLine, busy: Scripted) -> None:
    assert "verify" not in cli("show", "m").out
    busy.answers["GET", "/admin/models/m"] = (200, ROW | {"verify": "sample"})
    assert "verify        sample; the next start learns the digests\n" in cli("show", "m").out
    _, status = busy.answers["GET", "/admin/status"]
    nodes = [NODE | {"digests": ["b", "c"]}, NODE | {"node": "node1"}]
    busy.answers["GET", "/admin/status"] = (200, status | {"nodes": nodes})
    assert "verify        sample; digests known on node0\n" in cli("show", "m").out
    assert json.loads(cli("show", "m", "--json").out)["digests"] == ["node0"]


def test_show_tells_what_no_other_model_has(cli: CommandLine, busy: Scripted) -> None:
    assert "own bytes" not in cli("show", "m").out
    _, status = busy.answers["GET", "/admin/status"]
    nodes = [NODE | {"own_bytes": {"b": 1, "c": 6_300_000}}, NODE | {"node": "node1"}]
    busy.answers["GET", "/admin/status"] = (200, status | {"nodes": nodes})
    assert "own bytes     6.3 MB on node0\n" in cli("show", "m").out
    assert json.loads(cli("show", "m", "--json").out)["own_bytes"] == {"node0": 6_300_000}


def test_show_estimates_the_copy_to_a_device(cli: CommandLine, busy: Scripted) -> None:
    _, status = busy.answers["GET", "/admin/status"]
    node: dict[str, Any] = NODE | {"devices": [DEVICE | {"weights": "copy"}], "bandwidth": {"upload": 1e9}}
    busy.answers["GET", "/admin/status"] = (200, status | {"nodes": [node]})
    assert json.loads(cli("show", "m", "--json").out)["estimate"] == {"start_s": 3.02, "from_dram_s": 3.02}
    busy.answers["GET", "/admin/status"] = (200, status | {"nodes": []})
    assert json.loads(cli("show", "m", "--json").out)["estimate"] is None


def test_show_estimates_without_what_others_lend(cli: CommandLine, busy: Scripted) -> None:
    _, status = busy.answers["GET", "/admin/status"]
    nodes = [NODE | {"lent_bytes": {"c": 1_500_000_000}}]
    busy.answers["GET", "/admin/status"] = (200, status | {"nodes": nodes})
    assert json.loads(cli("show", "m", "--json").out)["estimate"] == {"start_s": 0.52, "from_dram_s": 0.02}
    busy.answers["GET", "/admin/models/m"] = (200, ROW | {"verify": "full"})  # is read whole
    assert json.loads(cli("show", "m", "--json").out)["estimate"] == {"start_s": 2.02, "from_dram_s": 0.02}


def test_show_estimates_what_comes_from_a_server_by_its_link(cli: CommandLine, busy: Scripted) -> None:
    _, status = busy.answers["GET", "/admin/status"]
    busy.answers["GET", "/admin/models/m"] = (200, ROW | {"remote_bytes": 2_500_000_000})  # DRAM has 1 GB
    assert json.loads(cli("show", "m", "--json").out)["estimate"] == {"start_s": 16.02, "from_dram_s": 0.02}
    nodes = [NODE | {"bandwidth": {"disk": 1e9, "remote": 5e8}}]
    busy.answers["GET", "/admin/status"] = (200, status | {"nodes": nodes})
    assert json.loads(cli("show", "m", "--json").out)["estimate"] == {"start_s": 4.02, "from_dram_s": 0.02}
    busy.answers["GET", "/admin/models/m"] = (200, ROW | {"remote_bytes": 250_000_000})
    assert json.loads(cli("show", "m", "--json").out)["estimate"] == {"start_s": 1.77, "from_dram_s": 0.02}


def test_show_tells_how_much_the_disk_lacks(cli: CommandLine, busy: Scripted) -> None:
    assert "only" not in cli("show", "m").out
    busy.answers["GET", "/admin/models/m"] = (200, ROW | {"remote_bytes": 13_000_000})
    assert "  on the server only  13.0 MB\n" in cli("show", "m").out


def test_show_a_model_whose_files_are_gone(cli: CommandLine, busy: Scripted) -> None:
    busy.answers["GET", "/admin/models/m"] = (200, ROW | {"source": "/nowhere", "state": "failed", "error": "gone"})
    outcome = cli("show", "m")
    assert outcome.status == 0
    assert "failed: gone" in outcome.out
    assert "next start" not in outcome.out
    assert "512 tokens" in outcome.out
    busy.answers["GET", "/admin/models/m"] = (200, ROW | {"source": "/nowhere", "state": "failed", "context": 0})
    assert "0 tokens" not in cli("show", "m").out
    assert "/nowhere: No such file or directory" in outcome.out


def test_show_says_once_why_a_model_failed(cli: CommandLine, busy: Scripted) -> None:
    why = "/nowhere: No such file or directory"
    for error in (why, f"{why}; it is tried again once a minute"):
        busy.answers["GET", "/admin/models/m"] = (200, ROW | {"source": "/nowhere", "state": "failed", "error": error})
        outcome = cli("show", "m")
        assert f"failed: {error}\n" in outcome.out
        assert outcome.out.count(why) == 1


@pytest.mark.parametrize("directory", [SOURCE, "/nowhere"])
def test_show_tells_the_url_of_a_model_and_where_its_files_are(
    cli: CommandLine, busy: Scripted, directory: str
) -> None:
    assert f"  source        {SOURCE}\n" in cli("show", "m").out
    assert "directory" not in cli("show", "m").out
    busy.answers["GET", "/admin/models/m"] = (200, ROW | {"source": directory, "url": "s3://bucket/m"})
    lines = [line.split() for line in cli("show", "m").out.splitlines()]
    assert [words[1:] for words in lines if words[0] in ("source", "directory")] == [["s3://bucket/m"], [directory]]
    told = json.loads(cli("show", "m", "--json").out)["checkpoint"]
    assert (told["source"], told["url"]) == (directory, "s3://bucket/m")


def test_show_reads_no_file_here_of_a_server_elsewhere(
    cli: CommandLine, busy: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serverless_llm.cli.client.LOOPBACK", frozenset())
    outcome = cli("show", "m")
    assert outcome.status == 0
    assert "on the server's machine" in outcome.out
    assert "Qwen3" not in outcome.out


def test_show_a_source_without_a_server(cli: CommandLine) -> None:
    outcome = cli("show", "demo-add")
    assert outcome.status == 0
    assert "not deployed" in outcome.out
    assert "Qwen3ForCausalLM: 3 layers of 128, vocabulary of 264" in outcome.out


def test_show_names_a_source_whose_tensors_do_not_fit_its_config(cli: CommandLine, tmp_path: Path) -> None:
    source = tmp_path / "m"
    shutil.copytree(SOURCE, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    outcome = cli("show", str(source))
    assert outcome.status == 1
    assert outcome.err.startswith(f"Error: {source}: tensor model.embed_tokens.weight has shape ")


def test_show_a_source_that_is_not_deployed(cli: CommandLine, busy: Scripted) -> None:
    busy.answers["GET", "/admin/models/demo-count"] = (404, {"error": {"message": "no model", "code": "x"}})
    assert "not deployed" in cli("show", "demo-count").out


def test_show_a_source_that_is_deployed_under_a_name(cli: CommandLine, busy: Scripted) -> None:
    busy.answers["GET", "/admin/models/demo-add"] = (404, {"error": {"message": "no model", "code": "x"}})
    outcome = cli("show", "demo-add")
    assert outcome.out.splitlines()[1].split() == ["name", "m"]


def test_show_a_url_that_is_deployed_in_an_older_version(
    cli: CommandLine, busy: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url = "http://127.0.0.1:1/sm"
    place = disk_tier.tier().home(url) / "newer"
    shutil.copytree(SOURCE, place / CHECKPOINT)
    (place / disk_tier.URL).write_text(url)
    assert "not deployed" in cli("show", url).out
    _, status = busy.answers["GET", "/admin/status"]
    rows = [ROW | {"name": "other", "url": "http://127.0.0.1:1/other"}, ROW | {"url": url}]
    busy.answers["GET", "/admin/status"] = (200, status | {"models": rows})
    assert cli("show", f"{url}/").out.splitlines()[1].split() == ["name", "m"]


def test_show_what_is_not_there(cli: CommandLine, busy: Scripted) -> None:
    busy.answers["GET", "/admin/models/n"] = (404, {"error": {"message": "no model 'n' is deployed", "code": "x"}})
    outcome = cli("show", "n")
    assert (outcome.status, outcome.err) == (1, "Error: no model 'n' is deployed\n")


def test_show_a_name_without_a_server_is_69(cli: CommandLine) -> None:
    assert cli("show", "n").status == 69


def test_show_a_directory_that_cannot_be_served(cli: CommandLine, tmp_path: object) -> None:
    outcome = cli("show", str(tmp_path))
    assert outcome.status == 1
    assert "has neither model.safetensors nor" in outcome.err


# --- top ---


def test_top_in_a_pipe_is_printed_once(cli: CommandLine, busy: Scripted) -> None:
    outcome = cli("top")
    assert outcome.status == 0
    lines = [line.split() for line in outcome.out.splitlines()]
    assert outcome.out.startswith(
        "12.0 tokens/s, 1.5 requests/s, 0.0 errors/s, first token 31 ms (p95 44 ms), DRAM 1.0 GB"
    )
    assert ["m", "3.0GB", "loaded", "device", "node0/1", "1", "2", "in", "use"] in lines
    assert ["node0/1", "cpu", "3.0GB", "5.0MB", "10B", "1", "m"] in lines
    assert outcome.err == "node0/2 is not up\n"


def test_why_a_model_failed_stands_beside_no_column(cli: CommandLine, busy: Scripted) -> None:
    failed = ROW | {"state": "failed", "tier": "disk", "devices": [], "error": "a pickle file", "until": None}
    busy.answers["GET", "/admin/status"][1]["models"] = [failed]
    outcome = cli("top")
    assert ["m", "3.0GB", "failed", "disk", "1", "2"] in [line.split() for line in outcome.out.splitlines()]
    assert outcome.err == "node0/2 is not up\nm failed: a pickle file\n"
    busy.answers["GET", "/admin/models/m"] = (200, failed)
    assert re.search(r"\n  status +failed: a pickle file\n", cli("show", "m").out)


def test_top_as_json(cli: CommandLine, busy: Scripted) -> None:
    told = json.loads(cli("top", "--once", "--json").out)
    assert told["rates"]["tokens_per_s"] == 12.0
    assert (told["models"], told["devices"]) == ([ROW], [DEVICE])
    assert told["nodes"][0]["dram_used"] == 1_000_000_000


def test_top_of_a_server_without_traffic() -> None:
    rates = dict.fromkeys(("tokens_per_s", "requests_per_s", "errors_per_s", "first_token_p50_ms"))
    assert headline({"rates": rates, "nodes": []}).endswith("0.0 errors/s, DRAM 0 B of 0 B")


@pytest.mark.slow
def test_top_watches_on_a_terminal_and_leaves_it_as_it_was(busy: Scripted) -> None:
    there = busy.answers["GET", "/admin/status"]
    busy.answers["GET", "/admin/status"] = (503, {"error": {"message": "for a moment", "code": "overloaded"}})
    ours, theirs = pty.openpty()
    surroundings = environment() | {"SERVERLESS_LLM_URL": busy.url, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    with subprocess.Popen(
        command("serverless_llm", "top", "--interval", "0.1"), env=surroundings, stdout=theirs, stdin=theirs
    ) as process:
        os.close(theirs)
        seen = b""
        while b"for a moment" not in seen:
            seen += os.read(ours, 65536)
        busy.answers["GET", "/admin/status"] = there
        while seen.count(b"node0/1") < 4:  # twice on each of two screens
            seen += os.read(ours, 65536)
        process.send_signal(signal.SIGTERM)
        try:
            while piece := os.read(ours, 65536):
                seen += piece
        except OSError:  # EIO: the other side is closed
            pass
        os.close(ours)
        assert process.wait(30) == 143
    assert b"12.0 tokens/s" in seen
    assert seen.rstrip().endswith((b"\x1b[?1049l", b"\x1b[?25h"))  # the former screen, with a cursor
    assert b"\x1b[?1049l" in seen
    assert b"\x1b[?25h" in seen
