"""Where configuration, state and processes are, and what a process may open; light, since every verb begins here."""

from __future__ import annotations

import contextlib
import os
import pwd
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

PREFIX = "SERVERLESS_LLM_"
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


def _home(environ: Mapping[str, str]) -> Path:
    """This user's directory, where HOME does not tell as the system knows it; `/` of a user whom nobody knows."""
    if environ.get("HOME"):
        return Path(environ["HOME"])
    try:
        return Path(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:
        return Path("/")


def search_path(environ: Mapping[str, str]) -> list[Path]:
    """The files of which the first that exists is read."""
    home = Path(environ.get("XDG_CONFIG_HOME") or _home(environ) / ".config")
    name = "serverless-llm"
    return [Path(f"{name}.yaml"), home / name / f"{name}.yaml", Path("/etc") / name / f"{name}.yaml"]


def default_state_dir(environ: Mapping[str, str]) -> Path:
    home = Path(environ.get("XDG_STATE_HOME") or _home(environ) / ".local" / "state")
    return home / "serverless-llm"


def state_dir(environ: Mapping[str, str]) -> Path:
    """Where a client looks for a running server."""
    return Path(environ.get(f"{PREFIX}STATE_DIR") or default_state_dir(environ)).expanduser()


def cache_dir(environ: Mapping[str, str]) -> Path:
    """What can be had again."""
    home = Path(environ.get("XDG_CACHE_HOME") or _home(environ) / ".cache")
    return home / "serverless-llm"


def began(pid: int) -> int | None:
    """When a process began, in ticks since the machine did: no two with the same number have it in common.

    None: it is dead, as a zombie is whose parent has not looked yet, once all its threads have ended.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" and int(fields[17]) <= 1 else int(fields[19])


def take_descriptors() -> int:
    """Raises the soft limit on this process's descriptors to the hard one; returns how many it may have then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError):  # `fs.nr_open` was lowered below the hard limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft
