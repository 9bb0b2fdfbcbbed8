"""`serverless-llm stop`."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import click

from serverless_llm.cli.client import nobody, of_state_dir, read_head
from serverless_llm.cli.output import as_json, say
from serverless_llm.surroundings import state_dir as own_state_dir

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
    folder = state_dir or own_state_dir(os.environ)
    head = read_head(folder)
    if head is None:
        raise nobody(folder)
    os.kill(head["pid"], STOP)
    if now:
        time.sleep(POLL)  # two signals at the same moment count as one
        os.kill(head["pid"], STOP)
    deadline = time.monotonic() + timeout
    while read_head(folder) is not None:
        if time.monotonic() > deadline:
            raise click.ClickException(f"the server (pid {head['pid']}) still runs after {timeout:.0f} s")
        time.sleep(POLL)
    say({"pid": head["pid"], "stopped": True}, "", as_json)
