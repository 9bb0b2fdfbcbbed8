"""A server in a control group whose memory a neighbour takes."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.completing import Streamed, checkpoint, deploy
from tests.serving import Server, until

pytestmark = [pytest.mark.slow, pytest.mark.storm]

MIB = 1 << 20
POOL = 512 * MIB
OPTIONS = ("--devices", "cpu:1", "--device-memory", "64MiB", "--dram", str(POOL))
HOG = f"import sys; held = bytearray({256 * MIB}); sys.stdin.read()"


class Group:
    """A control group of this test's own, below the one that it runs in (version 1 or 2)."""

    def __init__(self) -> None:
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
        old = [Path(f"/sys/fs/cgroup/memory{path}") for _, kinds, path in lines if "memory" in kinds.split(",")]
        new = [Path(f"/sys/fs/cgroup{path}") for number, _, path in lines if number == "0"]
        self.path = (old or new)[0] / f"serverless-llm-test-{os.getpid()}"
        self._limit = "memory.limit_in_bytes" if old else "memory.max"
        self._usage = "memory.usage_in_bytes" if old else "memory.current"
        self._events = "memory.oom_control" if old else "memory.events"
        self.path.mkdir()

    def limit(self, size: int) -> None:
        (self.path / self._limit).write_text(str(size))

    @property
    def used(self) -> int:
        return int((self.path / self._usage).read_text())

    @property
    def kills(self) -> int:
        """How many processes the kernel ended for their memory."""
        found = re.search(r"^oom_kill (\d+)$", (self.path / self._events).read_text(), re.MULTILINE)
        assert found
        return int(found[1])


@pytest.fixture
def group() -> Iterator[Group]:
    with contextlib.ExitStack() as stack:
        try:
            made = Group()
            stack.callback(made.path.rmdir)
            made.limit(4 << 30)
        except (OSError, IndexError) as error:
            pytest.skip(f"no control group can be made here: {error}")
        yield made
        until(lambda: not (made.path / "cgroup.procs").read_text(), "an empty group")


@pytest.mark.parametrize("stays", [False, True], ids=["passes", "stays"])
def test_a_memory_limit_that_is_reached_costs_a_restart(tmp_path: Path, group: Group, stays: bool) -> None:
    """Also where the memory does not come back: what is left is enough, and none is taken ahead of need."""
    joined = ("bash", "-c", f'echo $$ > {group.path}/cgroup.procs; exec "$@"', "limited")
    with Server(tmp_path / "state", *OPTIONS, through=joined) as server, contextlib.ExitStack() as stack:
        deploy(server, "small", checkpoint(tmp_path / "small"))
        expected = Streamed(server, "small", max_tokens=1500).begin().rest()
        until(lambda: group.used > POOL, "all of the pool's memory", 60)
        running = Streamed(server, "small", max_tokens=1500).begin()
        group.limit(group.used + 64 * MIB)
        neighbour = subprocess.Popen([*joined, sys.executable, "-c", HOG], stdin=subprocess.PIPE)
        stack.callback(neighbour.communicate)
        until(lambda: group.kills, "the kernel's word")
        if not stays:
            neighbour.kill()
        assert running.rest() == expected
        assert server.head is not None
        assert server.head.poll() is None
        assert Streamed(server, "small", max_tokens=1500).begin().rest() == expected
        assert group.kills < 5  # no circle
