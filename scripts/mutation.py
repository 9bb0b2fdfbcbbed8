"""The result of mutation testing: what mutmut found, by module, with a judgement for every survivor.

    make mutate                                runs what has no result yet, then this
    .venv/bin/python -m scripts.mutation       this alone, over what has been run so far
    .venv/bin/mutmut show NAME                 one mutant

Judgements are written by hand into `bench/results/mutation.json` and stay there for as long as the same change of the
same function survives. A survivor without one, or a score under 90 %, is a failure.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.common import RESULTS, commit

ROOT = Path(__file__).resolve().parent.parent
RESULT = RESULTS / "mutation.json"
TARGET = 0.9
NOT_MUTATED = [
    "code outside of functions: tables, constants, defaults of dataclass fields",
    "decorated functions, properties among them",
    "calls of len and isinstance, annotations, strings in triple quotes, the fixed text of f-strings",
]
# What mutmut calls the end of a mutant, as it counts here. None: it has not been run to its end. Whatever is not named
# here nobody noticed. A segfault is a signal: mutmut's own limit, or the kernel's.
COUNTS = {
    "killed": "killed", "timeout": "timeout", "segfault": "timeout",
    "not checked": None, "check was interrupted by user": None,
}  # fmt: skip

Mutant = tuple[str, str, list[str]]  # name, end, changed lines
Survivor = dict[str, Any]


def main() -> int:
    before = json.loads(RESULT.read_text()) if RESULT.exists() else {"modules": {}}
    tool = {"tool": f"mutmut {version('mutmut')}", "commit": commit()}
    result = {**tool, **summary(measured(), judgements(before))}
    RESULT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    for name, counts in [*result["modules"].items(), ("total", result["total"])]:
        print(f"{name:36} {counts['run']:5}/{counts['mutants']:<5} {counts['score']:6.1%} {counts['survived']:4}")
    open_ = [one["mutant"] for part in result["modules"].values() for one in part["survivors"] if not one["judgement"]]
    print(*(f"not judged: {name}" for name in open_), sep="\n")
    return 1 if open_ or result["total"]["score"] < TARGET else 0


def measured() -> dict[str, list[Mutant]]:
    """The mutants of each module; changes only of those that count as survivors."""
    from mutmut.mutation.data import SourceFileMutationData
    from mutmut.mutation.diff_apply import get_diff_for_mutant
    from mutmut.stats import status_by_exit_code
    from mutmut.utils.file_utils import walk_mutatable_files

    found = {}
    for path in sorted(walk_mutatable_files()):
        data = SourceFileMutationData(path=path)
        data.load()
        ends = [(name, status_by_exit_code[code]) for name, code in data.exit_code_by_key.items()]
        found[path.resolve().relative_to(ROOT).as_posix()] = [
            (name, end, [] if end in COUNTS else changed(get_diff_for_mutant(name, path=path))) for name, end in ends
        ]
    return found


def changed(diff: str) -> list[str]:
    """The lines that a diff takes away and adds, without their indentation."""
    lines = [line for line in diff.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    return [f"{line[0]} {line[1:].strip()}" for line in lines]


def judgements(result: dict[str, Any]) -> dict[str, str]:
    """What an earlier result says of each change: mutants are numbered anew whenever their function changes."""
    return {key(one): one["judgement"] for part in result["modules"].values() for one in part["survivors"]}


def key(survivor: Survivor) -> str:
    return "\n".join([survivor["mutant"].partition("__mutmut_")[0], *survivor["change"]])


def summary(found: dict[str, list[Mutant]], known: dict[str, str]) -> dict[str, Any]:
    modules = {}
    total: Counter[str] = Counter()
    for module, ends in found.items():
        counts = Counter(count for _, end, _ in ends if (count := COUNTS.get(end, "survived")) is not None)
        survivors: list[Survivor] = [
            {"mutant": name, "end": end, "change": change} for name, end, change in ends if end not in COUNTS
        ]
        for one in survivors:
            one["judgement"] = known.get(key(one), "")
        counts["mutants"] = len(ends)
        total += counts
        if ends:
            modules[module] = {**scored(counts), "survivors": survivors}
    return {"not_mutated": NOT_MUTATED, "total": scored(total), "modules": modules}


def scored(counts: Counter[str]) -> dict[str, Any]:
    """Of those that were run, the share that was noticed; one that never ends is, for neither would the suite."""
    noticed = counts["killed"] + counts["timeout"]
    run = noticed + counts["survived"]
    names = ("mutants", "killed", "timeout", "survived")
    return {**{name: counts[name] for name in names}, "run": run, "score": round(noticed / run, 4) if run else 0.0}


if __name__ == "__main__":
    sys.exit(main())
