"""Is this machine fit, how fast are its links, and how long would each model's start take."""

from __future__ import annotations

import contextlib
import math
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from serverless_llm.cli.checks import FAILURE, OK, WARNING, Finding, checks, versions
from serverless_llm.cli.client import Refusal, Unreachable, find, read_head
from serverless_llm.config import Config, Limits, ModelEntry, parse_devices
from serverless_llm.errors import CheckpointError, ConfigurationError, RequestError
from serverless_llm.quantities import enough, size

UNKNOWN = 1 << 62  # bytes of a GPU whose memory is not known: nothing is said not to fit


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes per second. `disk` by the number of the file system's device; `device` of the first GPU, if any; `remote`
    as a running server learned it."""

    disk: dict[int, float]
    memcpy: float
    device: float | None
    remote: float | None = None


@dataclass(frozen=True, slots=True)
class Forecast:
    """A model's cold start without its prompt's own work, in seconds; `error`: why it cannot be served.

    `from_remote_s`: the next one, while its server has bytes that no disk here has; None where none are lacking.
    """

    name: str
    source: str
    bytes: int = 0
    from_disk_s: float | None = None
    from_dram_s: float | None = None
    from_remote_s: float | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    findings: tuple[Finding, ...]
    rates: Rates
    forecasts: tuple[Forecast, ...]

    @property
    def problems(self) -> list[str]:
        """Why something would not work; empty where all does."""
        failed = [f"{one.name}: {one.text}" for one in self.findings if one.level == FAILURE]
        return failed + [f"{one.name}: {one.error}" for one in self.forecasts if one.error]

    def as_json(self) -> dict[str, Any]:
        rates = self.rates
        return {
            "ok": not self.problems,
            "problems": self.problems,
            "checks": [asdict(one) for one in self.findings],
            "rates": {
                "remote": rates.remote,
                "disk": max(rates.disk.values(), default=None),
                "memcpy": rates.memcpy,
                "device": rates.device,
            },
            "models": [asdict(one) for one in self.forecasts],
        }


def diagnose(settings: Config) -> Diagnosis:
    """Every check and measurement, of the server that runs or else of one that would; takes some seconds."""
    from serverless_llm.cluster.policy import Policy

    status, problem = running(settings)
    failed: dict[str, Any] = {}
    overhead_s, learned = Policy().overhead_s, None
    if status:
        learned = max((node["bandwidth"].get("remote", 0.0) for node in status["nodes"]), default=0.0) or None
        overhead_s = min((node["overhead_s"] for node in status["nodes"]), default=overhead_s)  # as it learned it
        settings = as_it_runs(settings, status)
        failed = {row["name"]: row for row in status["models"] if row["state"] == "failed"}
    models = {name: directory_of(source) for name, source in deployed(settings).items()}
    measured, rates = measure(settings, list(models.values()))
    rates = replace(rates, remote=learned)
    forecasts = [
        Forecast(name, str(path), failed[name]["bytes"], error=failed[name]["error"])
        if name in failed
        else forecast(name, path, settings, rates, overhead_s)
        for name, path in models.items()
    ]
    found = versions(), *checks(settings), *problem, *pinning(status), *measured
    return Diagnosis(found, rates, tuple(forecasts))


# --- what there is to diagnose ---


def running(settings: Config) -> tuple[Any, list[Finding]]:
    """The status of this state directory's server, or why there is none; neither where no server runs."""
    if read_head(settings.state_dir) is None:
        return None, []
    try:
        server = find(settings.state_dir)
        return replace(server, api_key=settings.api_key or server.api_key).call("GET", "/admin/status"), []
    except (Unreachable, Refusal) as error:
        why = f"what follows is of the configuration, since the server did not tell of itself: {error.message}"
        return None, [Finding("status", WARNING, why)]


