"""One configuration: flags over `SERVERLESS_LLM_*` variables over one YAML file over defaults.

Unknown keys are errors that name the nearest key; every error names the flag, variable or key at fault. Quantities are
written as `quantities` reads them. `${env.NAME}` in the file is replaced by that variable, so that no secret needs to
stand there. Everything raises ConfigurationError and nothing else.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from serverless_llm.errors import ConfigurationError, did_you_mean
from serverless_llm.loader.headroom import available_memory
from serverless_llm.quantities import parse_duration, parse_pairs, parse_rate, parse_size, size
from serverless_llm.surroundings import PREFIX, default_state_dir, search_path

CLIENT_VARIABLES = frozenset({f"{PREFIX}URL", f"{PREFIX}CONFIG", f"{PREFIX}REMOTE_CACHE"})  # read elsewhere, no options
KEY_VARIABLE = f"{PREFIX}API_KEY"  # empty it is a mistake, as others are not: without a key everybody may call
NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")  # a model's name
NO_NAME = "%r is no name of a model: letters, digits, '.', '_', '-' and at most one '/', first an ASCII letter or digit"
HOST = re.compile(r"[^\s:/*,@?#\[\]]+|[0-9A-Fa-f.]*(:[0-9A-Fa-f.]*){2,}")  # a name or an address; the port is any
DEVICES = re.compile(r"(cpu|cuda)(?::([1-9][0-9]{0,5}))?")
KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
KINDS |= {"array": "a list", "object": "a mapping", "null": "nothing"}  # as msgspec names them
EXPECTED = re.compile(rf"Expected `({'|'.join(KINDS)})(?: \| null)?`, got `({'|'.join(KINDS)})`$")
T = TypeVar("T")
LEAST_MEMORY = 1 << 20  # bytes; less holds nothing
LEAST_RATE = 100e3  # bytes per second; less is a unit forgotten
LEAST_BODY = 1 << 10  # bytes; less holds no conversation


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rate caps of a node's links in bytes per second; 0: none.

    Attributes:
        remote: what servers of sources send to it.
        disk: what it reads from its disks.
        upload: what it copies to each of its devices.
    """

    remote: float = 0.0
    disk: float = 0.0
    upload: float = 0.0


class ModelEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model deployed at start; None: the server's or the checkpoint's default. `keep_alive` in seconds,
    -1: for ever."""

    source: str
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    keep_alive: float | None = None
    min_replicas: int = 0
    max_replicas: int = 1
    max_concurrency: int = 64
    max_queue: int = 1024
    context: int | None = None
    pinned: bool = False
    verify: Literal["off", "sample", "full"] = "off"


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `serverless-llm serve` runs with. Sizes are bytes, times are seconds.

    Attributes:
        host: address to listen on; off loopback a key is needed.
        port: 0 takes a free one.
        hosts: further names by which clients may call this server (`Host` header), whatever its port; `/admin/` needs a
            key under them.
        api_key: what clients send; None on loopback needs none, elsewhere one is generated and kept in `state_dir`.
        keys_file: a YAML list of keys with scopes and limits (docs/operations.md), beside or instead of `api_key`.
        tls_cert: PEM certificate chain; with it and `tls_key` the server speaks TLS only.
        tls_key: PEM key of that certificate.
        connections: most at a time; further ones are told to come back.
        body_limit: bytes of a request's body.
        state_dir: database, locks, tokens and logs; one server at a time.
        nodes: node agents on this machine.
        devices: of each node: `cpu:N` logical CPU devices, `cuda:N` GPUs, `auto` the GPUs or else one CPU device.
        device_memory: bytes for weights and KV of one CPU device; of CUDA devices too, None: nearly all there is.
        weights: on CPU devices, `view` (tensors are views into DRAM) or `copy` (a private arena).
        dram: capacity of one node's DRAM tier.
        limits: caps on what a node's links move, for operators and tests: `remote`, `disk`, `upload`.
        threads: compute threads of one CPU device; by default an equal share of the cores, one of three or more left to
            the gateway.
        keep_alive: how long an unused model stays on its device, unless its spec says otherwise; -1: for ever.
        hold: how long a request that does not stream waits for a cold start before 503; -1: as long as it takes.
        abandon_after: how long a load goes on that nobody waits for any more; -1: to its end.
        drain: how long running streams get when the server stops; a stop has an end, so -1 is refused.
        orphan_grace: how long a node agent waits for a new head; -1: for ever.
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


# --- devices ---


def parse_devices(value: str, gpus: int = 0) -> tuple[str, int]:
    """Kind (`cpu` or `cuda`) and number of a node's devices; `auto` takes all `gpus` there are."""
    if value == "auto":
        return ("cuda", gpus) if gpus else ("cpu", 1)
    match = DEVICES.fullmatch(value)
    if not match:
        raise ConfigurationError(f"{value!r} is neither cpu:N nor cuda:N nor auto, N from 1 on")
    return match[1], int(match[2] or 1)


