"""Who loads the checkpoint: a running server, and fresh processes of `bench/load_once.py`, ours and the peers'."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import psutil

from bench import checkpoints, peers
from bench.cold_subjects import COLD, WrongTier, minor_faults, options, peer_environ, read_bytes, touch
from bench.common import ROOT, drop_caches
from tests.serving import Server, until

CASES = ("cold", "warm")
PEERS = ("safetensors", "safetensors-pread", "runai", "fastsafetensors", "tensorizer", "transformers")
LAZY = ("safetensors", "transformers")  # whose tensors are views of the mapped files
SUBJECTS = ("ours-service", "ours-library", *PEERS)
MODEL = "subject"
PATIENCE = 300.0  # seconds for one load
POLL = 0.2  # seconds between two looks at a load; each costs the server almost a millisecond of CPU


@dataclass(frozen=True, slots=True)
class Sample:
    """One load.

    Attributes:
        seconds: until every byte is in memory and its pages are mapped.
        cpu_s: user and system time of all processes that took part.
        peak_rss_mib: above what the process held before; of the server, what its agent and worker share counts once.
        storage: bytes that came from storage.
        faults: page faults that read nothing.
        idle: share of the time in which the device had no request, where it can be told.
    """

    seconds: float
    cpu_s: float
    peak_rss_mib: float
    storage: int
    faults: int
    idle: float | None = None


class Subject(Protocol):
    name: str

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def sample(self, case: str) -> Sample:
        """One load with the page cache empty (`cold`) or holding all files (`warm`).

        Raises:
            WrongTier: the bytes came from elsewhere.
        """
        ...


def check(case: str, sample: Sample, nbytes: int) -> Sample:
    """What was to come from storage must; what lay in the page cache may: some loaders go past it always."""
    if case == "cold" and sample.storage < COLD * nbytes:
        raise WrongTier(f"cold: only {sample.storage} of {nbytes} bytes came from storage")
    return sample


def prepare(case: str, files: Sequence[Path]) -> None:
    """Takes and gives back fresh memory, so that the host has it; empties or fills the page cache."""
    nbytes = sum(path.stat().st_size for path in files)
    subprocess.run([sys.executable, "-m", "bench.pretouch", str(2 * nbytes)], cwd=ROOT, check=True)
    cache(case, files)


def cache(case: str, files: Sequence[Path]) -> None:
    """Empties or fills the page cache."""
    if case == "cold":
        drop_caches(files)
    else:
        for path in files:
            touch(path)


# --- the server ---


class Service:
    """A running server with one device: a load goes from its order to the replica that could serve."""

    name = "ours-service"

    def __init__(self, directory: Path, weights: str = "view", pool: int | None = None) -> None:
        """`pool`: bytes of the DRAM tier; None: room for all."""
        self._directory = directory
        self._files = checkpoints.weight_files(directory)
        self.nbytes = sum(path.stat().st_size for path in self._files)
        self._scratch = Path(tempfile.mkdtemp(prefix="serverless-llm-load-"))
        chosen = options("cpu", weights, self.nbytes) + (["--dram", str(pool)] if pool else [])
        self._server = Server(self._scratch / "state", *chosen)
        self.prefault: Sample | None = None

    def __enter__(self) -> Self:
        self._server.start(120)
        self._deploy()
        drop_caches(self._files)
        self.prefault = self._load()  # takes the pool's memory, which later loads find
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def sample(self, case: str) -> Sample:
        self.empty()
        prepare(case, self._files)
        return check(case, self._load(), self.nbytes)

    def processes(self) -> list[psutil.Process]:
        return self._server.processes()

    def sample_url(self, url: str, environ: Mapping[str, str]) -> Sample:
        """One load of what a URL holds, deployed by the command line in `environ`, of an empty disk tier.

        The server was started in an environment with the same variables of its store.
        """
        self.empty()
        state = str(self._server.state)
        subprocess.run(
            [sys.executable, "-m", "serverless_llm", "deploy", MODEL, url, "--state-dir", state],
            cwd=ROOT, env=environ, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        found = self._load()
        self.empty()
        return found

    def _load(self) -> Sample:
        processes = self.processes()
        seconds, reading = self._phase("total"), self._phase("disk")
        disk = Disk(self._files[0])
        before, storage, faults = cpu(processes), read_bytes(processes), minor_faults(processes)
        self._server.put(f"/admin/models/{MODEL}/load", {}, "POST")
        until(self._loaded, "the model to be loaded", PATIENCE, POLL)
        used = cpu(processes) - before
        reading = self._phase("disk") - reading
        sample = Sample(
            seconds=self._phase("total") - seconds,
            cpu_s=used,
            peak_rss_mib=shared_mib(processes),
            storage=read_bytes(processes) - storage,
            faults=minor_faults(processes) - faults,
            idle=disk.idle(reading),
        )
        until(self._resident, "the server to hear of its DRAM tier")  # `empty` waits for the contrary
        return sample

    def _resident(self) -> bool:
        return any(node["resident"] for node in self._server.status()["nodes"])

    def _phase(self, phase: str) -> float:
        return self._server.metric("serverless_llm_load_seconds_sum", phase=phase)

    def _loaded(self) -> bool:
        return bool(self._server.get(f"/admin/models/{MODEL}")["state"] == "loaded")

    def _deploy(self) -> None:
        self._server.put(f"/admin/models/{MODEL}", {"source": str(self._directory)})

    def empty(self) -> None:
        """Nothing of the model is on the device or in DRAM. It leaves DRAM with its name, if no replica is left."""
        self._server.put(f"/admin/models/{MODEL}/unload", {}, "POST")
        until(lambda: not any(device["replicas"] for device in self._server.devices()), "an empty device")
        self._server.put(f"/admin/models/{MODEL}", {}, "DELETE")
        until(lambda: not self._resident(), "an empty DRAM tier")
        self._deploy()


class Disk:
    """The block device below a file: how long it was idle. See Documentation/admin-guide/iostats.rst."""

    def __init__(self, file: Path) -> None:
        number = file.stat().st_dev
        self._path = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/stat")
        self._busy_ms = self._read()

    def _read(self) -> int | None:
        return int(self._path.read_text().split()[9]) if self._path.exists() else None

    def idle(self, seconds: float) -> float | None:
        """Share of `seconds` since this was made in which it had no request; None where the system does not tell."""
        now = self._read()
        if now is None or self._busy_ms is None or not seconds:
            return None
        return max(0.0, 1 - (now - self._busy_ms) / (1000 * seconds))


def cpu(processes: Sequence[psutil.Process]) -> float:
    """Seconds, to the nanosecond: processes have clocks (clock_getcpuclockid(3)) where `cpu_times` counts 10 ms."""
    clocks = [~process.pid << 3 | 2 for process in processes if process.is_running()]
    return sum(time.clock_gettime(clock) for clock in clocks)


def shared_mib(processes: Sequence[psutil.Process]) -> float:
    """The pool, as the process shows it that has touched most of it."""
    return max(process.memory_info().shared for process in processes if process.is_running()) / 2**20


# --- fresh processes ---


class Once:
    """One process for each load."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self._directory = directory
        self._files = checkpoints.weight_files(directory)
        self._nbytes = sum(path.stat().st_size for path in self._files)
        environ = peer_environ(os.environ)
        if name == "ours-library":
            self._python, self._environ = sys.executable, environ | {"PYTHONPATH": str(ROOT)}
        else:
            self._python, self._environ = str(peers.python("loaders")), environ | peers.environment("loaders")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def sample(self, case: str) -> Sample:
        files = self._files
        if self.name == "tensorizer":
            files = [path.with_suffix(".tensors") for path in files]
        cache(case, files)
        told = self._run()
        if told.pop("tensors") < 1:
            raise RuntimeError(f"{self.name} loaded nothing")
        checksum = told.pop("checksum")
        if self.name not in ("transformers", "tensorizer"):
            self._compare(checksum)
        return check(case, Sample(**told), self._nbytes)

    def _run(self) -> dict[str, Any]:
        command = [self._python, str(ROOT / "bench" / "load_once.py"), self.name, str(self._directory)]
        done = subprocess.run(command, env=self._environ, capture_output=True, text=True, timeout=PATIENCE, check=False)
        if done.returncode:
            raise RuntimeError(f"{self.name}: {done.stderr[-2000:]}")
        told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return told

    def _compare(self, checksum: int) -> None:
        """Every subject must have loaded the same bytes."""
        expected = CHECKSUMS.setdefault(self._directory, checksum)
        if checksum != expected:
            raise RuntimeError(f"{self.name} loaded other bytes: their sum is {checksum}, not {expected}")


CHECKSUMS: dict[Path, int] = {}


def subject(name: str, directory: Path) -> Subject:
    """Raises:
    PeerMissing: it cannot run here.
    """
    return Service(directory) if name == "ours-service" else Once(name, directory)


def write_tensorizer(directory: Path) -> None:
    """The checkpoint in tensorizer's format, a file beside each of its files, unless they are there."""
    files = checkpoints.weight_files(directory)
    if all(path.with_suffix(".tensors").exists() for path in files):
        return
    program = (
        "import sys\nfrom pathlib import Path\nfrom safetensors.torch import load_file\n"
        "from tensorizer import TensorSerializer\n"
        "for name in sys.argv[1:]:\n"
        "    serializer = TensorSerializer(str(Path(name).with_suffix('.tensors')))\n"
        "    serializer.write_state_dict(load_file(name))\n    serializer.close()\n"
    )
    subprocess.run([str(peers.python("loaders")), "-c", program, *map(str, files)], check=True)
