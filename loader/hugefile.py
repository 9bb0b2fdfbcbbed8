"""Shared memory of huge pages where memfds get none: a file on a tmpfs of its own, which nobody sees.

`shmem_enabled`, which is `never` on most systems, rules memfds; a tmpfs mounted with `huge=always` rules itself. A
process of a moment mounts it in a mount namespace of its own (of a user namespace, where it is not root's) and hands
over the open file, with which it lives and goes. Nothing of the system is changed. This file is that process's script,
too: it knows the standard library alone.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
from contextlib import suppress

PATIENCE = 5.0  # seconds for that process, which takes about 0.02
_NEW_NAMESPACE, _NEW_USER = 0x00020000, 0x10000000  # unshare(2)
_PRIVATE, _RECURSIVE = 1 << 18, 1 << 14  # mount(2)
_ANYWHERE = "/proc"  # a directory that is there: only this process sees what covers it


def open_file(nbytes: int) -> int | None:
    """A descriptor of an empty file that may grow to `nbytes`; None where the system does not permit it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-I", "-S", __file__, str(theirs.fileno()), str(nbytes)]
        with suppress(OSError, subprocess.SubprocessError):
            subprocess.run(command, pass_fds=[theirs.fileno()], stderr=subprocess.DEVNULL, timeout=PATIENCE, check=True)
            _, (descriptor,), _, _ = socket.recv_fds(ours, 1, 1)
            os.set_inheritable(descriptor, False)
            return int(descriptor)
    return None


def _serve(link: int, nbytes: int) -> None:
    """Raises:
    OSError: the system does not permit it.
    """
    _leave_namespaces()
    _mount("none", "/", None, _PRIVATE | _RECURSIVE, None)  # what is mounted here is seen nowhere else
    _mount("weights", _ANYWHERE, "tmpfs", 0, f"huge=always,size={nbytes}")
    descriptor = os.open(_ANYWHERE, os.O_TMPFILE | os.O_RDWR, 0o600)
    socket.send_fds(socket.socket(fileno=link), [b"\0"], [descriptor])


def _leave_namespaces() -> None:
    user, group = os.getuid(), os.getgid()
    with suppress(OSError):
        _call("unshare", _NEW_NAMESPACE)
        return
    _call("unshare", _NEW_NAMESPACE | _NEW_USER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:  # noqa: PTH123  # pathlib costs this process a third of its time
            file.write(text)


def _mount(source: str, target: str, kind: str | None, flags: int, options: str | None) -> None:
    texts = [text.encode() if text is not None else None for text in (source, target, kind, options)]
    _call("mount", *texts[:3], ctypes.c_ulong(flags), texts[3])


def _call(name: str, *arguments: object) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        raise OSError(ctypes.get_errno(), name)


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
