"""One configuration: flags over `SERVERLESS_LLM_*` variables over one YAML file over defaults.

Unknown keys are errors that name the nearest key. Sizes are written `2GiB` or `20MB`, rates `20MB/s`, shares of the
available memory `50%`, durations `90s`, `5m`, `1h`, and `-1` for ever. `${env.NAME}` in the file is replaced by that
variable, so that no secret needs to stand there. Everything raises ConfigurationError and nothing else.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from serverless_llm.errors import ConfigurationError

PREFIX = "SERVERLESS_LLM_"
CLIENT_VARIABLES = frozenset({"SERVERLESS_LLM_URL", "SERVERLESS_LLM_CONFIG"})  # read elsewhere, no options
NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")  # a model's name
LEAST_MEMORY = 1 << 20  # bytes; less holds nothing
LEAST_BODY = 1 << 10  # bytes; less holds no conversation
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})

UNITS = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base**power
    for suffix, base in (("B", 1000), ("", 1000), ("iB", 1024))
    for power, letter in enumerate("KMGT", start=1)
}
SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
DURATION = re.compile(r"(-?)([0-9]+(?:\.[0-9]+)?|(?:[0-9]+(?:\.[0-9]+)?\s*(?:ms|[smhd])\s*)+)")
PART = re.compile(r"([0-9.]+)\s*([a-z]*)")
LONGEST = 1e12  # seconds; a longer time is a mistake, -1 is for ever
QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z%]*)\s*")


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rate caps of a node's links in bytes per second; 0: none."""

    disk: float = 0.0
    upload: float = 0.0


class ModelEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model deployed at start; None: the server's or the checkpoint's default. `keep_alive` in seconds."""

    source: str
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    keep_alive: float | None = None
    min_replicas: int = 0
    max_replicas: int = 1
    max_concurrency: int = 64
    max_queue: int = 1024
    context: int | None = None
    pinned: bool = False


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `serverless-llm serve` runs with. Sizes are bytes, times are seconds.

    Attributes:
        port: 0 takes a free one.
        hosts: further names by which clients may call this server (`Host` header).
        api_key: what clients send; None on loopback needs none, elsewhere one is generated and kept in `state_dir`.
        keys_file: a YAML list of keys with scopes and limits (docs/operations.md), beside or instead of `api_key`.
        tls_cert: PEM certificate chain; with it and `tls_key` the server speaks TLS only.
        connections: most at a time; further ones are told to come back.
        body_limit: bytes of a request's body.
        state_dir: database, locks, tokens and logs; one server at a time.
        nodes: node agents on this machine.
        devices: of each node: `cpu:N` logical CPU devices, `cuda:N` GPUs, `auto` the GPUs or else one CPU device.
        device_memory: bytes for weights and KV of one CPU device; of CUDA devices too, None: nearly all there is.
        weights: on CPU devices, `view` (tensors are views into DRAM) or `copy` (a private arena).
        dram: capacity of one node's DRAM tier.
        threads: compute threads of one CPU device; by default an equal share of the cores, one of three or more left to
            the gateway.
        keep_alive: how long an unused model stays on its device, unless its spec says otherwise.
        hold: how long a request that does not stream waits for a cold start before 503.
        abandon_after: how long a load goes on that nobody waits for any more.
        drain: how long running streams get when the server stops.
        orphan_grace: how long a node agent waits for a new head.
        heartbeat: `chunk` or `comment`: how a silent stream is kept alive.
        model_roots: directories that a deployed source must lie in, demo checkpoints excepted; empty: anywhere.
        models: deployed at start, by name.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    hosts: tuple[str, ...] = ()
    api_key: str | None = None
    keys_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    connections: int = 10_000
    body_limit: int = 16 << 20
    state_dir: Path
    nodes: int = 1
    devices: str = "auto"
    device_memory: int | None = None
    weights: Literal["view", "copy"] = "view"
    dram: int
    limits: Limits = Limits()
    threads: int = 1
    keep_alive: float = 300.0
    hold: float = 60.0
    abandon_after: float = 60.0
    drain: float = 30.0
    orphan_grace: float = 60.0
    heartbeat: Literal["chunk", "comment"] = "chunk"
    model_roots: tuple[Path, ...] = ()
    models: dict[str, ModelEntry] = {}


# --- quantities as people write them ---


def parse_size(value: object, whole: int | None = None) -> int:
    """Bytes of `1536`, `2GiB`, `20MB` or, where `whole` is given, `50%` of it."""
    match = QUANTITY.fullmatch(str(value))
    if match and match[2] == "%" and whole is not None:
        return int(whole * float(match[1]) / 100)
    if not match or match[2] not in UNITS:
        raise ConfigurationError(f"{value!r} is no size; write bytes, 512MiB or 2GB" + (" or 50%" if whole else ""))
    return int(float(match[1]) * UNITS[match[2]])


def parse_rate(value: object) -> float:
    """Bytes per second of `20MB/s`, or of a number."""
    return float(parse_size(str(value).strip().removesuffix("/s")))


def parse_duration(value: object) -> float:
    """Seconds of `90`, `500ms`, `5m`, `1h30m`; whatever is below 0 is for ever."""
    match = DURATION.fullmatch(str(value).strip())
    seconds = sum(float(number) * SECONDS[unit] for number, unit in PART.findall(match[2])) if match else math.inf
    if match is None or seconds >= LONGEST:
        raise ConfigurationError(f"{value!r} is no duration; write seconds, 500ms, 5m, 1h30m, or -1 for ever")
    return math.inf if match[1] and seconds else seconds


def parse_devices(value: str) -> tuple[str, int]:
    """Kind (`cpu` or `cuda`) and number of a node's devices; `auto` looks for NVIDIA's device files."""
    if value == "auto":
        gpus = sum(path.name[6:].isdigit() for path in Path("/dev").glob("nvidia*"))
        return ("cuda", gpus) if gpus else ("cpu", 1)
    kind, _, number = value.partition(":")
    if kind not in {"cpu", "cuda"} or not (number or "1").isdigit() or int(number or "1") == 0:
        raise ConfigurationError(f"devices: {value!r} is neither cpu:N nor cuda:N nor auto")
    return kind, int(number or "1")


def parse_pairs(value: object) -> dict[str, Any]:
    """`a=1,b=2`, a list of `a=1`, or a mapping."""
    if isinstance(value, Mapping):
        return dict(value)
    parts = value.split(",") if isinstance(value, str) else list(value) if isinstance(value, Iterable) else [value]
    bad = [part for part in parts if "=" not in str(part)]
    if bad:
        raise ConfigurationError(f"{bad[0]!r} is not of the form name=value")
    return {name.strip(): text.strip() for name, _, text in (str(part).partition("=") for part in parts)}


def _list(value: object) -> object:
    return value.split(",") if isinstance(value, str) else value


# --- where values come from ---


def search_path(environ: Mapping[str, str]) -> list[Path]:
    """The files of which the first that exists is read."""
    home = Path(environ.get("XDG_CONFIG_HOME") or Path(environ.get("HOME", "/")) / ".config")
    name = "serverless-llm"
    return [Path(f"{name}.yaml"), home / name / f"{name}.yaml", Path("/etc") / name / f"{name}.yaml"]


def default_state_dir(environ: Mapping[str, str]) -> Path:
    home = Path(environ.get("XDG_STATE_HOME") or Path(environ.get("HOME", "/")) / ".local" / "state")
    return home / "serverless-llm"


def state_dir(environ: Mapping[str, str]) -> Path:
    """Where a client looks for a running server."""
    return Path(environ.get(f"{PREFIX}STATE_DIR") or default_state_dir(environ))


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """The smaller of the machine's available memory and the tightest cgroup limit above this process, in bytes."""
    found = re.search(r"MemAvailable:\s*(\d+)", (proc / "meminfo").read_text())
    limits = [int(found[1]) * 1024] if found else []
    for line in _lines(proc / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        root, file = (cgroups, "memory.max") if not controllers else (cgroups / "memory", "memory.limit_in_bytes")
        folder = root / path.strip("/")
        for place in (folder, *folder.parents):
            limits += [int(text) for text in _lines(place / file) if text.isdigit()]
            if place == root:
                break
    return min(limits)


def _lines(path: Path) -> list[str]:
    """The lines of a small file; none when it cannot be read."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def load(
    flags: Mapping[str, Any], environ: Mapping[str, str], path: Path | None = None, memory: int | None = None
) -> Config:
    """The configuration of a server.

    Args:
        flags: options of the command line, in the names of `Config`; None stands for "not given".
        environ: the process's environment.
        path: the YAML file; None: the first of `search_path` that exists.
        memory: available bytes, of which shares are taken; None: looked up.
    """
    named = path or (Path(environ[f"{PREFIX}CONFIG"]) if environ.get(f"{PREFIX}CONFIG") else None)
    file = named or next((place for place in search_path(environ) if place.is_file()), None)
    raw = {
        **(_from_file(file, environ) if file else {}),
        **_from_environ(environ),
        **{name: value for name, value in flags.items() if value is not None},
    }
    raw.setdefault("state_dir", str(default_state_dir(environ)))
    return _convert(_derived(raw, available_memory() if memory is None else memory))


def _from_file(path: Path, environ: Mapping[str, str]) -> dict[str, Any]:
    import yaml

    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{path}: {error}") from error
    if not isinstance(raw, dict | None):
        raise ConfigurationError(f"{path}: a mapping of options is needed")
    values: dict[str, Any] = expand(raw or {}, environ)
    _check_keys(values, Config, str(path))
    return values


def expand(value: Any, environ: Mapping[str, str]) -> Any:
    """`value` with every `${env.NAME}` of its texts replaced."""

    def variable(match: re.Match[str]) -> str:
        if match[1] not in environ:
            raise ConfigurationError(f"the configuration needs the environment variable {match[1]}, which is not set")
        return environ[match[1]]

    if isinstance(value, str):
        return re.sub(r"\$\{env\.(\w+)\}", variable, value)
    if isinstance(value, dict):
        return {key: expand(entry, environ) for key, entry in value.items()}
    return [expand(entry, environ) for entry in value] if isinstance(value, list) else value


def _from_environ(environ: Mapping[str, str]) -> dict[str, Any]:
    names = [name for name in environ if name.startswith(PREFIX) and name not in CLIENT_VARIABLES]
    values = {name.removeprefix(PREFIX).lower(): environ[name] for name in names if environ[name]}
    _check_keys(values, Config, "environment", lambda key: PREFIX + key.upper())
    return values


def _check_keys(
    values: Mapping[str, Any], kind: type[msgspec.Struct], where: str, show: Callable[[str], str] = str
) -> None:
    for key in values:
        if key not in kind.__struct_fields__:
            near = difflib.get_close_matches(str(key), kind.__struct_fields__, n=1, cutoff=0.0)
            raise ConfigurationError(f"{where}: unknown key {show(str(key))!r}; did you mean {show(near[0])!r}?")


# --- from texts to values ---


def _derived(raw: dict[str, Any], memory: int) -> dict[str, Any]:
    """`raw` with quantities as numbers and the defaults that depend on this machine."""
    values = dict(raw)
    for name, parse in PARSERS.items():
        if name in values:
            values[name] = parse(values[name])
    nodes = _count(values.get("nodes", 1), "nodes")
    kind, devices = parse_devices(str(values.get("devices", "auto")))
    values["dram"] = parse_size(values.get("dram", f"{50 / nodes}%"), memory)
    if "device_memory" in values or kind == "cpu":
        values["device_memory"] = parse_size(values.get("device_memory", f"{50 / (nodes * devices):.3f}%"), memory)
    if kind == "cpu" and not LEAST_MEMORY <= values["device_memory"] <= memory:
        raise ConfigurationError(f"device_memory: {values['device_memory']} bytes, of {memory} that this machine has")
    if not LEAST_MEMORY <= values["dram"] <= memory // nodes:
        raise ConfigurationError(f"dram: {nodes} x {values['dram']} bytes, of {memory} that this machine has")
    cores = len(os.sched_getaffinity(0))
    values.setdefault("threads", max(1, (cores - (cores > 2)) // (nodes * devices)))
    values["devices"] = f"{kind}:{devices}"
    return values


def _count(value: object, name: str) -> int:
    if not str(value).isdigit() or int(str(value)) < 1:
        raise ConfigurationError(f"{name}: {value!r} is not a number from 1 up")
    return int(str(value))


def _limits(value: object) -> dict[str, float]:
    pairs = parse_pairs(value)
    _check_keys(pairs, Limits, "limits")
    return {link: parse_rate(rate) for link, rate in pairs.items()}


def _models(value: object) -> dict[str, dict[str, Any]]:
    models = {}
    for name, entry in parse_pairs(value).items():
        if not NAME.fullmatch(name):
            raise ConfigurationError(f"models: {name!r} is no name of a model (pattern {NAME.pattern})")
        fields = {"source": entry} if isinstance(entry, str) else dict(entry or {})
        _check_keys(fields, ModelEntry, f"models.{name}")
        if fields.get("keep_alive") is not None:
            fields["keep_alive"] = parse_duration(fields["keep_alive"])
        models[name] = fields
    return models


PARSERS: dict[str, Callable[[Any], Any]] = {
    "limits": _limits,
    "models": _models,
    "body_limit": parse_size,
    "hosts": _list,
    "model_roots": _list,
    **dict.fromkeys(("keep_alive", "hold", "abandon_after", "drain", "orphan_grace"), parse_duration),
}


def _convert(values: dict[str, Any]) -> Config:
    try:
        config = msgspec.convert(values, Config, strict=False, dec_hook=_path)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"configuration: {error}") from error
    if not 0 <= config.port <= 65535:
        raise ConfigurationError(f"port: {config.port} is not between 0 and 65535")
    if config.connections < 1 or config.body_limit < LEAST_BODY:
        raise ConfigurationError(f"connections must be at least 1 and body_limit {LEAST_BODY} bytes")
    if (config.tls_cert is None) != (config.tls_key is None):
        raise ConfigurationError("tls_cert and tls_key belong together: give both or none")
    roots = tuple(root.expanduser().resolve() for root in config.model_roots)
    return msgspec.structs.replace(config, state_dir=config.state_dir.expanduser().resolve(), model_roots=roots)


def _path(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str | Path):
        return Path(value)
    raise NotImplementedError(f"{value!r} is no {kind.__name__}")
