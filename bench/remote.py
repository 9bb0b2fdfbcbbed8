"""How fast does a checkpoint come over a network, against curl on the same link? What does a kill at half cost?

A server of its own sends by `sendfile` from its page cache, from a network namespace behind a link of 1 or 10 Gb/s
(root and iproute2 are needed; without them loopback is the link, and nothing is promised), as a web server and as an
S3-compatible bucket. `ours-library`: `load_checkpoint(URL)`, until all tensors are in memory and all bytes synced in
the disk tier; `ours-pull`: the disk tier alone; each in a fresh process with an empty tier. `ours-service`: a running
server with its pool resident, from the order to the replica that could serve; the disk tier fills behind. The limit,
measured in every round: curl, which drops the bytes. `ours-resumed`: a pull, killed when half was sent, and another.
In a virtual machine, what counts at 10 Gb/s is the host's memory: so each start there waits until the host was told
what the last one freed, and a load finds memory that the host has given, and ends before that is told (`pretouch`).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench import checkpoints
from bench.cold_subjects import touch
from bench.common import FEWEST_ROUNDS, MOST_ROUNDS, ROOT, demand_quiet, interval, precise, row, write_results
from bench.load_subjects import Service
from bench.network import Link, LinkMissing
from bench.pretouch import TOLD
from bench.verdicts import SLACK
from tests.serving import until

PATIENCE = 300.0  # seconds for one load
POLL = 0.005  # seconds between two looks at how much was sent
HALF = 0.5
LEAST, MOST_READ, MOST_AGAIN = 0.95, 1.01, 0.55
WAYS = {"ours-library": "load", "ours-pull": "pull"}
SERVICE, RESUMED = "ours-service", "ours-resumed"
SUBJECTS = (SERVICE, *WAYS)


class Case(NamedTuple):
    """`rate`: bits per second. `url`: of the checkpoint, with the server's address in it. `shape`: what it is of.
    `rest`: seconds before each start."""

    rate: int
    url: str
    shape: tuple[str, int, int]
    rest: float = 0.0


REST = TOLD / 2  # less is freed between two starts; one that meets what is left of the telling is an outlier
BRIEF, LONG = ("llama-3.2-1b", 4, 1), ("llama-3.2-1b", 12, 2)  # 1.0 and 2.0 GB: about 8 seconds, and less than 2
CASES = {
    "http-1g": Case(10**9, "http://{}/model", BRIEF),
    "s3-1g": Case(10**9, "s3://bucket/model", BRIEF),
    "http-10g": Case(10**10, "http://{}/model", LONG, REST),
}
SMOKE = (checkpoints.SMOKE_SHAPE, checkpoints.SMOKE_LAYERS, 2)


@dataclass(frozen=True, slots=True)
class Sample:
    """One start. `read`: bytes that the server sent for it, over those of the checkpoint."""

    seconds: float
    cpu_s: float
    read: float


@dataclass(frozen=True, slots=True)
class Round:
    """`curl`: its seconds. `again`: bytes that the server sent after a kill, over those of the checkpoint."""

    curl: float
    samples: dict[str, Sample]
    again: float


# --- pure: from rounds to rows and verdicts ---


def shares(rounds: Sequence[Round], subject: str) -> list[float]:
    """Per round, the subject's speed over curl's."""
    return [one.curl / one.samples[subject].seconds for one in rounds]


def rows(case: str, rounds: Sequence[Round], nbytes: int) -> list[dict[str, Any]]:
    found = []
    for subject in SUBJECTS:
        samples = [one.samples[subject] for one in rounds]
        rates = [nbytes / one.seconds / 1e9 for one in samples]
        found += [
            row(case, subject, "throughput", "GB/s", rates, limit_ratios=shares(rounds, subject)),
            row(case, subject, "cpu_s", "s", [one.cpu_s for one in samples]),
            row(case, subject, "read_ratio", "x", [one.read for one in samples]),
        ]
    found.append(row(case, "curl (the limit)", "throughput", "GB/s", [nbytes / one.curl / 1e9 for one in rounds]))
    found.append(row(case, RESUMED, "read_ratio", "x", [one.again for one in rounds]))
    return found


def verdicts(case: str, rounds: Sequence[Round]) -> list[str]:
    """What is promised, what was measured."""
    found = []
    for subject in SUBJECTS:
        ratios = shares(rounds, subject)
        low, middle = interval(ratios)[0], row(case, subject, "", "", ratios)["median"]
        met = middle >= LEAST and low >= LEAST - SLACK
        judged = "met" if met and precise(ratios) else "too noisy" if met else "MISSED"
        found.append(f"{case} {subject} over curl {middle:.2f} (at least {LEAST}; interval from {low:.2f}): {judged}")
        found.append(_bound(f"{case} {subject} bytes", [one.samples[subject].read for one in rounds], MOST_READ))
    return [*found, _bound(f"{case} bytes after a kill at half", [one.again for one in rounds], MOST_AGAIN)]


def _bound(what: str, values: Sequence[float], most: float) -> str:
    return f"{what} {max(values):.3f} (at most {most}): {'met' if max(values) <= most else 'MISSED'}"


# --- measuring ---


class Starts:
    """Starts from one URL: of a server, and each in a process of its own."""

    def __init__(self, link: Link, case: Case, directory: Path, service: Service, home: Path) -> None:
        """`home`: of the service's disk tier."""
        self._link = link
        self._service = service
        self._home = home
        self._rest = case.rest
        self._url = case.url.format(link.address)
        self._files = sorted(path for path in directory.iterdir() if path.suffix in (".json", ".safetensors"))
        self.nbytes = sum(path.stat().st_size for path in self._files)

    def round(self, rng: random.Random) -> Round:
        curl, again, samples = 0.0, 0.0, {}
        for name in rng.sample(["curl", *SUBJECTS, RESUMED], len(SUBJECTS) + 2):
            for path in self._files:
                touch(path)
            time.sleep(self._rest)
            if name == "curl":
                curl = self._curl()
            elif name == RESUMED:
                again = self._resumed()
            elif name == SERVICE:
                samples[name] = self._served()
            else:
                samples[name] = self._sample(WAYS[name])
        return Round(curl, samples, again)

    def _curl(self) -> float:
        urls = [part for path in self._files for part in ("-o", os.devnull, f"{self._link.address}/model/{path.name}")]
        command = ["curl", "--silent", "--fail", "--noproxy", "*", "--write-out", "%{time_total}\n", *urls]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
        return sum(map(float, done.stdout.split()))

    def _sample(self, way: str) -> Sample:
        with self._fresh() as environ:
            before = self._link.sent()
            done = subprocess.run(self._command(way), cwd=ROOT, env=environ, stdout=subprocess.PIPE, check=True)
            return Sample(**json.loads(done.stdout), read=(self._link.sent() - before) / self.nbytes)

    def _served(self) -> Sample:
        before = self._link.sent()
        one = self._service.sample_url(self._url, os.environ | {"PYTHONPATH": str(ROOT)})
        read = (self._link.sent() - before) / self.nbytes
        until(lambda: not self._written(), "the disk tier to be let go", PATIENCE)
        shutil.rmtree(self._home)
        return Sample(one.seconds, one.cpu_s, read)

    def _written(self) -> list[str]:
        """Files of the service's disk tier that it has open."""
        opened = (file.path for process in self._service.processes() for file in process.open_files())
        return [path for path in opened if path.startswith(str(self._home))]

    def _resumed(self) -> float:
        with self._fresh() as environ:
            before = self._link.sent()
            with subprocess.Popen(self._command("pull"), cwd=ROOT, env=environ, stdout=subprocess.DEVNULL) as victim:
                half = before + HALF * self.nbytes
                until(lambda: self._link.sent() >= half, "half of it", PATIENCE, POLL)
                victim.kill()
            before = self._link.sent()
            subprocess.run(self._command("pull"), cwd=ROOT, env=environ, stdout=subprocess.DEVNULL, check=True)
            return (self._link.sent() - before) / self.nbytes

    def _command(self, way: str) -> list[str]:
        return [sys.executable, "-m", "bench.remote_once", way, self._url, str(self.nbytes)]

    @contextmanager
    def _fresh(self) -> Iterator[dict[str, str]]:
        """The environment of an empty disk tier, which goes at the end."""
        scratch = tempfile.mkdtemp(prefix="serverless-llm-remote-")
        try:
            yield os.environ | self._link.environment | {"XDG_CACHE_HOME": scratch, "PYTHONPATH": str(ROOT)}
        finally:
            shutil.rmtree(scratch)


