"""Child processes: how they find this package, and how they die with their parent."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
from pathlib import Path

import serverless_llm

# An agent copies checkpoints past the caches, which would read each line before it is overwritten. glibc does so by
# itself for copies of three quarters of the shared cache, of which hypervisors tell hundreds of megabytes.
STREAMING = {"GLIBC_TUNABLES": "glibc.cpu.x86_non_temporal_threshold=0x100000"}
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15


def command(module: str, *arguments: str) -> list[str]:
    """The command line that runs `module` of this package with this interpreter."""
    return [sys.executable, "-m", module, *arguments]


def environment() -> dict[str, str]:
    """This process's environment, in which a child finds this very package, installed or a checkout."""
    root = str(Path(serverless_llm.__file__).parents[1])
    known = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if not root.endswith("-packages") and root not in known:
        known.insert(0, root)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(known), "PYTHONSAFEPATH": "1"}


def die_with(parent: int, number: int = signal.SIGKILL) -> None:
    """Has this process get a signal when the thread that started it ends; at once where `parent` is gone already.

    A fork clears the setting, so each generation calls it anew.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        signal.raise_signal(number)


def retitle(text: str) -> None:
    """Has `ps` and `top` show `text`, or as much of it as fits over this process's arguments."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # where the arguments lie in memory; 0: the system does not say
    if start:
        ctypes.memmove(start, text.encode()[: end - start - 1].ljust(end - start, b"\0"), end - start)
    ctypes.CDLL(None).prctl(_PR_SET_NAME, text.encode()[:15])


def died(status: int) -> str:
    """A wait status in words."""
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"exited with {os.waitstatus_to_exitcode(status)}"


async def exit_of(pid: int) -> None:
    """Returns when the process is gone; it need not be a child, and is not reaped."""
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:  # gone, or 0: a lock whose new holder has not written its pid yet
        return
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()
    loop.add_reader(descriptor, gone.set)
    try:
        await gone.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
