"""Mutation testing of the parts whose coverage is promised whole: does a test fail when the code says something else?

    make mutate                                       all of it, going on where the last call stopped
    make mutate ARGS="cluster/poison.py --minutes 5"  one module, for so long
    make mutate ARGS="--again"                        the survivors once more, after new tests

One node of a module's syntax tree is changed at a time: comparisons, arithmetic, `and`/`or` and what they join, `not`,
plain conditions, constants, returned values (to None), statements (left out). Docstrings, annotations, decorators and
imports stay. The tests are collected once; each mutant is a fork that puts the changed code into its function and runs
the tests that reach the line, to the first failure. For what stands outside of functions (tables, defaults) the fork
imports everything anew.

Mutants run in an order drawn by `--seed`, those in functions first, so that a run that stops was a fair sample.
Outcomes are kept in `.mutation/`, for as long as the function is the same; the result, with a judgement for every
survivor (written by hand, kept by each run), in `bench/results/mutation.json`.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import os
import random
import resource
import select
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import coverage
import pytest
from _pytest.runner import runtestprotocol

from scripts.mutants import Mutant, mutants, mutated

ROOT = Path(__file__).resolve().parent.parent
STORE = ROOT / ".mutation" / "outcomes.jsonl"
RESULT = ROOT / "bench" / "results" / "mutation.json"
STORMS = [f"tests/properties/test_machine.py::test_long_storms_end[{seed}]" for seed in (0, 1)]
LOADER = ("header", "manifest", "plan", "residency", "pacer", "link")
TESTS = {
    "serverless_llm/cluster/*.py": ["tests/unit/cluster", *STORMS],
    "placement/*.py": ["tests/unit/placement", "tests/unit/cluster"],
    "loader/*.py": [*(f"tests/unit/loader/test_{name}.py" for name in LOADER), "tests/properties/test_residency.py"],
}
LATE = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # hypothesis is there before pytest looks
PYTEST = ["-qq", "-s", "-x", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *LATE]
MEMORY = 4 << 30  # bytes that a mutant may take: one that never stops appending ends here
SURVIVED, KILLED, BROKEN = 0, 1, 99  # exit codes of a mutant; broken: it could not be tried at all


def modules() -> list[str]:
    """The files that are mutated, by path in the repository."""
    paths = [path for pattern in TESTS for path in ROOT.glob(pattern) if path.stem != "__init__"]
    names = [path.relative_to(ROOT).as_posix() for path in paths]
    return sorted(name for name in names if not name.startswith("loader/") or Path(name).stem in LOADER)


def tests_of(module: str) -> list[str]:
    """What may notice a change of a module, its own test file first."""
    chosen = next(tests for pattern, tests in TESTS.items() if fnmatch.fnmatch(module, pattern))
    stem = Path(module).stem
    own = [path for folder in chosen for path in (ROOT / folder).glob(f"test_{stem}*.py")]
    return [*(path.relative_to(ROOT).as_posix() for path in own), *chosen]


# --- outcomes ---


class Outcomes:
    """What became of each mutant, one line each; the last one counts."""

    def __init__(self) -> None:
        STORE.parent.mkdir(exist_ok=True)
        lines = STORE.read_text().splitlines() if STORE.exists() else []
        self._known: dict[tuple[str, str], str] = {}
        for line in lines:
            entry = json.loads(line)
            self._known[entry["id"], entry["digest"]] = entry["outcome"]

    def of(self, mutant: Mutant) -> str | None:
        return self._known.get((mutant.id, mutant.digest))

    def note(self, mutant: Mutant, outcome: str) -> None:
        self._known[mutant.id, mutant.digest] = outcome
        with STORE.open("a") as file:
            file.write(json.dumps({"id": mutant.id, "digest": mutant.digest, "outcome": outcome}) + "\n")


def write_result(seed: int) -> None:
    """Scores by module, and each survivor with the judgement that the last result gave it."""
    before = json.loads(RESULT.read_text())["modules"] if RESULT.exists() else {}
    judged = {one["id"]: one["judgement"] for module in before.values() for one in module["survivors"]}
    outcomes, report = Outcomes(), {}
    total: Counter[str] = Counter()
    for module in modules():
        found = mutants(ROOT / module, module)
        counts = Counter({"mutants": len(found), "run": 0, "killed": 0, "timeout": 0, "survived": 0})
        survivors = []
        for mutant in found:
            outcome = outcomes.of(mutant)
            if outcome is not None:
                counts["run"] += 1
                counts[outcome] += 1
            if outcome == "survived":
                survivors.append({"id": mutant.id, "judgement": judged.get(mutant.id, "")})
        total += counts
        report[module] = {**counts, "score": _score(counts), "survivors": survivors}
        print(f"{module:40} {counts['run']:5}/{counts['mutants']:<5} {_score(counts):6.1%} {counts['survived']:4}")
    print(f"{'all':40} {total['run']:5}/{total['mutants']:<5} {_score(total):6.1%} {total['survived']:4}")
    result = {"seed": seed, "total": {**total, "score": _score(total)}, "modules": report}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


def _score(counts: Counter[str]) -> float:
    """Share of the mutants that were noticed. One that never ends is: the suite would not end either."""
    return round((counts["killed"] + counts["timeout"]) / counts["run"], 4) if counts["run"] else 0.0


# --- one mutant ---


def in_child(run: Callable[[], int], cpu_s: float) -> str:
    """What became of a mutant in a fork that may take so many seconds of CPU, and 20 times as long by the clock."""
    child = os.fork()
    if not child:
        _confine(cpu_s)
        code = BROKEN
        try:
            code = run()
        finally:
            os._exit(code)
    return _outcome(child, 20 * cpu_s)


def _confine(cpu_s: float) -> None:
    sink = os.open(os.devnull, os.O_RDWR)
    for stream in (1, 2):
        os.dup2(sink, stream)
    _allow(cpu_s)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _allow(cpu_s: float) -> None:
    """The process ends when it has taken so many seconds of CPU."""
    resource.setrlimit(resource.RLIMIT_CPU, (int(cpu_s) + 1, resource.RLIM_INFINITY))


def _outcome(child: int, limit_s: float) -> str:
    handle = os.pidfd_open(child)
    ended = bool(select.select([handle], [], [], limit_s)[0])
    os.close(handle)
    if not ended:
        os.kill(child, 9)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return "timeout"
    outcomes = {SURVIVED: "survived", KILLED: "killed"}
    return outcomes[os.WEXITSTATUS(status)]


def alone(mutant: Mutant) -> int:
    """All tests once more, with everything imported anew and the changed module instead of the real one."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("serverless_llm", "tests")]:
        del sys.modules[name]
    code = one(mutant.module, mutant.index)
    return {0: SURVIVED, 1: KILLED, 2: KILLED}.get(code, BROKEN)  # as pytest has it; 2: a test module does not import