def _list(value: object) -> object:
    return value.split(",") if isinstance(value, str) else value


def count_gpus(environ: Mapping[str, str], devices: Path = Path("/dev")) -> int:
    """The GPUs that have a device file, or as many of them as CUDA_VISIBLE_DEVICES names."""
    there = sum(path.name[6:].isdigit() for path in devices.glob("nvidia*"))
    shown = visible_gpus(environ)
    return there if shown is None else min(there, len(shown))


def visible_gpus(environ: Mapping[str, str]) -> list[str] | None:
    """What CUDA_VISIBLE_DEVICES names, by number or UUID, in the order in which CUDA counts; None: all there are."""
    names = environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return None
    return list(itertools.takewhile(lambda name: name not in {"", "-1"}, map(str.strip, names.split(","))))


# --- where values come from ---


class Given(NamedTuple):
    """An option's value as somebody wrote it, and `where`: `--port`, `SERVERLESS_LLM_PORT` or `FILE: port`."""

    value: Any
    where: str


def load(
    flags: Mapping[str, Any], environ: Mapping[str, str], path: Path | None = None, memory: int | None = None
) -> Config:
    """The configuration of a server; see `load_with_places`."""
    return load_with_places(flags, environ, path, memory)[0]


def load_with_places(
    flags: Mapping[str, Any], environ: Mapping[str, str], path: Path | None = None, memory: int | None = None
) -> tuple[Config, dict[str, str]]:
    """The configuration of a server, and where it has each option from, for messages about it; those that nobody gave
    are at their own names. The file is read once: it may be a pipe.

    Args:
        flags: options of the command line, in the names of `Config`; None stands for "not given".
        environ: the process's environment.
        path: the YAML file; None: the first of `search_path` that exists.
        memory: available bytes, of which shares are taken; None: looked up.

    Raises:
        ConfigurationError: names the flag, variable or key at fault.
    """
    given = _given(flags, environ, path)
    given.setdefault("state_dir", Given(str(default_state_dir(environ)), "state_dir"))
    where = {name: name for name in Config.__struct_fields__} | {name: one.where for name, one in given.items()}
    return _checked(given, count_gpus(environ), available_memory() if memory is None else memory), where


def _given(flags: Mapping[str, Any], environ: Mapping[str, str], path: Path | None) -> dict[str, Given]:
    named = path or (Path(environ[f"{PREFIX}CONFIG"]) if environ.get(f"{PREFIX}CONFIG") else None)
    file = named or next((place for place in search_path(environ) if place.is_file()), None)
    return {
        **(_from_file(file, environ) if file else {}),
        **_from_environ(environ),
        **{name: Given(value, flag(name)) for name, value in flags.items() if value is not None},
    }


def flag(name: str) -> str:
    """The flag of an option: those of lists are in the singular, since they are given again and again."""
    singular = name.removesuffix("s") if name in {"limits", "models", "model_roots", "hosts"} else name
    return "--" + singular.replace("_", "-")


def _from_file(path: Path, environ: Mapping[str, str]) -> dict[str, Given]:
    from serverless_llm import strict_yaml

    try:
        raw = strict_yaml.load(path.read_text())
    except (OSError, ValueError, RecursionError, strict_yaml.YAMLError) as error:
        raise ConfigurationError(f"{path}: {_plain(error)}") from None
    if not isinstance(raw, dict | None):
        raise ConfigurationError(f"{path}: a mapping of options is needed")
    _check_keys(raw or {}, Config, f"{path}: ")
    values = {name: Given(value, f"{path}: {name}") for name, value in (raw or {}).items() if value is not None}
    return {name: one._replace(value=_expanded(one, environ)) for name, one in values.items()}


def _plain(error: Exception) -> str:
    """What is wrong with a file, without the text around it, which may be a secret."""
    mark = getattr(error, "problem_mark", None)
    if isinstance(error, UnicodeDecodeError):
        return "no text in UTF-8"
    if mark is None:
        return getattr(error, "strerror", None) or str(error)
    said = ", ".join(filter(None, (getattr(error, "context", None), getattr(error, "problem", None))))
    return f"line {mark.line + 1}, column {mark.column + 1}: {said}"


