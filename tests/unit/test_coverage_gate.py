"""The gate itself: what it lets through, and what not."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def gate(tmp_path: Path) -> Any:
    """The script as a module, on a repository of its own."""
    spec = importlib.util.spec_from_file_location("coverage_gate", ROOT / "scripts" / "coverage_gate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.ROOT = tmp_path  # type: ignore[attr-defined]
    for folder in ("serverless_llm/cluster", "placement", "loader", "kernels"):
        (tmp_path / folder).mkdir(parents=True)
    return module


def entry(lines: list[int], branches: list[list[int]]) -> dict[str, Any]:
    return {"missing_lines": lines, "missing_branches": branches}


def passes(gate: Any, report: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(gate, "measured", lambda: report)
    return bool(gate.main() == 0)


def test_whole_coverage_passes(gate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (gate.ROOT / "placement" / "evict.py").write_text("x = 1\n")
    (gate.ROOT / "placement" / "__init__.py").write_text('"""Only words."""\n')
    assert passes(gate, {"placement/evict.py": entry([], [])}, monkeypatch)


@pytest.mark.parametrize(("lines", "branches"), [([3], []), ([], [[3, 5]])])
def test_a_missing_line_or_branch_fails(
    gate: Any, monkeypatch: pytest.MonkeyPatch, lines: list[int], branches: list[list[int]]
) -> None:
    (gate.ROOT / "loader" / "plan.py").write_text("x = 1\n")
    assert not passes(gate, {"loader/plan.py": entry(lines, branches)}, monkeypatch)


def test_a_file_that_no_test_imports_fails(gate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (gate.ROOT / "serverless_llm" / "cluster" / "machine.py").write_text("x = 1\n")
    assert not passes(gate, {}, monkeypatch)


def test_other_files_are_not_promised(gate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (gate.ROOT / "loader" / "reader.py").write_text("x = 1\n")
    assert passes(gate, {"loader/reader.py": entry([1], [])}, monkeypatch)


@pytest.mark.parametrize(("comment", "passed"), [("no cover - cuda", True), ("no cover", False), ("no branch", False)])
def test_excuses_are_for_cuda_only(gate: Any, monkeypatch: pytest.MonkeyPatch, comment: str, passed: bool) -> None:
    (gate.ROOT / "kernels" / "flash.py").write_text(f"x = 1  # pragma: {comment}\n")
    assert passes(gate, {}, monkeypatch) is passed


def test_what_is_promised_whole_is_mutated(gate: Any) -> None:
    mutated = {path.removeprefix("serverless_llm/") for path in gate.TOOLS["mutmut"]["only_mutate"]}
    assert {path.removeprefix("serverless_llm/") for path in gate.PROMISED} <= mutated