def measure(name: str, arguments: argparse.Namespace) -> tuple[str, list[Round], int]:
    """The case as it could be measured, its rounds until all is precise, the checkpoint's bytes."""
    case = CASES[name]
    directory = checkpoints.checkpoint(arguments.checkpoints, *(SMOKE if arguments.smoke else case.shape))
    fewest, most = (1, 1) if arguments.smoke else (min(FEWEST_ROUNDS, arguments.rounds), arguments.rounds)
    rng, done = random.Random(arguments.seed), list[Round]()
    with linked(directory, case.rate) as (link, shown), served(directory, link) as (service, home):
        starts = Starts(link, case, directory, service, home)
        while len(done) < most and not (len(done) >= fewest and all(precise(shares(done, one)) for one in SUBJECTS)):
            done.append(starts.round(rng))
            rates = {subject: sample.seconds for subject, sample in done[-1].samples.items()} | {"curl": done[-1].curl}
            told = ", ".join(f"{subject} {starts.nbytes / took / 1e9:.2f}" for subject, took in rates.items())
            print(f"{name}{shown}, round {len(done)}: GB/s: {told}; again {done[-1].again:.3f}", flush=True)
    return name + shown, done, starts.nbytes


@contextmanager
def linked(directory: Path, rate: int) -> Iterator[tuple[Link, str]]:
    """The link, and what its rows are called by beside the case: loopback where it is that."""
    try:
        with Link(directory, rate) as link:
            yield link, ""
    except LinkMissing as error:
        print(f"loopback instead of {rate / 1e9:g} Gb/s: {error}", file=sys.stderr)
        with Link(directory, None) as link:
            yield link, " (loopback)"