def pinning(status: Any) -> list[Finding]:
    """GPUs of the server that could not pin what they copy from."""
    devices = [device for node in status["nodes"] for device in node["devices"]] if status else []
    mend = "ulimit -l unlimited, or LimitMEMLOCK=infinity of the unit, or --ulimit memlock=-1 of the container"
    return [
        Finding(f"pinned {one['device']}", WARNING, f"{one['pinned']['refused']}: its copies cost a CPU more; {mend}")
        for one in devices
        if one["pinned"]["refused"]
    ]


def as_it_runs(settings: Config, status: Mapping[str, Any]) -> Config:
    """The configuration with devices, budgets, caps and models of a running server, whatever flags it was given."""
    from msgspec.structs import replace as changed

    models = {row["name"]: ModelEntry(source=row["source"], dtype=row["dtype"]) for row in status["models"]}
    settings, nodes = changed(settings, models=models), [node for node in status["nodes"] if node["devices"]]
    if not nodes:
        return settings
    largest = max((device for node in nodes for device in node["devices"]), key=lambda device: device["budget"])
    return changed(
        settings,
        nodes=len(nodes),
        devices=f"{largest['kind']}:{max(len(node['devices']) for node in nodes)}",
        device_memory=largest["budget"],
        weights=largest["weights"],
        dram=max(node["dram"] for node in nodes),
        limits=Limits(**nodes[0]["limits"]),
    )


def deployed(settings: Config) -> dict[str, str]:
    """Name -> directory of every model that a server on this state directory would have.

    Raises:
        ConfigurationError: the database cannot be read.
    """
    models = {name: entry.source for name, entry in settings.models.items()}
    path = settings.state_dir / "state.db"
    if not path.exists():
        return models
    import msgspec

    from serverless_llm.domain import ModelSpec

    try:
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
            rows = database.execute("SELECT spec FROM models ORDER BY name").fetchall()
            specs = [msgspec.msgpack.decode(spec, type=ModelSpec) for (spec,) in rows]
    except (sqlite3.Error, msgspec.MsgspecError) as error:
        raise ConfigurationError(f"{path}: {error}") from error
    return {spec.name: spec.source for spec in specs} | models


# --- measurements ---


def measure(settings: Config, sources: Sequence[Path]) -> tuple[list[Finding], Rates]:
    """The links' bandwidths: of each disk that a model lies on, or of the state directory's."""
    from serverless_llm.cli import measure as measured

    findings, disks = [], dict[int, float]()
    for device, files in _large_files(sources).items():
        finding, rate = _disk(files)
        findings.append(finding)
        disks |= {device: rate} if rate else {}
    folder = next(place for place in (settings.state_dir, *settings.state_dir.parents) if place.exists())
    if folder.stat().st_dev not in disks:
        try:
            with measured.scratch(folder) as path:
                finding, rate = _disk([path])
        except OSError as error:
            finding, rate = Finding("disk", FAILURE, f"{folder}: {error.strerror}"), 0.0
        findings.append(finding)
        disks |= {folder.stat().st_dev: rate} if rate else {}
    memcpy = measured.memcpy()
    findings.append(Finding("memcpy", OK, f"{size(memcpy)}/s, one thread", memcpy))
    device_rate = None
    if parse_devices(settings.devices)[0] == "cuda":
        finding, device_rate = _device()
        findings.append(finding)
    return findings, Rates(disks, memcpy, device_rate)


def _large_files(sources: Sequence[Path]) -> dict[int, list[Path]]:
    """The weights that are worth reading, by their disk."""
    from serverless_llm.cli.measure import LARGE
    from serverless_llm.loader.manifest import REMOTE

    found: dict[int, list[Path]] = {}
    here = [source for source in sources if not (source.parent / REMOTE).exists()]
    for path in sorted(path for source in here for path in source.glob("*.safetensors")):
        with contextlib.suppress(OSError):
            stat = path.stat()
            if stat.st_size >= LARGE:
                found.setdefault(stat.st_dev, []).append(path)
    return found


