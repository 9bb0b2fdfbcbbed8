"""`serverless-llm serve`: arguments -> configuration -> head."""

from __future__ import annotations

import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from serverless_llm.cli import sources
from serverless_llm.cli.output import as_json, say
from serverless_llm.config import Config, load


@click.command()
@click.option("--config", type=click.Path(path_type=Path), help="The YAML file, instead of the search path.")
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=int, help="0 takes a free one.  [default: 8000]")
@click.option("--tls-cert", type=click.Path(path_type=Path), help="PEM certificate chain; speak TLS only.")
@click.option("--tls-key", type=click.Path(path_type=Path), help="PEM key of the certificate.")
@click.option("--keys-file", type=click.Path(path_type=Path), help="YAML list of keys with scopes and limits.")
@click.option("--state-dir", type=click.Path(path_type=Path), help="Database, locks, tokens and logs.")
@click.option("--nodes", type=int, help="Node agents on this machine.  [default: 1]")
@click.option("--devices", metavar="KIND:N", help="Of each node: cpu:2, cuda:1, or auto.")
@click.option("--device-memory", metavar="SIZE", help="Weights and KV of one device: 2GiB, 20%.")
@click.option("--weights", type=click.Choice(["view", "copy"]), help="On CPU devices: views into DRAM, or an arena.")
@click.option("--dram", metavar="SIZE", help="DRAM tier of one node: 8GiB, 50%.")
@click.option("--limit", "limits", metavar="LINK=RATE", multiple=True, help="Rate cap: disk=20MB/s, upload=1GB/s.")
@click.option("--threads", type=int, help="Compute threads of one CPU device.")
@click.option("--keep-alive", metavar="TIME", help="How long an unused model stays on its device.  [default: 5m]")
@click.option("--hold", metavar="TIME", help="How long an answer that does not stream waits for a start.")
@click.option("--drain", metavar="TIME", help="What running streams get when the server stops.  [default: 30s]")
@click.option("--orphan-grace", metavar="TIME", help="How long agents wait for a new head.  [default: 60s]")
@click.option("--model-root", "model_roots", multiple=True, help="A deploy may read only below this directory.")
@click.option(
    "--model", "models", metavar="[NAME=]SOURCE", multiple=True, help="Deploy at start, a directory or demo-*."
)
@click.option("--die-with", type=int, hidden=True, help="End with this parent process.")
@click.option("-v", "--verbose", is_flag=True, help="Log every decision.")
@as_json
def serve(config: Path | None, die_with: int | None, verbose: bool, as_json: bool, **flags: Any) -> None:
    """Start the server on this machine. The first Ctrl-C or SIGTERM drains and stops it, a second one at once.

    Exits with 0 after `serverless-llm stop`, 130 after Ctrl-C, 143 after SIGTERM, 78 for a bad configuration.
    """
    settings = load(settled(flags), os.environ, config)
    if die_with is not None:
        from serverless_llm.node.processes import die_with as follow

        follow(die_with)
    logging.basicConfig(
        level=logging.INFO if verbose or not sys.stderr.isatty() else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    click.get_current_context().exit(_run(settings, as_json))


def settled(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that were given, models with absolute sources."""
    given = {name: value for name, value in flags.items() if value not in (None, ())}
    if "models" in given:
        given["models"] = sources.named(given["models"])
    return given


def _run(settings: Config, as_json: bool) -> int:
    """Serves until a signal; the exit status."""
    import uvloop

    from serverless_llm.cli.server import Server

    async def main() -> int:
        return await Server(settings).run(partial(announce, as_json=as_json))

    return uvloop.run(main())


def announce(url: str, as_json: bool) -> None:
    say({"url": url, "pid": os.getpid()}, f"serverless-llm serves on {url}", as_json)