@contextmanager
def served(directory: Path, link: Link) -> Iterator[tuple[Service, Path]]:
    """A server that knows the link's store, with as much in its pool's memory as the checkpoint takes; and the home of
    its disk tier, which is this process's, too."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="serverless-llm-served-") as home:
        os.environ.update(link.environment, XDG_CACHE_HOME=home)
        try:
            with Service(directory) as service:
                yield service, Path(home)
        finally:
            os.environ.clear()
            os.environ.update(before)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--checkpoints", type=Path, default=checkpoints.default_folder(), help="where they are kept")
    parser.add_argument("--rounds", type=int, default=MOST_ROUNDS, help="at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="one round of two cases with a tiny model")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    demand_quiet(arguments.smoke)
    found: list[dict[str, Any]] = []
    judged: list[str] = []
    kept: dict[str, Any] = {}
    for name in arguments.cases[-2:] if arguments.smoke else arguments.cases:
        case, rounds, nbytes = measure(name, arguments)
        found += rows(case, rounds, nbytes)
        judged += verdicts(case, rounds) if case == name else []
        kept[case] = {"bytes": nbytes, "rounds": [asdict(one) for one in rounds]}
    for entry in found:
        limit = "" if entry["ratio_to_limit"] is None else f"{entry['ratio_to_limit']:.2f} of the limit"
        print(f"{entry['case']:10} {entry['subject']:18} {entry['metric']:12} {entry['median']:8.3f} {limit}")
    print(*judged, sep="\n")
    if arguments.json:
        write_results(arguments.json, "remote", vars(arguments), found, verdicts=judged, cases=kept)
    return 0


if __name__ == "__main__":
    sys.exit(main())