def one(module: str, index: int) -> int:
    get_code = SourceFileLoader.get_code

    def changed(self: SourceFileLoader, fullname: str) -> CodeType | None:
        if Path(self.path).resolve() == ROOT / module:
            return compile(mutated(ROOT / module, index), self.path, "exec")
        return get_code(self, fullname)

    SourceFileLoader.get_code = changed  # type: ignore[method-assign, assignment]
    return int(pytest.main([*PYTEST, *tests_of(module)]))


def put(mutant: Mutant) -> None:
    """The changed code into the function that everybody holds."""
    name = mutant.module.removesuffix(".py").replace("/", ".")
    module = importlib.import_module(name if name.startswith("serverless_llm") else f"serverless_llm.{name}")
    found: Any = module
    for part in mutant.scope.split("."):
        found = vars(found)[part]
    found = getattr(found, "fget", None) or getattr(found, "__func__", found)
    function: FunctionType = getattr(found, "__wrapped__", found)
    whole = compile(mutated(ROOT / mutant.module, mutant.index), function.__code__.co_filename, "exec")
    function.__code__ = next(code for code in _codes(whole) if code.co_qualname == mutant.scope)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


# --- the tests, collected once ---


@dataclass
class Survey:
    """Which tests reach which line of which file, and the seconds of CPU that each takes."""

    reach: dict[str, dict[int, set[str]]]
    seconds: dict[str, float]


