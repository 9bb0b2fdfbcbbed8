"""What every bench shares: figures, the noise rule, result files."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from bench import common


def test_quantiles_are_interpolated() -> None:
    assert [common.quantile([4, 1, 3, 2], share) for share in (0, 0.5, 1)] == [1, 2.5, 4]
    assert common.quantile([7.0], 0.9) == 7.0


def test_steady_ratios_are_precise_and_wild_ones_are_not() -> None:
    rng = random.Random(1)
    assert common.precise([rng.gauss(2.0, 0.02) for _ in range(15)])
    assert not common.precise([rng.gauss(2.0, 0.8) for _ in range(15)])


def test_the_interval_holds_the_median_and_is_the_same_every_time() -> None:
    rng = random.Random(2)
    ratios = [rng.gauss(1.5, 0.1) for _ in range(20)]
    low, high = common.interval(ratios)
    assert low <= sorted(ratios)[10] <= high
    assert common.interval(ratios) == (low, high)


def test_rounds_alternate_and_end_when_precise() -> None:
    order: list[str] = []

    def subject(name: str, seconds: float) -> float:
        order.append(name)
        return seconds

    samples = common.rounds({"a": lambda: subject("a", 2.0), "b": lambda: subject("b", 1.0)}, "a", fewest=4)
    assert samples == {"a": [2.0] * 4, "b": [1.0] * 4}
    assert order == ["a", "b", "b", "a"] * 2
    assert common.ratios(samples["a"], samples["b"]) == [2.0] * 4


def test_rounds_give_up_on_noise() -> None:
    rng = random.Random(3)
    samples = common.rounds({"a": lambda: 1.0, "b": lambda: rng.uniform(0.1, 3.0)}, "a", fewest=4, most=9)
    assert len(samples["b"]) == 9
    row = common.row("c", "b", "ttft", "ms", samples["b"], peer_ratios=samples["b"], best_peer="a")
    assert row["too_noisy"]


def test_rows_have_what_the_report_needs() -> None:
    row = common.row("disk", "ours", "ttft", "ms", [1, 2, 3], limit_ratios=[0.5, 0.5, 0.5])
    assert (row["median"], row["n"], row["ratio_to_limit"], row["ratio_to_best_peer"]) == (2, 3, 0.5, None)
    assert row["ci95"] == 0.0
    assert not row["too_noisy"]
    assert common.row("disk", "ours", "ttft", "ms", [1])["ci95"] is None


def test_results_say_where_they_are_from(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "soak-cpu.json"
    common.write_results(path, "soak", {"json": path, "seed": 3}, [{"case": "all"}], segments=[1])
    result = json.loads(path.read_text())
    assert result["args"] == {"json": str(path), "seed": 3}
    assert result["machine"]["cores"] >= 1
    assert result["commit"]
    assert (result["rows"], result["segments"]) == ([{"case": "all"}], [1])
    assert [entry.name for entry in path.parent.iterdir()] == ["soak-cpu.json"]


def test_a_busy_machine_is_refused() -> None:
    with pytest.raises(SystemExit, match="too busy"):
        common.demand_quiet(smoke=False, limit=-1.0, patience=0.0)
    common.demand_quiet(smoke=True, limit=-1.0, patience=0.0)


def test_what_a_process_used() -> None:
    assert common.cpu_seconds(os.getpid()) > 0
    assert common.storage_bytes(os.getpid()) >= 0
    assert (common.cpu_seconds(2**22 + 1), common.storage_bytes(2**22 + 1)) == (0.0, 0)