def _expanded(given: Given, environ: Mapping[str, str]) -> Any:
    try:
        return expand(given.value, environ)
    except (ConfigurationError, RecursionError) as error:
        raise ConfigurationError(f"{given.where}: {error}") from None


def expand(value: Any, environ: Mapping[str, str]) -> Any:
    """`value` with every `${env.NAME}` of its texts replaced."""

    def variable(match: re.Match[str]) -> str:
        if match[1] not in environ:
            raise ConfigurationError(f"the environment variable {match[1]} is not set")
        return environ[match[1]]

    if isinstance(value, str):
        return re.sub(r"\$\{env\.(\w+)\}", variable, value)
    if isinstance(value, dict):
        return {key: expand(entry, environ) for key, entry in value.items()}
    return [expand(entry, environ) for entry in value] if isinstance(value, list) else value


def _from_environ(environ: Mapping[str, str]) -> dict[str, Given]:
    names = [name for name in environ if name.startswith(PREFIX) and name not in CLIENT_VARIABLES]
    there = [name for name in names if environ[name] or name == KEY_VARIABLE]
    values = {name.removeprefix(PREFIX).lower(): Given(environ[name], name) for name in there}
    _check_keys(values, Config, "environment: ", lambda key: PREFIX + key.upper())
    return values


def _check_keys(
    values: Mapping[str, Any], kind: type[msgspec.Struct], where: str, show: Callable[[str], str] = str
) -> None:
    for key in values:
        if key not in kind.__struct_fields__:
            near = did_you_mean(show(str(key)), [show(name) for name in kind.__struct_fields__])
            raise ConfigurationError(f"{where}unknown key {show(str(key))!r}{near}")


# --- from texts to values ---


def _checked(given: Mapping[str, Given], gpus: int, memory: int) -> Config:
    """The whole configuration; sizes and shares out of `memory`, and defaults that depend on this machine."""
    kinds = {field.name: field.type for field in msgspec.structs.fields(Config)}
    values = {name: _typed(one, kinds[name], PARSERS.get(name), memory) for name, one in given.items()}
    values |= _derived(values, {name: one.where for name, one in given.items()}, gpus, memory)
    config = Config(**values)
    if (config.tls_cert is None) != (config.tls_key is None):
        one = given["tls_key" if config.tls_cert is None else "tls_cert"]
        raise ConfigurationError(f"{one.where}: tls_cert and tls_key belong together: give both or none")
    roots = tuple(root.expanduser().resolve() for root in config.model_roots)
    return msgspec.structs.replace(config, state_dir=config.state_dir.expanduser().resolve(), model_roots=roots)


def _typed(given: Given, kind: Any, parse: Parser | None, memory: int) -> Any:
    """The value as its option wants it."""
    value = _parsed(lambda value: parse(value, memory), given.value, given.where) if parse else given.value
    return _converted(Given(value, given.where), kind)


def _parsed(parse: Callable[[Any], T], value: object, where: str) -> T:
    try:
        return parse(value)
    except ConfigurationError as error:
        raise ConfigurationError(f"{where}: {error}") from None


def _converted(given: Given, kind: Any) -> Any:
    try:
        return msgspec.convert(given.value, kind, strict=False, dec_hook=_path)
    except msgspec.ValidationError as error:
        place, what = in_words(error, kind)
        raise ConfigurationError(f"{given.where}{place}: {what}") from None


def in_words(error: msgspec.ValidationError, kind: Any) -> tuple[str, str]:
    """The place in a value that was to be of `kind`, as `.field`, and what is wrong there, without the value itself,
    which may be a secret."""
    what, _, place = str(error).partition(" - at `$")
    place = place.removesuffix("`")
    if place.startswith("."):
        field, item, _ = place[1:].partition("[")
        kind = get_type_hints(kind).get(field, kind)
        kind = get_args(kind)[0] if item else kind
    if get_origin(kind) is Literal:
        return place, f"must be one of {', '.join(get_args(kind))}"
    match = EXPECTED.match(what)
    return place, f"{KINDS[match[1]]} is needed, not {KINDS[match[2]]}" if match else what


def _path(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str | Path):
        return Path(value)
    raise TypeError(f"{value!r} is no path")


