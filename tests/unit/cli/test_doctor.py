"""`doctor`: what it measures, what it predicts, and each reason why something would not work."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from serverless_llm.cli import checks, client, diagnosis, doctor, measure
from serverless_llm.cli.diagnosis import Rates, forecast
from serverless_llm.cluster.policy import Policy
from serverless_llm.config import Config, load
from serverless_llm.demo import tasks
from serverless_llm.domain import ModelSpec
from serverless_llm.loader.announce import announce
from serverless_llm.loader.disk_tier import tier
from serverless_llm.loader.manifest import REMOTE
from serverless_llm.node.state import Deployed, State, lock
from tests.range_server import RangeServer
from tests.unit.cli.conftest import CommandLine, Scripted

MIB = 1 << 20


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements of little data, on a logical CPU device."""
    monkeypatch.setattr(measure.disk, "__defaults__", (0.02,))
    monkeypatch.setattr(measure, "LARGE", 1 * MIB)
    monkeypatch.setattr(measure.memcpy, "__defaults__", (4 * MIB,))
    monkeypatch.setenv("SERVERLESS_LLM_DEVICES", "cpu:1")
    monkeypatch.setenv("SERVERLESS_LLM_PORT", "0")


def configured(state: Path, **flags: Any) -> Config:
    return load({"state_dir": state, "devices": "cpu:1", "port": 0, **flags}, {"HOME": "/nowhere"}, memory=1 << 30)


def deployed(state: Path, *names: str) -> None:
    """A state directory where these demo checkpoints are deployed."""
    kept = State(state)
    for name in names:
        kept.save(Deployed(ModelSpec(name, str(tasks.checkpoint_dir(name))), 0))
    kept.close()


# --- the whole ---


def test_a_fit_machine(cli: CommandLine, tmp_path: Path) -> None:
    deployed(tmp_path, "demo-add", "demo-count")
    outcome = cli("doctor", "--json")
    assert outcome.status == 0, outcome.err
    told = json.loads(outcome.out)
    assert (told["ok"], told["problems"]) == (True, [])
    assert {one["name"] for one in told["checks"]} >= {
        "versions", "state", "server", "memory", "descriptors", "memlock", "shm", "huge pages", "space", "driver",
        "disk", "memcpy",
    }  # fmt: skip
    assert told["rates"]["disk"] > 0 < told["rates"]["memcpy"]
    for model in told["models"]:
        assert 0 < model["from_dram_s"] < model["from_disk_s"]
    assert [model["name"] for model in told["models"]] == ["demo-add", "demo-count"]


def test_people_read_a_table(cli: CommandLine, tmp_path: Path) -> None:
    deployed(tmp_path, "demo-add")
    lines = cli("doctor").out.splitlines()
    assert any(line.startswith("ok    disk ") and "/s at " in line for line in lines)
    assert lines[-2].split() == ["MODEL", "SIZE", "FROM", "DISK", "FROM", "DRAM"]
    assert lines[-1].startswith("demo-add  3.1MB ")


def test_a_table_of_what_comes_from_a_network_has_a_column_more(capsys: pytest.CaptureFixture[str]) -> None:
    near = diagnosis.Forecast("near", "/near", 2_000_000, 2.0, 0.1)
    far = diagnosis.Forecast("far", "/far", 3_000_000, 3.0, 0.1, 12.0)
    doctor.table([near, far, diagnosis.Forecast("bad", "/bad", error="gone")])
    head, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert head == ["MODEL", "SIZE", "FROM", "NETWORK", "FROM", "DISK", "FROM", "DRAM"]
    assert rows[0] == ["near", "2.0MB", "-", "2.0", "s", "100", "ms"]
    assert rows[1] == ["far", "3.0MB", "12.0", "s", "3.0", "s", "100", "ms"]
    assert rows[2][-3:] == ["cannot", "be", "served"]


def test_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    found = diagnosis.Diagnosis((checks.Finding("disk", checks.FAILURE, "gone"),), Rates({}, 1.0, None), ())
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert doctor.text_of(found) == "\x1b[31mfail\x1b[0m  disk  gone"
    monkeypatch.setenv("NO_COLOR", "")
    assert "\x1b" in doctor.text_of(found)
    monkeypatch.setenv("NO_COLOR", "1")
    assert doctor.text_of(found) == "fail  disk  gone"


def test_on_a_terminal_no_word_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "serverless-llm 0.1.0, torch 2.13.0"
    found = diagnosis.Diagnosis((checks.Finding("versions", checks.FAILURE, text),), Rates({}, 1.0, None), ())
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "44")
    assert doctor.text_of(found) == f"fail  versions  {text}"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert doctor.text_of(found) == f"fail  versions  serverless-llm 0.1.0, torch\n{' ' * 16}2.13.0"


def test_what_would_not_work_is_the_status_and_the_reason(
    cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "broken"
    shutil.copytree(tasks.checkpoint_dir("demo-add"), source)
    (source / "model.safetensors").write_bytes(b"\x00")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("SERVERLESS_LLM_PORT", str(taken.getsockname()[1]))
        monkeypatch.setenv("SERVERLESS_LLM_MODELS", f"bad={source}")
        outcome = cli("doctor", "--json")
    assert outcome.status == 1
    assert "none could listen on 127.0.0.1 port" in outcome.err
    assert f"bad: {source}/model.safetensors" in outcome.err
    assert len(json.loads(outcome.out)["problems"]) == 2


def test_a_bad_configuration_is_78(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVERLESS_LLM_DRAM", "lots")
    assert cli("doctor").status == 78


def test_it_is_of_this_machine(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVERLESS_LLM_URL", "http://elsewhere:8000")
    outcome = cli("doctor")
    assert outcome.status == 2
    assert "SERVERLESS_LLM_URL names http://elsewhere:8000; for a server of this machine give" in outcome.err


def test_the_owner_of_a_state_directory_that_the_configuration_names_is_told(
    cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SERVERLESS_LLM_STATE_DIR")
    shut = tmp_path / "shut"
    shut.mkdir()
    (tmp_path / "own.yaml").write_text(f"state_dir: {shut}\n")
    monkeypatch.setattr(client, "_is_shut", lambda folder: folder == shut)
    outcome = cli("doctor", "--config", str(tmp_path / "own.yaml"))
    assert outcome.status == 69
    assert f"{shut} may not be read by this user" in outcome.err
    monkeypatch.setattr(client, "_is_shut", lambda folder: folder != shut)
    assert cli("doctor", "--config", str(tmp_path / "own.yaml")).status == 0


def test_a_damaged_database_is_78(cli: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "state.db").write_bytes(b"no database" * 100)
    outcome = cli("doctor")
    assert outcome.status == 78
    assert "state.db" in outcome.err


def test_a_running_server_is_diagnosed_as_it_runs(cli: CommandLine, tmp_path: Path, server: Scripted) -> None:
    """Not as this command line's own configuration would have it."""
    source = str(tasks.checkpoint_dir("demo-add"))
    row = {"name": "m", "source": source, "dtype": "auto", "bytes": 3_000_000, "state": "unloaded", "error": ""}
    failed = row | {"name": "big", "bytes": 614_000_000, "state": "failed", "error": "big fits on no device"}
    device = {"kind": "cpu", "budget": 100_000_000, "weights": "view", "device": "node0/0"}
    device |= {"pinned": {"bytes": 0, "refused": "operation not permitted"}}
    node = {"devices": [device, device], "dram": 200_000_000, "overhead_s": 0.02, "limits": {"disk": 1e6}}
    nodes = [node | {"bandwidth": {}}, {"devices": [], "overhead_s": 0.03, "bandwidth": {"remote": 5e6}}]
    status = {"models": [row, failed], "nodes": nodes}
    server.answers["GET", "/admin/status"] = (200, status)
    (tmp_path / "head.json").write_text(json.dumps({"url": server.url, "generation": 1, "pid": os.getpid()}))
    outcome = cli("doctor")
    assert outcome.status == 1
    assert "200.0 MB for DRAM, cpu:2 of 100.0 MB each" in outcome.out
    assert outcome.out.count("operation not permitted: its copies cost a CPU more; ulimit -l unlimited") == 2
    _, _, from_disk, _, from_dram, _ = outcome.out.splitlines()[-2].split()
    assert (from_disk, from_dram) == ("3.1", "20")  # with its cap, and what it learned
    assert json.loads(cli("doctor", "--json").out)["rates"]["remote"] == 5e6
    assert outcome.out.splitlines()[-1].split() == ["big", "614.0MB", "cannot", "be", "served"]
    assert "would not work:\n  big: big fits on no device" in outcome.err
    server.answers["GET", "/admin/status"] = (200, {"models": [row], "nodes": []})
    assert "cpu:1 of " in cli("doctor").out
    server.answers["GET", "/admin/status"] = (401, {"error": {"message": "no key"}})
    outcome = cli("doctor")
    assert outcome.status == 0
    assert "since the server did not tell of itself: no key" in outcome.out


# --- checks ---


def test_a_running_server_is_told(tmp_path: Path) -> None:
    (tmp_path / "head.json").write_text(json.dumps({"url": "http://x", "generation": 1, "pid": os.getpid()}))
    assert checks.address(configured(tmp_path)).text == f"runs at http://x, pid {os.getpid()}"


def test_agents_of_a_killed_server_are_told(tmp_path: Path) -> None:
    State(tmp_path).close()
    held = lock(tmp_path / "agents" / "node0.lock", "another agent")
    told = checks.address(configured(tmp_path))
    assert told.level == checks.WARNING
    assert told.text.endswith(f"hold their memory for up to 60 s: pid {os.getpid()}; serve takes them over")
    os.close(held)
    assert checks.address(configured(tmp_path)).level == checks.OK


def refuse(*_: object, **__: object) -> None:
    raise PermissionError("no namespaces here")


def test_what_costs_speed_is_no_ok(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda _: "always [never]\n")
    monkeypatch.setattr(subprocess, "run", refuse)
    assert checks.huge_pages(configured(tmp_path)).level == checks.WARNING
    monkeypatch.setattr(Path, "read_text", lambda _: "[always] never\n")
    assert checks.huge_pages(configured(tmp_path)).level == checks.OK


def test_a_state_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert checks.state_directory(configured(tmp_path / "file" / "state")).level == checks.FAILURE


def test_a_state_directory_that_is_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    finding = checks.state_directory(configured(tmp_path))
    assert finding.level == checks.FAILURE
    assert "holds a model, not a server's state" in finding.text
    (tmp_path / "state.db").touch()  # of a server that took it before
    assert checks.state_directory(configured(tmp_path)).level != checks.FAILURE


def test_a_state_directory_open_to_others(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    assert checks.state_directory(configured(tmp_path)).level == checks.WARNING


@pytest.mark.parametrize(
    ("limit", "level"),
    [(100, checks.FAILURE), (1024, checks.WARNING), (20_000, checks.OK), (resource.RLIM_INFINITY, checks.OK)],
)
def test_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, level: str) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, limit))  # the server raises the soft one itself
    assert checks.descriptors(configured(tmp_path)).level == level


def test_memory_that_may_not_be_pinned_matters_to_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (8 * MIB, 8 * MIB))
    assert checks.locked_memory(configured(tmp_path)).level == checks.OK
    assert checks.locked_memory(configured(tmp_path, devices="cuda:1")).level == checks.WARNING


def test_gpus_that_are_not_there(tmp_path: Path) -> None:
    (finding,) = checks.gpus(configured(tmp_path, devices="cuda:1"))
    assert finding.level == checks.FAILURE
    assert "cuda:1 is wanted, but the NVIDIA driver says" in finding.text


def test_more_memory_than_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = configured(tmp_path, weights="copy", dram="400MiB", device_memory="400MiB")
    assert checks.memory(settings).level == checks.OK
    monkeypatch.setattr(checks, "available_memory", lambda: 500 * MIB)
    assert checks.memory(settings).level == checks.FAILURE


# --- measurements and predictions ---


def test_measurements_are_of_memory_that_may_be_of_huge_pages() -> None:
    with measure.memory(4 * MIB) as buffer:
        address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        smaps = Path("/proc/self/smaps").read_text().partition(f"{address:x}-")[2]
        advised = "hg" in smaps.partition("VmFlags:")[2].splitlines()[0].split()
        assert advised == Path("/sys/kernel/mm/transparent_hugepage").exists()
        assert smaps.split()[1] == "rw-p"


def test_a_disk_is_measured_by_the_models_that_lie_on_it(tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    (source / "model.safetensors").write_bytes(os.urandom(2 * MIB + 5))
    findings, rates = diagnosis.measure(configured(tmp_path), [source, tmp_path / "gone"])
    assert [one.name for one in findings] == ["disk", "memcpy"]
    assert f"at {source}" in findings[0].text
    assert rates.disk.keys() == {tmp_path.stat().st_dev}
    assert rates.device is None


def test_scratch_leaves_nothing(tmp_path: Path) -> None:
    with measure.scratch(tmp_path, 3 * MIB) as path:
        assert path.stat().st_size == 3 * MIB
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_nothing_can_be_written_to_is_told() -> None:
    findings, rates = diagnosis.measure(configured(Path("/proc/nothing")), [])
    assert (findings[0].name, findings[0].level, rates.disk) == ("disk", checks.FAILURE, {})
    assert findings[0].text.startswith("/proc: ")


def test_a_disk_that_fails_is_told(tmp_path: Path) -> None:
    finding, rate = diagnosis._disk([tmp_path / "gone.safetensors"])
    assert (finding.level, rate) == (checks.FAILURE, 0.0)


def predicted(state: Path, rates: Rates, **flags: Any) -> tuple[float, float]:
    told = forecast("demo-add", tasks.checkpoint_dir("demo-add"), configured(state, **flags), rates, 0.05)
    assert told.from_disk_s is not None
    assert told.from_dram_s is not None
    return round(told.from_disk_s, 6), round(told.from_dram_s, 6)


def test_what_a_server_has_is_predicted_by_its_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tasks.checkpoint_dir("demo-add")
    nbytes = (source / "model.safetensors").stat().st_size
    files = {f"m/{path.name}": path.read_bytes() for path in source.iterdir()}
    with RangeServer(files) as server, announce(tier(), f"{server.url}/m", lambda name, done, total: None) as lease:
        for rates, limits, bps in (
            (Rates({}, 2e6, None), {}, Policy().remote_bps),
            (Rates({}, 2e6, None, 4e5), {}, 4e5),
            (Rates({}, 2e6, None, 4e5), {"remote": "200KB/s"}, 2e5),
        ):
            told = forecast("m", lease.directory, configured(tmp_path, limits=limits), rates, 0.05)
            assert told.from_remote_s == pytest.approx(nbytes / bps + 0.05)
            assert told.from_disk_s == pytest.approx(nbytes / Policy().disk_bps + 0.05)


def test_predictions_are_placements(tmp_path: Path) -> None:
    directory = tasks.checkpoint_dir("demo-add")
    nbytes = (directory / "model.safetensors").stat().st_size
    rates = Rates({directory.stat().st_dev: 1e6}, 2e6, None)
    assert predicted(tmp_path, rates) == (round(nbytes / 1e6 + 0.05, 6), 0.05)
    assert predicted(tmp_path, rates, limits={"disk": "500KB/s"})[0] == round(nbytes / 5e5 + 0.05, 6)
    cold, warm = predicted(tmp_path, rates, weights="copy")
    assert cold == round(nbytes / 1e6 + 0.05, 6)
    assert 1.5 < warm < nbytes / 2e6 + 0.05
    assert predicted(tmp_path, Rates(rates.disk, 2e6, 4e6), weights="copy")[1] < warm


def test_a_model_that_fits_no_device_is_told_what_would_do(tmp_path: Path) -> None:
    def told(memory: str) -> str:
        settings = configured(tmp_path, device_memory=memory)
        return forecast("m", tasks.checkpoint_dir("demo-add"), settings, Rates({}, 1e9, None), 0.05).error

    enough, _, rest = told("2MiB").partition(" of weights and least KV ")
    assert rest.startswith("do not fit a device of 2.1 MB")
    assert told(enough) == ""


def test_sources_of_the_configuration_are_found(tmp_path: Path) -> None:
    assert diagnosis.directory_of("demo-add") == tasks.checkpoint_dir("demo-add")
    assert diagnosis.directory_of(str(tmp_path)) == tmp_path
    told = forecast("m", diagnosis.directory_of("no/such"), configured(tmp_path), Rates({}, 1e9, None), 0.05)
    assert "no/such" in told.error


def test_what_is_on_a_server_still_tells_nothing_of_the_disk(tmp_path: Path) -> None:
    places = [tmp_path / name / "checkpoint" for name in ("here", "there")]
    for place in places:
        place.mkdir(parents=True)
        (place / "model.safetensors").write_bytes(bytes(2 * MIB))
    (places[1].parent / REMOTE).touch()
    assert list(diagnosis._large_files(places).values()) == [[places[0] / "model.safetensors"]]
