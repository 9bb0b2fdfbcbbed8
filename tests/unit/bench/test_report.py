"""The README's tables come from result files and nothing else."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import report

ROW = {
    "case": "disk", "subject": "ours", "metric": "ttft", "unit": "ms", "median": 41.234, "p10": 40, "p90": 45.5,
    "n": 15, "ratio_to_limit": 0.914, "ratio_to_best_peer": 33.7, "best_peer": "transformers-warm",
}  # fmt: skip
RESULT = {
    "bench": "cold_start",
    "commit": "abc",
    "command": "python bench/cold_start.py",
    "machine": {"cpu": "EPYC", "cores": 2, "ram_gib": 23.5, "gpu": None, "torch": "2.13.0+cpu"},
    "rows": [ROW],
}


def test_a_row() -> None:
    assert report.cells(ROW) == (
        "disk", "ours", "ttft", "41.2 ms", "40 to 45.5", "15", "0.91", "33.70 x transformers-warm",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "column", "text"),
    [
        ({"p10": None}, 4, ""),
        ({"ratio_to_limit": None}, 6, ""),
        ({"ratio_to_best_peer": None}, 7, ""),
        ({"too_noisy": True}, 7, "33.70 x transformers-warm (too noisy)"),
        ({"unit": "count", "median": 200}, 3, "200"),
        ({"median": 12345.6}, 3, "12346 ms"),
    ],
)
def test_cells(change: dict[str, Any], column: int, text: str) -> None:
    assert report.cells(ROW | change)[column] == text


def test_sections_name_machine_and_commit() -> None:
    text = report.section(RESULT | {"machine": RESULT["machine"] | {"gpu": "H200"}})  # type: ignore[operator]
    assert text.startswith("**How long from a request to its first token")
    assert text.endswith("at abc on EPYC, 2 cores, 23.5 GiB, H200, torch 2.13.0+cpu.")


def test_readme_is_rendered_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "results"
    results.mkdir()
    (results / "cold_start-cpu.json").write_text(json.dumps(RESULT))
    readme.write_text("above\n<!-- results -->\nstale\n<!-- /results -->\nbelow\n")
    arguments = ["report", "--results", str(results), "--readme", str(readme)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--check"])
    assert report.main() == 1
    monkeypatch.setattr(sys, "argv", arguments)
    assert report.main() == 0
    monkeypatch.setattr(sys, "argv", [*arguments, "--check"])
    assert report.main() == 0
    text = readme.read_text()
    assert text.startswith("above\n")
    assert text.endswith("below\n")
    assert "stale" not in text
    assert "| disk | ours | ttft | 41.2 ms |" in text


def test_no_results_is_said(tmp_path: Path) -> None:
    assert report.rendered(tmp_path) == "No results are committed yet."


def test_the_readme_is_what_the_committed_results_say() -> None:
    text = (report.ROOT / "README.md").read_text()
    inside = text.split(report.START)[1].split(report.END)[0].strip()
    assert inside == report.rendered(report.ROOT / "bench" / "results")
