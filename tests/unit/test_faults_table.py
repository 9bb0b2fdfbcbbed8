"""docs/faults.md: every row names tests that are there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)(?:\[([^]`]+)])?`")
ROWS_AT_LEAST = 165  # so that none is lost with the test that it names


@cache
def functions_of(path: str) -> frozenset[str]:
    if not (ROOT / path).exists():
        return frozenset()
    tree = ast.parse((ROOT / path).read_text())
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def rows() -> list[list[str]]:
    lines = (ROOT / "docs" / "faults.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [row for row in cells if row[0] != "fault" and set(row[0]) != {"-"}]


def test_every_fault_has_a_test_that_is_there() -> None:
    for fault, happens, test in rows():
        named = NAMED.findall(test)
        assert named, f"{fault}: no test"
        for path, name, case in named:
            assert name in functions_of(path), f"{fault}: {path} has no {name}"
            assert not case or f'"{case}"' in (ROOT / path).read_text(), f"{fault}: {name} has no {case}"
        assert happens


def test_no_fault_is_named_twice_or_lost() -> None:
    faults = [row[0] for row in rows()]
    assert len(set(faults)) == len(faults)
    assert len(faults) >= ROWS_AT_LEAST
