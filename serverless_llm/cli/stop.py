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
TELL_AFTER = 2.0  # seconds of waiting in silence
POLL = 0.05  # seconds; a process that is not a child can only be asked


@click.command()
@click.option("--now", is_flag=True, help="Do not wait for running streams.")
@click.option(
    "--timeout", type=click.FloatRange(min=0), default=60.0, help="Seconds to wait for its end.  [default: 60]"
)
@of_state_dir
@as_json
def stop(now: bool, timeout: float, state_dir: Path | None, as_json: bool) -> None:
    """Stop this user's server: running streams get their drain time, then every process ends.

    Where it is stopping already, this waits with whoever told it to.
    """
    folder = local_state_dir(state_dir)
    head = read_head(folder)
    if head is None:
        raise nobody(folder, advice="")
    _tell(head["pid"], STOP)
    if now:
        time.sleep(POLL)  # signals of the same moment may come in any order
        _tell(head["pid"], signal.SIGTERM)
    began, told = time.monotonic(), False
    while lives(head):
        waited = time.monotonic() - began
        if waited > TELL_AFTER and not told and not now:
            click.echo("requests still run; serverless-llm stop --now ends them at once", err=True)
            told = True
        if waited > timeout:
            hint = "" if now else ", for requests that still run; serverless-llm stop --now ends it at once"
            raise click.ClickException(f"the server (pid {head['pid']}) still runs after {timeout:g} s{hint}")
        time.sleep(POLL)
    say({"pid": head["pid"], "stopped": True}, f"stopped the server (pid {head['pid']})", as_json)


def _tell(pid: int, number: signal.Signals) -> None:
    """One that has ended since needs no word."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
