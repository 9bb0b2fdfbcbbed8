"""What every bench shares: the JSON that it writes, the machine it ran on, the rules about noise and cold caches."""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
LOAD_LIMIT = 0.5  # one-minute load average above which a measurement would mostly measure the neighbours
FEWEST_ROUNDS, MOST_ROUNDS = 15, 40
PRECISION = 0.03  # half-width of the 95 % interval of a ratio, relative to it
RESAMPLES = 2000


# --- results ---


def machine() -> dict[str, Any]:
    """The machine, as far as it explains a figure."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    models = [line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "ram_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": _gpu(),
        "torch": _version("torch"),
        "python": platform.python_version(),
        "kernel": platform.release(),
    }


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """The commit measured; `-dirty` when tracked files differ from it."""
    head = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", ":!bench/results")
    return head if changed in ("", "unknown") else f"{head}-dirty"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def row(
    case: str,
    subject: str,
    metric: str,
    unit: str,
    samples: Sequence[float],
    *,
    limit_ratios: Sequence[float] = (),
    peer_ratios: Sequence[float] = (),
    best_peer: str | None = None,
) -> dict[str, Any]:
    """One row of figures: median and spread of `samples`, medians of per-round ratios (higher is better)."""
    ratios = peer_ratios or limit_ratios
    low, high = interval(ratios) if len(ratios) > 1 else (0.0, 0.0)
    return {
        "case": case,
        "subject": subject,
        "metric": metric,
        "unit": unit,
        "median": statistics.median(samples),
        "p10": quantile(samples, 0.10),
        "p90": quantile(samples, 0.90),
        "p99": quantile(samples, 0.99),
        "n": len(samples),
        "ratio_to_limit": statistics.median(limit_ratios) if limit_ratios else None,
        "ratio_to_best_peer": statistics.median(peer_ratios) if peer_ratios else None,
        "best_peer": best_peer,
        "ci95": (high - low) / 2 if len(ratios) > 1 else None,
        "too_noisy": len(ratios) > 1 and not precise(ratios),
    }


def write_results(
    path: Path, bench: str, arguments: Mapping[str, Any], rows: Iterable[Mapping[str, Any]], **extra: Any
) -> None:
    """Writes one bench's result file, whole or not at all."""
    result = {
        "bench": bench,
        "commit": commit(),
        "machine": machine(),
        "command": " ".join(["python -m", f"bench.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "args": {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()},
        "rows": list(rows),
        **extra,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(result, indent=1, default=str) + "\n")
    scratch.rename(path)


# --- noise ---


def quantile(samples: Sequence[float], share: float) -> float:
    """The sample at `share` of the sorted samples, interpolated."""
    ordered = sorted(samples)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def interval(ratios: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Bootstrap 95 % interval of the median (Efron 1979, percentile method)."""
    rng = random.Random(seed)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    return medians[int(RESAMPLES * 0.025)], medians[int(RESAMPLES * 0.975)]


def precise(ratios: Sequence[float]) -> bool:
    """Whether the interval is narrow enough to be a claim."""
    low, high = interval(ratios)
    return (high - low) / 2 <= PRECISION * abs(statistics.median(ratios))


def rounds(
    subjects: Mapping[str, Callable[[], float]],
    baseline: str,
    fewest: int = FEWEST_ROUNDS,
    most: int = MOST_ROUNDS,
) -> dict[str, list[float]]:
    """Measures all subjects in turn, round by round, until every ratio to `baseline` is precise or `most` is reached.

    The order turns by one each round, so that no subject always follows the same other one.
    """
    names = list(subjects)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for number in range(most):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].append(subjects[name]())
        if number + 1 >= fewest and all(precise(ratios(samples[baseline], samples[name])) for name in names):
            break
    return samples


def ratios(baseline: Sequence[float], samples: Sequence[float]) -> list[float]:
    """Per round, how much longer the baseline took: above 1, `samples` is the faster one."""
    return [base / sample for base, sample in zip(baseline, samples, strict=True)]


def demand_quiet(smoke: bool, limit: float = LOAD_LIMIT, patience: float = 120.0) -> None:
    """Waits for the machine to calm down; exits where it does not. A smoke run measures nothing and does not wait."""
    deadline = time.monotonic() + patience
    while not smoke and (load := os.getloadavg()[0]) > limit:
        if time.monotonic() > deadline:
            sys.exit(f"load average {load:.2f} is above {limit}: this machine is too busy to measure on")
        time.sleep(5)


# --- cold caches, and the proof ---


def drop_caches(files: Iterable[Path]) -> str:
    """Empties the page cache: the whole one where that is permitted, else of `files`. Says which."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        for file in files:
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
        return "posix_fadvise(DONTNEED)"
    return "drop_caches"


def storage_bytes(pid: int) -> int:
    """`read_bytes` of a process and its living descendants: what really came from storage."""
    try:
        parent = psutil.Process(pid)
        tree = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    return sum(_read_bytes(process.pid) for process in tree)


def _read_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), 0)


def cpu_seconds(pid: int) -> float:
    """User and system seconds of a process and its living descendants."""
    try:
        parent = psutil.Process(pid)
        tree = [parent, *parent.children(recursive=True)]
        times = [process.cpu_times() for process in tree]
    except psutil.NoSuchProcess:
        return 0.0
    return sum(entry.user + entry.system for entry in times)
