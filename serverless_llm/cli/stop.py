"""`serverless-llm stop`."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import click

from serverless_llm.cli.client import lives, local_state_dir, nobody, of_state_dir, read_head
from serverless_llm.cli.output import as_json, say

STOP = signal.SIGUSR1  # ends a server as SIGTERM does, but with status 0: it was told to by its operator
POLL = 0.05  # seconds; a process that is not a child can only be asked


@click.command()
@click.option("--now", is_flag=True, help="Do not wait for running streams.")
@click.option(
    "--timeout", type=click.FloatRange(min=0), default=60.0, help="Seconds to wait for its end.  [default: 60]"
)
@of_state_dir
@as_json
def stop(now: bool, timeout: float, state_dir: Path | None, as_json: bool) -> None:
    """Stop this user's server: running streams get their drain time, then every process ends."""
    folder = local_state_dir(state_dir)
    head = read_head(folder)
    if head is None:
        raise nobody(folder)
    _tell(head["pid"])
    if now:
        time.sleep(POLL)  # two signals at the same moment count as one
        _tell(head["pid"])
    deadline = time.monotonic() + timeout
    while lives(head):
        if time.monotonic() > deadline:
            raise click.ClickException(f"the server (pid {head['pid']}) still runs after {timeout:.0f} s")
        time.sleep(POLL)
    say({"pid": head["pid"], "stopped": True}, f"stopped the server (pid {head['pid']})", as_json)


def _tell(pid: int) -> None:
    """One that has ended since needs no word."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, STOP)
