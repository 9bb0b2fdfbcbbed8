"""Renders bench/results/*.json into the tables of README.md, between its markers. No figure is typed by hand.

`--check` changes nothing and fails when README.md is not what the results say.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- results -->", "<!-- /results -->"
QUESTIONS = {
    "gateway": "What does the way from a client to the engine and back cost, beside proxies that only pass streams on?",
    "gateway_crowd": "What do idle streams and a reader that never reads cost the others?",
    "cold_start": "How long from a request to its first token, with no replica of its model loaded?",
    "soak": "What is lost when processes are killed at random, again and again?",
    "accuracy": "Does the engine compute what transformers computes?",
    "fuzz": "Does the header parser judge whatever comes as the reference does, and at what worst cost?",
    "idle": "What does a server cost that nobody asks?",
    "limits": "What can this machine's links and cores do?",
    "load": "How fast do weights move, against the link's limit?",
    "remote": "How fast does a checkpoint come over a network, against curl on the same link?",
    "vllm_formats": "How long does vLLM load with our plug-in, beside its own load formats?",
    "engine": "How fast does a loaded model answer?",
}
COLUMNS = ("case", "subject", "metric", "median", "p10 to p90", "n", "of the limit", "against best peer")


def rendered(folder: Path) -> str:
    """All benches' result files as Markdown, in the order of their names."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return "\n\n".join(section(result) for result in results if "rows" in result) or "No results are committed yet."


def section(result: dict[str, Any]) -> str:
    """One bench: its question, the machine, its rows."""
    bench, at = result["bench"], result["machine"]
    gpu = f", {at['gpu']}" if at.get("gpu") else ""
    machine = f"{at['cpu']}{gpu}"
    where = f"{at['cpu']}, {at['cores']} cores, {at['ram_gib']} GiB{gpu}, torch {at['torch']}"
    table = [COLUMNS, ("---",) * len(COLUMNS), *(cells(entry) for entry in result["rows"])]
    lines = ["| " + " | ".join(line) + " |" for line in table]
    question = QUESTIONS.get(bench, bench)
    source = f"`{result['command']}` at {result['commit']} on {where}."
    targets = [f"Targets: {'; '.join(result['verdicts'])}.", ""] if result.get("verdicts") else []
    return "\n".join([f"**{question}** (`bench/{bench}.py`, {machine})", "", *lines, "", *targets, source])


def cells(entry: dict[str, Any]) -> tuple[str, ...]:
    spread = "" if entry["p10"] is None else f"{number(entry['p10'])} to {number(entry['p90'])}"
    peer = entry["ratio_to_best_peer"]
    versus = "" if peer is None else f"{peer:.2f} x {entry['best_peer']}"
    if entry.get("too_noisy"):
        versus += " (too noisy)"
    limit = "" if entry["ratio_to_limit"] is None else f"{entry['ratio_to_limit']:.2f}"
    unit = "" if entry["unit"] == "count" else f" {entry['unit']}"
    median = f"{number(entry['median'])}{unit}"
    return (entry["case"], entry["subject"], entry["metric"], median, spread, str(entry["n"]), limit, versus)


def number(value: float) -> str:
    """Three digits that mean something."""
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    arguments = parser.parse_args()
    text = arguments.readme.read_text()
    before, rest = text.split(START, 1)
    after = rest.split(END, 1)[1]
    wanted = f"{before}{START}\n{rendered(arguments.results)}\n{END}{after}"
    if arguments.check:
        return 0 if wanted == text else 1
    arguments.readme.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