def _disk(files: list[Path]) -> tuple[Finding, float]:
    from serverless_llm.cli.measure import disk

    where = files[0].parent
    try:
        rate, direct = disk(files)
    except OSError as error:
        return Finding("disk", FAILURE, f"{where}: {error.strerror}"), 0.0
    how = "O_DIRECT" if direct else "through the page cache: this file system knows no O_DIRECT"
    return Finding("disk", OK, f"{size(rate)}/s at {where}, {how}", rate), rate


def _device() -> tuple[Finding, float | None]:
    from serverless_llm.cli.measure import device

    try:
        rate = device(0)
    except Exception as error:  # noqa: BLE001  whatever torch, built for CUDA or not, comes up with
        return Finding("device", FAILURE, f"cuda:0 cannot be used: {error}"), None
    return Finding("device", OK, f"{size(rate)}/s from pinned memory", rate), rate  # pragma: no cover - cuda


# --- predictions ---


def forecast(name: str, path: Path, settings: Config, rates: Rates, overhead_s: float) -> Forecast:
    """What placement would say of a start on an empty device, with the measured bandwidths.

    `overhead_s`: what a start takes beside moving bytes.
    """
    from serverless_llm.cluster.policy import Policy
    from serverless_llm.domain import DeviceSpec, ModelSpec
    from serverless_llm.node.admin import footprint
    from serverless_llm.placement import estimate, fit

    entry = settings.models.get(name) or ModelEntry(source=str(path))
    spec = ModelSpec(name, str(path), entry.dtype, context=entry.context)
    try:
        needs = footprint(spec)
    except (CheckpointError, RequestError) as error:
        return Forecast(name, str(path), error=str(error))
    policy = Policy()
    kind, _ = parse_devices(settings.devices)
    view = kind == "cpu" and settings.weights == "view"
    budget = settings.device_memory or _free_memory() or UNKNOWN
    floor = fit.kv_floor(needs, budget, policy.kv_floor_tokens, policy.kv_floor_share)
    device = DeviceSpec(0, kind, budget, "view" if view else "copy")
    if not fit.holds_weights(needs, device, settings.dram, floor):
        least = fit.least_budget(needs, policy.kv_floor_tokens, policy.kv_floor_share)
        why = f"{enough(least)} of weights and least KV do not fit a device of {size(budget)}"
        return Forecast(name, str(path), needs.file_bytes, error=f"{why} with {size(settings.dram)} of DRAM")
    disk = min(rates.disk.get(path.stat().st_dev, policy.disk_bps), settings.limits.disk or math.inf)
    upload = min(rates.device or rates.memcpy, settings.limits.upload or math.inf)
    remote = min(rates.remote or policy.remote_bps, settings.limits.remote or math.inf)
    links = estimate.Links(remote, disk, upload, overhead_s)
    moved, away = 0 if view else needs.weight_bytes, needs.remote_bytes
    cold, warm = (estimate.startup_s(estimate.Start(0, missing, moved), links) for missing in (needs.file_bytes, 0))
    first = estimate.startup_s(estimate.Start(0, needs.file_bytes - away, moved, 0, away), links) if away else None
    return Forecast(name, str(path), needs.file_bytes, cold, warm, first)


def directory_of(source: str) -> Path:
    """A source of the configuration, which may be a demo's name, a hub's id or a URL, without asking the network."""
    from serverless_llm.cli import hub, sources
    from serverless_llm.loader import disk_tier, remote

    if source in sources.demos():
        return Path(sources.resolve(source))
    if remote.is_url(source) and (lease := disk_tier.tier().latest(source, Path.exists)):
        with lease:
            return lease.directory
    wanted = hub.repository(source)
    found = hub.cached(wanted) if wanted and not Path(source).is_dir() else None
    return found.directory if found else Path(source).expanduser().resolve()


def _free_memory() -> int:
    """Bytes of the first GPU; 0 where the driver does not tell."""
    from serverless_llm.errors import CapacityError
    from serverless_llm.node.devices import free

    try:
        return free(0)
    except CapacityError:
        return 0
