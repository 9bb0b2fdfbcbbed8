"""`serverless-llm bench load` on a checkpoint of some megabytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from serverless_llm.cli import bench
from serverless_llm.cli.main import main
from tests.unit.loader.checkpoints import random, write


def test_both_ways_are_measured_cold_and_warm(tmp_path: Path) -> None:
    directory = write(tmp_path / "model", random(3), random(2, seed=1))
    nbytes = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    done = CliRunner().invoke(bench.bench, ["load", str(directory), "--repeats", "2", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    assert told["bytes"] == nbytes
    assert told["disk"]["rate"] > 0
    loads = {(one["way"], one["page_cache"]): one for one in told["loads"]}
    assert loads.keys() == {(way, state) for way in ("pool", "library") for state in ("cold", "warm")}
    assert all(one["seconds"] > 0 and one["cpu_s"] > 0 for one in loads.values())
    assert loads["pool", "warm"]["disk_bytes"] == loads["library", "warm"]["disk_bytes"] == 0


def test_people_get_a_table(tmp_path: Path) -> None:
    """Of weights alone, too."""
    directory = write(tmp_path / "model", random(1))
    (directory / "config.json").unlink()
    done = CliRunner().invoke(bench.bench, ["load", str(directory), "--repeats", "1"])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0].split("  ")[0] == "WAY"
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "raw reads", "pool, cold", "pool, warm", "library, cold", "library, warm",
    ]  # fmt: skip


def test_what_does_not_fit_into_memory_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = write(tmp_path / "model", random(1))
    monkeypatch.setattr(bench, "SPARE", 1 << 60)
    assert main(["bench", "load", str(directory)]) == 1
    assert "the weights take 1.0 MB of memory, 0 B are free" in capsys.readouterr().err
