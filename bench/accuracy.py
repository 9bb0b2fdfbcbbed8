"""Does the served arithmetic give the right answers? Held-out prompts of every demo task, in float32 and bfloat16.

The server is a real one, of one CPU device; the answers are judged whole. Peers have their figures in
`serverless_llm/demo/scores.json`: the same prompts by transformers.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.common import write_results
from serverless_llm.demo.accuracy import ENOUGH, Endpoint, Score, score
from serverless_llm.demo.tasks import NAMES, TASKS, checkpoint_dir
from tests.serving import Server

DTYPES = ("float32", "bfloat16")


def scored(server: Server, name: str, dtype: str, prompts: int) -> Score:
    """One task through the server, deployed in `dtype`."""
    model = f"{name}-{dtype}"
    server.put(f"/admin/models/{model}", {"source": str(checkpoint_dir(name)), "dtype": dtype})
    task = TASKS[name]
    return score(Endpoint(server.url), model, task, task.held_out(prompts), task.longest)


def row(name: str, dtype: str, result: Score) -> dict[str, Any]:
    """The share of right answers of one task in one dtype."""
    return {
        "case": f"{name}, {dtype}", "subject": "ours", "metric": "right answers", "unit": "%",
        "median": 100 * result.accuracy, "p10": None, "p90": None, "n": result.prompts,
        "ratio_to_limit": result.accuracy, "ratio_to_best_peer": None, "best_peer": None,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=1000, help="of each task")
    parser.add_argument("--smoke", action="store_true", help="five prompts of each task")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    prompts = 5 if arguments.smoke else arguments.prompts
    rows, enough = [], True
    with tempfile.TemporaryDirectory() as folder:
        options = ("--devices", "cpu:1", "--device-memory", "256MiB", "--dram", "128MiB")
        with Server(Path(folder) / "state", *options) as server:
            for name in NAMES:
                for dtype in DTYPES:
                    result = scored(server, name, dtype, prompts)
                    rows.append(row(name, dtype, result))
                    enough &= result.accuracy >= ENOUGH
                    print(
                        f"{name} {dtype}: {result.accuracy:.2%} of {result.prompts}, {result.seconds:.1f} s", flush=True
                    )
    if arguments.json:
        write_results(arguments.json, "accuracy", vars(arguments), rows)
    return 0 if enough else 1


if __name__ == "__main__":
    sys.exit(main())