def _derived(values: dict[str, Any], where: Mapping[str, str], gpus: int, memory: int) -> dict[str, Any]:
    """The options whose default depends on this machine or on others, and those that it bounds."""
    for name, (least, most) in BOUNDS.items():
        if not least <= values.get(name, least) <= most:
            raise ConfigurationError(f"{where[name]}: {values[name]} is not between {least} and {most}")
    nodes = values.get("nodes", 1)
    kind, devices = parse_devices(values.get("devices", "auto"), gpus)
    found = {"devices": f"{kind}:{devices}", "dram": values.get("dram", memory // (2 * nodes))}
    if "device_memory" in values or kind == "cpu":
        found["device_memory"] = values.get("device_memory", memory // (2 * nodes * devices))
    for name, count, most in (("device_memory", 1, memory if kind == "cpu" else sys.maxsize), ("dram", nodes, memory)):
        nbytes = found.get(name, LEAST_MEMORY)
        if nbytes < LEAST_MEMORY or count * nbytes > most:
            each = size(nbytes) if count == 1 else f"{count} x {size(nbytes)}"
            bound = "less than 1 MiB" if nbytes < LEAST_MEMORY else f"more than the {size(memory)} available here"
            raise ConfigurationError(f"{where.get(name, name)}: {each} is {bound}")
    cores = len(os.sched_getaffinity(0))
    found["threads"] = values.get("threads", max(1, (cores - (cores > 2)) // (nodes * devices)))
    return found


def _limits(value: object, memory: int) -> dict[str, float]:
    pairs = parse_pairs(value)
    _check_keys(pairs, Limits, "")
    rates = {link: _parsed(parse_rate, rate, link) for link, rate in pairs.items()}
    for link, rate in rates.items():
        if 0 < rate < LEAST_RATE:
            raise ConfigurationError(
                f"{link}: {rate:g} bytes a second is less than 100 KB/s; write 500MB/s, or 0 for none"
            )
    return rates


def _models(value: object, memory: int) -> dict[str, ModelEntry]:
    if isinstance(value, list) and not all("=" in str(one) for one in value):
        raise ConfigurationError("a mapping is needed, a line for each model: `name: source`")
    if isinstance(value, str) and not all("=" in one for one in value.split(",")):
        raise ConfigurationError(f"{value!r} is not of the form name=source,name=source")
    return {str(name): _model(str(name), entry) for name, entry in parse_pairs(value).items()}


def _model(name: str, entry: object) -> ModelEntry:
    if not NAME.fullmatch(name):
        raise ConfigurationError(NO_NAME % name)
    fields = {"source": entry} if isinstance(entry, str) else entry
    if not isinstance(fields, dict):
        raise ConfigurationError(f"{name}: a source, or a mapping with one, is needed")
    _check_keys(fields, ModelEntry, f"{name}: ")
    given = {key: value for key, value in fields.items() if value is not None}
    if "keep_alive" in given:
        given["keep_alive"] = _parsed(parse_duration, given["keep_alive"], f"{name}.keep_alive")
    entry_: ModelEntry = _converted(Given(given, name), ModelEntry)
    return entry_


def _key(value: object, memory: int) -> object:
    """Without the white space around it, which no client can send."""
    key = value.strip() if isinstance(value, str) else value
    if key == "":
        raise ConfigurationError("it is empty, or the variable that it names is: give a key, or leave it out for none")
    return key


def _hosts(value: object, memory: int) -> object:
    listed = _list(value)
    for name in listed if isinstance(listed, list) else ():
        if isinstance(name, str) and not HOST.fullmatch(name):
            raise ConfigurationError(
                f"{name!r} is no host: a name alone is needed, as llm.example.org, without scheme, port or *"
            )
    return listed


def _devices(value: object, memory: int) -> str:
    parse_devices(str(value))
    return str(value)


Parser = Callable[[Any, int], Any]  # what was given, available bytes -> what `Config` holds
MANY = 1 << 20  # of anything that is counted: an arbitrary bound
BOUNDS = {
    "nodes": (1, MANY),
    "threads": (1, MANY),
    "port": (0, 65535),
    "connections": (1, MANY),
    "body_limit": (LEAST_BODY, MANY << 20),
}
PARSERS: dict[str, Parser] = {
    "api_key": _key,
    "devices": _devices,
    "limits": _limits,
    "models": _models,
    "hosts": _hosts,
    "model_roots": lambda value, _: _list(value),
    **dict.fromkeys(("dram", "device_memory"), parse_size),
    "body_limit": lambda value, _: parse_size(value),
    **dict.fromkeys(("keep_alive", "hold", "abandon_after", "orphan_grace"), lambda value, _: parse_duration(value)),
    "drain": lambda value, _: parse_duration(value, forever=False),
}
