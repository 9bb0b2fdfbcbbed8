"""Which benches `make bench` runs."""

from __future__ import annotations

from bench import run_all


def test_every_bench_is_found_and_the_runner_is_none() -> None:
    names = {path.stem for path in run_all.benches()}
    assert {"accuracy", "cold_start", "idle", "remote", "soak"} <= names
    assert not {"run_all", "report", "common", "remote_once", "sendfile_server"} & names
