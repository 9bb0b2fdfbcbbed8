"""What must hold on this machine for a server to work, each check as one finding."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from serverless_llm.cli.client import orphans, read_head
from serverless_llm.config import Config, count_gpus, parse_devices
from serverless_llm.loader import hugefile, pool
from serverless_llm.loader.headroom import available_memory
from serverless_llm.node.state import is_model
from serverless_llm.quantities import size

OK, WARNING, FAILURE = "ok", "warn", "fail"
FEW_DESCRIPTORS = 256  # with fewer not even agents and workers get theirs; arbitrary
SPARE_DESCRIPTORS = 256  # beside those of connections
LITTLE_SPACE = 1 << 30  # bytes; logs and the database need far less, checkpoints far more


@dataclass(frozen=True, slots=True)
class Finding:
    """One check. `value` is for scripts: a number, a text or None; `text` is for people, and says what to do."""

    name: str
    level: str
    text: str
    value: Any = None


def versions() -> Finding:
    names = ("serverless-llm", "torch", "aiohttp", "tokenizers", "uvloop")
    system = {"python": platform.python_version(), "linux": platform.release()}
    found = system | {name: _version(name) for name in names}
    missing = [name for name in names[1:] if found[name] is None]
    if missing:
        return Finding("versions", FAILURE, f"{', '.join(missing)} cannot be found: install serverless-llm anew", found)
    return Finding("versions", OK, ", ".join(f"{name} {number}" for name, number in found.items() if number), found)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # of serverless-llm itself: a checkout
        return None


def checks(settings: Config) -> Iterator[Finding]:
    """All that need no measurement."""
    looks: tuple[Callable[[Config], Finding], ...] = (
        state_directory, address, memory, descriptors, locked_memory, shared_memory, huge_pages, free_space,
    )  # fmt: skip
    for look in looks:
        yield look(settings)
    yield from gpus(settings)


def state_directory(settings: Config) -> Finding:
    folder = settings.state_dir
    present = next(place for place in (folder, *folder.parents) if place.exists())
    if not os.access(present, os.W_OK | os.X_OK) or not present.is_dir():
        return Finding("state", FAILURE, f"{present} cannot be written: choose another --state-dir", str(folder))
    if is_model(folder):
        text = f"{folder} holds a model, not a server's state: choose another --state-dir"
        return Finding("state", FAILURE, text, str(folder))
    if folder.exists() and folder.stat().st_mode & 0o077:
        return Finding("state", WARNING, f"{folder} is open to others, and holds keys: chmod 700 {folder}", str(folder))
    return Finding("state", OK, str(folder), str(folder))


def address(settings: Config) -> Finding:
    """Whether a server could listen, or does."""
    head = read_head(settings.state_dir)
    if head is not None:
        url = head.get("public") or head["url"]
        return Finding("server", OK, f"runs at {url}, pid {head['pid']}", url)
    where = f"{settings.host} port {settings.port}"
    try:
        family, kind, _, _, place = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        return Finding("server", FAILURE, f"none runs, and none could listen on {where}: {error.strerror}; see --port")
    if left := orphans(settings.state_dir):
        pids = ", ".join(map(str, left))
        why = (
            f"none runs, but agents of a killed one hold their memory for up to {settings.orphan_grace:g} s: pid {pids}"
        )
        return Finding("server", WARNING, f"{why}; serve takes them over")
    return Finding("server", OK, f"none runs; {where} is free")


def memory(settings: Config) -> Finding:
    there = available_memory()
    kind, devices = parse_devices(settings.devices)
    wanted = settings.nodes * settings.dram
    if kind == "cpu" and settings.weights == "copy":
        wanted += settings.nodes * devices * (settings.device_memory or 0)
    text = f"{size(there)} available; {size(settings.dram)} for DRAM, {settings.devices}"
    text += f" of {size(settings.device_memory)} each" if settings.device_memory else ""
    if wanted > there and read_head(settings.state_dir) is None:
        return Finding("memory", FAILURE, f"{text}: {size(wanted)} are wanted; lower dram or device_memory", there)
    return Finding("memory", OK, text, there)


def descriptors(settings: Config) -> Finding:
    """A server raises its soft limit itself, as far as the hard one allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = sys.maxsize if hard == resource.RLIM_INFINITY else hard
    text = f"at most {most}"
    if most < FEW_DESCRIPTORS:
        return Finding("descriptors", FAILURE, f"{text}, too few: ulimit -n 4096, or LimitNOFILE= of the unit", most)
    if most < settings.connections + SPARE_DESCRIPTORS:
        why = f"{text}, fewer than {settings.connections} connections need: ulimit -n, or a smaller `connections`"
        return Finding("descriptors", WARNING, why, most)
    return Finding("descriptors", OK, "no limit" if most == sys.maxsize else text, most)


