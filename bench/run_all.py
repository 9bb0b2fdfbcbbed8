"""Runs every bench, one after the other, and leaves their JSON under bench/results/; `--smoke`: tiny, results dropped.

A bench is a file of this folder that takes `--json`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def benches() -> list[Path]:
    """The files that take `--json`, found by their text."""
    files = sorted((ROOT / "bench").glob("*.py"))
    return [path for path in files if '"--json"' in path.read_text() and path.name != Path(__file__).name]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--only", nargs="*", help="names of benches")
    arguments = parser.parse_args()
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if arguments.smoke else ROOT / "bench" / "results"
        for path in benches():
            if arguments.only and path.stem not in arguments.only:
                continue
            options = ["--smoke"] if arguments.smoke else []
            target = folder / f"{path.stem}-cpu.json"
            done = subprocess.run(
                [sys.executable, "-m", f"bench.{path.stem}", "--json", str(target), *options], cwd=ROOT, check=False
            )
            failed += [path.stem] if done.returncode else []
    for name in failed:
        print(f"bench {name} failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
