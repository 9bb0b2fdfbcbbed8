"""What the parts may import: the seams of docs/architecture.md that import-linter does not see."""

from __future__ import annotations

import ast
import json
import math
import resource
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from serverless_llm.cli.main import VERBS

ROOT = Path(__file__).resolve().parents[2]
EVERYWHERE = sys.stdlib_module_names | {"serverless_llm"}
IMPURE = {
    "torch", "numpy", "asyncio", "socket", "threading", "multiprocessing", "subprocess", "random", "secrets", "time",
    "datetime", "uuid", "concurrent", "selectors", "signal",
}  # fmt: skip
PURE_LOADER = (
    "copies", "digest", "division", "header", "lending", "link", "manifest", "pinned", "plan", "ranges", "residency",
    "sharing", "turns",
)  # fmt: skip


def files(*patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


def imported(path: Path) -> Iterator[str]:
    """The top-level name of everything that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


PORTABLE = files("serverless_llm/domain.py", "serverless_llm/engine/**/*.py", "loader/**/*.py", "kernels/**/*.py")
PURE = files("serverless_llm/cluster/*.py", "placement/*.py", *(f"loader/{name}.py" for name in PURE_LOADER))

# To what must be there for them to be of use
BRIDGES = {
    "fallback.py": "transformers",
    "foreign_module.py": "transformers",
    "vllm_plugin.py": "vllm",
    "remote.py": "obstore",
    "hasher.py": "xxhash",
    "held.py": "xxhash",
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", PORTABLE, ids=name_of)
def test_runs_as_it_is_on_any_gpu_box(path: Path) -> None:
    assert set(imported(path)) <= EVERYWHERE | {"numpy", "torch", "triton", BRIDGES.get(path.name, "torch")}


@pytest.mark.parametrize("path", PURE, ids=name_of)
def test_pure_files_know_neither_clock_nor_chance_nor_io(path: Path) -> None:
    names = set(imported(path))
    assert names <= EVERYWHERE
    assert not names & IMPURE


def test_pure_parts_bring_no_heavy_module_with_them() -> None:
    modules = [name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in PURE]
    names = [name if name.startswith("serverless_llm") else f"serverless_llm.{name}" for name in modules]
    script = f"import sys, json, {', '.join(names)}; print(json.dumps(sorted(sys.modules)))"
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT, env=_environment()
    )
    assert not {"torch", "numpy", "asyncio", "socket", "random", "msgspec"} & set(json.loads(output.stdout))


HEAVY = {
    "torch", "numpy", "aiohttp", "msgspec", "asyncio", "http.client", "yaml", "rich", "huggingface_hub", "tokenizers",
    "subprocess", "sqlite3",
}  # fmt: skip
HELP_SECONDS = 0.1  # of CPU, the interpreter's start included
HELP_SHARE = 2.5  # of what click alone takes to import, where a machine is so slow that this is more
HELP_TRIES = 10  # on a busy machine the best of some is what it takes


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_is_quick_and_imports_nothing_heavy(verb: str) -> None:
    arguments = [part for part in (verb, "--help") if part]
    script = f"import sys; from serverless_llm.cli.main import main; main({arguments}); print(*sorted(sys.modules))"
    best, click, output = math.inf, math.inf, ""
    for _ in range(HELP_TRIES):
        click = min(click, _cpu_seconds("import click")[0])
        seconds, output = _cpu_seconds(script)
        best = min(best, seconds)
        if best < HELP_SECONDS:
            break
    assert "Usage: serverless-llm" in output
    assert not HEAVY & set(output.splitlines()[-1].split())
    assert best < max(HELP_SECONDS, HELP_SHARE * click)


def _cpu_seconds(script: str) -> tuple[float, str]:
    """Of an interpreter that runs this, and what it prints."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-S", "-c", script]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=_environment()).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, output


def _environment() -> dict[str, str]:
    """An environment in which nothing is loaded at start, neither coverage nor, with -S, what finds this clone."""
    return {"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{ROOT}:{sysconfig.get_paths()['purelib']}", "PYTHONSAFEPATH": "1"}