def locked_memory(settings: Config) -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = None if soft == resource.RLIM_INFINITY else soft
    text = "no limit" if limit is None else size(limit)
    if limit is not None and limit < settings.dram and parse_devices(settings.devices)[0] == "cuda":
        why = f"{text} may be pinned, less than dram ({size(settings.dram)}): ulimit -l unlimited, or LimitMEMLOCK="
        return Finding("memlock", WARNING, why, limit)
    return Finding("memlock", OK, f"{text} on memory that may be pinned", limit)


def shared_memory(settings: Config) -> Finding:
    """Checkpoints lie in memfds, which no mount bounds."""
    try:
        os.close(os.memfd_create("doctor"))
    except OSError as error:
        return Finding("shm", FAILURE, f"memory that processes share cannot be made (memfd_create: {error.strerror})")
    try:
        total = shutil.disk_usage("/dev/shm").total
    except OSError:
        return Finding("shm", OK, "memory that processes share can be made; there is no /dev/shm, and none is used")
    return Finding("shm", OK, f"memory that processes share can be made; /dev/shm ({size(total)}) is not used", total)


def huge_pages(settings: Config) -> Finding:
    path = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
    if pool.shared_huge_pages():
        return Finding("huge pages", OK, f"shared memory has them ({path})", "memfd")
    private = hugefile.open_file(pool.HUGE_PAGE)
    if private is not None:
        os.close(private)
        least = size(pool.LARGE)
        return Finding("huge pages", OK, f"the pool's own tmpfs has them, if it is of {least} or more", "tmpfs")
    why = f"neither shared memory nor a tmpfs of the pool's own has them, which costs some speed: echo advise > {path}"
    return Finding("huge pages", WARNING, why, "none")


def free_space(settings: Config) -> Finding:
    folder = next(place for place in (settings.state_dir, *settings.state_dir.parents) if place.exists())
    free = shutil.disk_usage(folder).free
    level = OK if free >= LITTLE_SPACE else WARNING if free >= LITTLE_SPACE // 100 else FAILURE
    advice = "" if level == OK else ": state and logs may not be written"
    return Finding("space", level, f"{size(free)} free at {folder}{advice}", free)


def gpus(settings: Config) -> Iterator[Finding]:
    """The driver and each GPU, where GPUs are wanted or there."""
    wanted = parse_devices(settings.devices)
    try:
        found = _nvml()
    except Exception as error:  # noqa: BLE001  whatever a driver, or a library without one, comes up with
        if wanted[0] == "cuda":
            yield Finding("driver", FAILURE, f"{settings.devices} is wanted, but the NVIDIA driver says: {error}")
        else:
            yield Finding("driver", OK, "no NVIDIA GPU", None)
        return
    yield from found  # pragma: no cover - cuda


def _nvml() -> list[Finding]:
    """The GPUs as CUDA counts them."""
    import pynvml

    from serverless_llm.node import devices

    pynvml.nvmlInit()
    version = str(pynvml.nvmlSystemGetDriverVersion())  # pragma: no cover - cuda
    found = [Finding("driver", OK, f"NVIDIA {version}", version)]  # pragma: no cover - cuda
    for number in range(count_gpus(os.environ)):  # pragma: no cover - cuda
        gpu = devices.handle(number, os.environ)
        used = pynvml.nvmlDeviceGetMemoryInfo(gpu)
        text = f"{pynvml.nvmlDeviceGetName(gpu)}, {size(used.free)} free of {size(used.total)}"
        found.append(Finding(f"gpu {number}", OK, text, int(used.free)))
    return found  # pragma: no cover - cuda
