"""The coverage that the project promises: line and branch coverage of the pure parts by their own tests is 100 %.

Those tests are run here, the same ones that mutants must not survive; to trace all others would take minutes and show
no more. `no cover` may stand only on lines that a machine without CUDA cannot run, and each such line says so:
`# pragma: no cover - cuda`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("serverless_llm", "loader", "placement", "kernels")
TOOLS: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
PROMISED: list[str] = TOOLS["coverage"]["run"]["include"]
TESTS: list[str] = TOOLS["mutmut"]["pytest_add_cli_args_test_selection"]
EXCUSE = re.compile(r"#\s*pragma:\s*no (cover|branch)(?P<reason>.*)$")


def measured() -> dict[str, Any]:
    """Runs the tests; returns coverage's JSON report, by path relative to the repository.

    Raises:
        CalledProcessError: a test failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "coverage.json"
        pytest = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile"]
        subprocess.run([*pytest, "--cov", f"--cov-report=json:{target}", *TESTS], cwd=ROOT, check=True)
        files: dict[str, Any] = json.loads(target.read_text())["files"]
    return files


def promised() -> list[str]:
    """The files whose coverage is promised, found on disk: one that no test imports counts as uncovered."""
    paths = (path.relative_to(ROOT).as_posix() for pattern in PROMISED for path in ROOT.glob(pattern))
    return sorted(path for path in paths if (ROOT / path).read_text().strip())


def gaps(path: str, report: dict[str, Any]) -> str:
    """What is missing of one promised file; empty when nothing is."""
    entry = report.get(path)
    if entry is None:
        return "" if not _has_code(path) else "never imported by a test"
    lines = ", ".join(map(str, entry["missing_lines"]))
    branches = ", ".join(f"{start}->{end}" for start, end in entry.get("missing_branches", []))
    return "; ".join(part for part in (lines and f"lines {lines}", branches and f"branches {branches}") if part)


def _has_code(path: str) -> bool:
    """Whether a file has more than a docstring."""
    source = (ROOT / path).read_text()
    return not re.fullmatch(r'\s*(""".*?"""|\'\'\'.*?\'\'\')?\s*', source, flags=re.DOTALL)


def excuses() -> list[tuple[str, int, str]]:
    """Every `no cover` pragma as (path, line, reason)."""
    found = []
    for source in SOURCES:
        for path in sorted((ROOT / source).rglob("*.py")):
            for number, line in enumerate(path.read_text().splitlines(), start=1):
                match = EXCUSE.search(line)
                if match:
                    found.append((path.relative_to(ROOT).as_posix(), number, match["reason"]))
    return found


def main() -> int:
    report = measured()
    bad = [f"{path}: {missing}" for path in promised() if (missing := gaps(path, report))]
    pragmas = excuses()
    bad += [f"{path}:{line}: `no cover` without `- cuda`" for path, line, why in pragmas if "cuda" not in why.lower()]
    print(f"coverage: {len(promised())} files are promised whole; {len(pragmas)} `no cover` lines, CUDA only")
    for line in bad:
        print(f"coverage: {line}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
