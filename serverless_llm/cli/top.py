"""`serverless-llm top`: models, devices and rates, again and again until Ctrl-C."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from serverless_llm.cli.client import Refusal, Server, Unreachable, find, of_state_dir
from serverless_llm.cli.models import failures, state, until
from serverless_llm.cli.output import as_json, printable, show, table, tell
from serverless_llm.quantities import size

if TYPE_CHECKING:
    from rich.console import RenderableType

RATES = ("tokens_per_s", "requests_per_s", "errors_per_s", "first_token_p50_ms", "first_token_p95_ms")
NODE = ("node", "state", "dram", "dram_used", "bandwidth")
MODELS = ("MODEL", "SIZE", "STATE", "TIER", "DEVICE", "RUNNING", "WAITING", "UNTIL")
DEVICES = ("DEVICE", "KIND", "WEIGHTS", "KV", "FREE", "SEQUENCES", "MODELS")
Rows = list[tuple[str, ...]]
Table = tuple[tuple[str, ...], Rows]


@click.command()
@click.option("--once", is_flag=True, help="Print once and end; so it is where standard output is no terminal.")
@click.option("--interval", type=click.FloatRange(min=0.1), default=1.0, help="Seconds.  [default: 1]")
@of_state_dir
@as_json
def top(once: bool, interval: float, state_dir: Path | None, as_json: bool) -> None:
    """Watch models, devices and rates; Ctrl-C ends it."""
    server = find(state_dir)
    if as_json:
        click.echo(json.dumps(look(server)))
    elif once or not sys.stdout.isatty():
        _print(look(server))
    else:
        _watch(server, interval)


def look(server: Server) -> dict[str, Any]:
    """What there is now: models, devices, problems, and the rates of the last complete step of the traffic."""
    status = server.call("GET", "/admin/status")
    traffic = status.get("traffic") or {}
    return {
        "rates": {name: (traffic.get(name) or [None])[-1] for name in RATES},
        "models": status["models"],
        "devices": [device for node in status["nodes"] for device in node["devices"]],
        "nodes": [{name: node[name] for name in NODE} for node in status["nodes"]],
        "problems": status["problems"],
    }


def headline(seen: dict[str, Any]) -> str:
    """`12.0 tokens/s, 1.5 requests/s, first token 31 ms (p95 44 ms), DRAM 3.1 of 10.8 GB`."""
    rates = seen["rates"]
    parts = [f"{rates[name] or 0:.1f} {name.removesuffix('_per_s')}/s" for name in RATES[:3]]
    if rates["first_token_p50_ms"] is not None:
        parts.append(f"first token {rates['first_token_p50_ms']:.0f} ms (p95 {rates['first_token_p95_ms']:.0f} ms)")
    used, there = (sum(node[name] for node in seen["nodes"]) for name in ("dram_used", "dram"))
    return ", ".join([*parts, f"DRAM {size(used)} of {size(there)}"])


def tables(seen: dict[str, Any]) -> tuple[Table, Table]:
    """Models and devices as rows of texts."""
    models: Rows = [
        (row["name"], size(row["bytes"]), state(row), row["tier"], ",".join(row["devices"]),
         str(row["running"]), str(row["waiting"]), until(row) if row["devices"] else "")
        for row in seen["models"]
    ]  # fmt: skip
    devices: Rows = [
        (row["device"], row["kind"], size(row["memory"]["weights"]), size(row["memory"]["kv"]),
         size(row["memory"]["free"]), str(len(row["sequences"])),
         ", ".join(replica["model"] for replica in row["replicas"]) or row["problem"])
        for row in seen["devices"]
    ]  # fmt: skip
    return (MODELS, models), (DEVICES, devices)


def _problems(seen: dict[str, Any]) -> list[str]:
    return [*seen["problems"], *failures(seen["models"])]


def _print(seen: dict[str, Any]) -> None:
    click.echo(headline(seen))
    for header, rows in tables(seen):
        click.echo()
        show(header, rows)
    for problem in _problems(seen):
        tell(problem)


def _watch(server: Server, interval: float) -> None:
    """Until Ctrl-C. A server that goes away, or is overloaded, is waited for: agents, too, wait for the next one."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(), screen=True, auto_refresh=False) as live:
        while True:
            try:
                live.update(_screen(look(server), live.console.width), refresh=True)
            except (Unreachable, Refusal) as error:
                if isinstance(error, Refusal) and error.status < 500:
                    raise
                live.update(Text(error.message), refresh=True)
            time.sleep(interval)


def _screen(seen: dict[str, Any], width: int) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    parts = [Text(headline(seen), style="bold"), *map(Text, map(printable, _problems(seen)))]
    for header, rows in tables(seen):
        names, *lines = table(header, rows, width)
        parts += [Text(), Text(names, style="dim", no_wrap=True), *(Text(line, no_wrap=True) for line in lines)]
    return Group(*parts)