class Runner:
    """A pytest plugin that runs the collected tests against mutants, instead of once."""

    def __init__(self, todo: list[Mutant], until: float) -> None:
        self.todo, self.until = todo, until
        self.killers: dict[str, list[str]] = defaultdict(list)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.items = {item.nodeid: item for item in session.items}
        self.survey = self._survey()
        outcomes, begun = Outcomes(), time.monotonic()
        for number, mutant in enumerate(self.todo, start=1):
            if time.monotonic() > self.until:
                break
            outcome = self.outcome(mutant)
            outcomes.note(mutant, outcome)
            if outcome == "survived":
                print(f"{mutant.module}:{mutant.line} {mutant.scope}: {mutant.change}", flush=True)
            if number % 50 == 0:
                pace = 60 * number / (time.monotonic() - begun)
                print(f"-- {number} of {len(self.todo)}, {pace:.0f} a minute", flush=True)
        return True

    def outcome(self, mutant: Mutant) -> str:
        seconds = self.survey.seconds
        if not mutant.scope:
            return in_child(lambda: alone(mutant), 120)
        reached = self.survey.reach.get(str(ROOT / mutant.module), {})
        names = {name for line in mutant.lines for name in reached.get(line, ())}
        known = self.killers[f"{mutant.module}:{mutant.scope}"]
        order = sorted(names, key=lambda name: (name not in known[-3:], seconds[name]))
        with tempfile.NamedTemporaryFile("r") as note:
            outcome = in_child(lambda: self.run(mutant, order, note.name), 5 + 5 * sum(seconds[n] for n in order))
            known += note.read().splitlines()
        return outcome

    def run(self, mutant: Mutant, order: list[str], note: str) -> int:
        put(mutant)
        for name in order:
            _allow(time.process_time() + 5 + 5 * self.survey.seconds[name])
            if not self._passes(name):
                Path(note).write_text(name)
                return KILLED
        return SURVIVED

    def _passes(self, name: str) -> bool:
        return all(not report.failed for report in runtestprotocol(self.items[name], log=False, nextitem=None))

    def _survey(self) -> Survey:
        with tempfile.NamedTemporaryFile("r") as note:
            if in_child(lambda: self._measure(Path(note.name)), 600) != "survived":
                sys.exit("the tests fail without any mutant")
            reach, seconds = json.load(note)
        lines = {file: {int(line): set(names) for line, names in there.items()} for file, there in reach.items()}
        return Survey(lines, seconds)

    def _measure(self, note: Path) -> int:
        tracer = coverage.Coverage(data_file=None, config_file=False, include=[str(ROOT / name) for name in modules()])
        tracer.start()
        seconds = {}
        for name in self.items:
            tracer.switch_context(name)
            begun = time.process_time()
            if not self._passes(name):
                return KILLED
            seconds[name] = time.process_time() - begun
        tracer.stop()
        data = tracer.get_data()
        note.write_text(json.dumps(({file: data.contexts_by_lineno(file) for file in data.measured_files()}, seconds)))
        return SURVIVED


def main() -> int:
    parser = argparse.ArgumentParser(description="Mutation testing; outcomes go to bench/results/mutation.json.")
    parser.add_argument("modules", nargs="*", help="parts of paths, as cluster/poison.py; all when none is given")
    parser.add_argument("--seed", type=int, default=1, help="of the order")
    parser.add_argument("--minutes", type=float, default=1e6)
    parser.add_argument("--again", action="store_true", help="run those that survived once more")
    parser.add_argument("--report", action="store_true", help="only write the result anew")
    parser.add_argument("--one", nargs=2, metavar=("MODULE", "INDEX"), help="the tests against one mutant, here")
    options = parser.parse_args()
    os.environ["HYPOTHESIS_PROFILE"] = _hypothesis_profile()
    if options.one:
        return one(options.one[0], int(options.one[1]))
    chosen = [name for name in modules() if not options.modules or any(part in name for part in options.modules)]
    outcomes = Outcomes()
    wanted = ("survived",) if options.again else (None,)
    todo = [m for name in chosen for m in mutants(ROOT / name, name) if outcomes.of(m) in wanted]
    random.Random(options.seed).shuffle(todo)
    todo.sort(key=lambda mutant: not mutant.scope)  # the quick ones first
    if todo and not options.report:
        os.nice(19)
        tests = list(dict.fromkeys(test for name in chosen for test in tests_of(name)))
        pytest.main([*PYTEST, *tests], plugins=[Runner(todo, time.monotonic() + 60 * options.minutes)])
    write_result(options.seed)
    return 0


def _hypothesis_profile() -> str:
    """The tests' own profile, without the search for a smaller example: the first failure is enough."""
    from hypothesis import HealthCheck, Phase, settings

    checks = [HealthCheck.too_slow]
    settings.register_profile(
        "mutate", derandomize=True, deadline=None, database=None, suppress_health_check=checks, phases=[Phase.generate]
    )
    return "mutate"


if __name__ == "__main__":
    sys.exit(main())
