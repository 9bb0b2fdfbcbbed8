"""`serverless-llm serve`: arguments -> configuration -> head."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import stat
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from serverless_llm.cli import sources
from serverless_llm.cli.options import COUNT, DEVICES, LIMIT, LIMITED, PORT, SHARE, TIME, pairs
from serverless_llm.cli.output import as_json, say
from serverless_llm.surroundings import LOOPBACK

if TYPE_CHECKING:
    from serverless_llm.config import Config

OWN = re.compile(r"(agents|logs|lock|agent-token|api-key|head\.json|serve\.log|state\.db.*)(\.tmp)?$")


@click.command()
@click.option("--config", type=click.Path(path_type=Path), help="The YAML file, instead of the search path.")
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=PORT, help="0 takes a free one.  [default: 8000]")
@click.option("--tls-cert", type=click.Path(path_type=Path), help="PEM certificate chain; speak TLS only.")
@click.option("--tls-key", type=click.Path(path_type=Path), help="PEM key of the certificate.")
@click.option("--keys-file", type=click.Path(path_type=Path), help="YAML list of keys with scopes and limits.")
@click.option("--state-dir", type=click.Path(path_type=Path, readable=False), help="Database, locks, tokens and logs.")
@click.option("--nodes", type=COUNT, help="Node agents on this machine.  [default: 1]")
@click.option("--devices", type=DEVICES, help="Of each node: cpu:2, cuda:1, or auto.")
@click.option("--device-memory", type=SHARE, help="Weights and KV of one device: 2GiB, 20%.")
@click.option("--weights", type=click.Choice(["view", "copy"]), help="On CPU devices: views into DRAM, or an arena.")
@click.option("--dram", type=SHARE, help="DRAM tier of one node: 8GiB, 50%.")
@click.option("--limit", "limits", type=LIMIT, multiple=True, help="Rate cap: remote=50MB/s, disk=1GB/s, upload=5GB/s.")
@click.option("--threads", type=COUNT, help="Compute threads of one CPU device.")
@click.option(
    "--keep-alive", type=TIME, help="How long an unused model stays on its device, -1: for ever.  [default: 5m]"
)
@click.option("--hold", type=TIME, help="How long an answer that does not stream waits for a start.")
@click.option("--drain", type=LIMITED, help="What running streams get when the server stops.  [default: 30s]")
@click.option("--orphan-grace", type=TIME, help="How long agents wait for a new head.  [default: 60s]")
@click.option("--model-root", "model_roots", multiple=True, help="A deploy may read only below this directory.")
@click.option(
    "--model",
    "models",
    metavar="[NAME=]SOURCE",
    multiple=True,
    help="Deploy at start: a directory, hub id, URL or demo-*.",
)
@click.option("--print-schema", is_flag=True, help="Print the configuration file's JSON Schema, and end.")
@click.option("--die-with", type=int, hidden=True, help="End with this parent process.")
@click.option("-v", "--verbose", is_flag=True, help="Log every decision.")
@as_json
def serve(
    config: Path | None, die_with: int | None, verbose: bool, print_schema: bool, as_json: bool, **flags: Any
) -> None:
    """Start the server on this machine. The first Ctrl-C or SIGTERM drains and stops it, a second one at once.

    Exits with 0 after `serverless-llm stop`, 130 after Ctrl-C, 143 after SIGTERM, 78 for a bad configuration.
    """
    if print_schema:
        from serverless_llm.cli.schema import schema

        click.echo(json.dumps(schema(), indent=2))
        return
    from serverless_llm.cli.log import logged
    from serverless_llm.config import count_gpus, load_with_places

    settings, where = load_with_places(settled(flags), os.environ, config)
    settings = sourced(settings, where["models"])
    demand_gpus(settings, count_gpus(os.environ), where["devices"])
    folder = made(settings.state_dir, where["state_dir"])
    with following(die_with, settings.state_dir), logged(folder, verbose):
        look_at_roots(settings.model_roots, where["model_roots"])
        status = _run(settings, where, as_json)
    click.get_current_context().exit(status)


def settled(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that were given, models with absolute sources."""
    given = {name: value for name, value in flags.items() if value not in (None, ())}
    if "limits" in given:
        given["limits"] = pairs(given["limits"], "'--limit'")
    if "models" in given:
        given["models"] = sources.named(given["models"])
        for name in given["models"]:
            sources.check_name(name, "'--model'")
    return given


@contextlib.contextmanager
def following(parent: int | None, folder: Path) -> Iterator[None]:
    """Ends as by SIGTERM when `parent`, if any, does, and then removes the state directory, as that would have."""
    if parent is None:
        yield
        return
    import shutil

    from serverless_llm.node.processes import die_with

    try:
        die_with(parent, signal.SIGTERM)
        yield
    finally:
        if os.getppid() != parent:
            shutil.rmtree(folder, ignore_errors=True)


def sourced(settings: Config, where: str = "models") -> Config:
    """With a directory as the source of every model; what is meant as one is left to the server to judge.

    Args:
        where: the models were given, for messages.
    """
    from msgspec.structs import replace

    from serverless_llm.loader.remote import is_url

    models = {}
    for name, entry in settings.models.items():
        known = entry.source in sources.demos() or sources.HUB_ID.fullmatch(entry.source) or is_url(entry.source)
        models[name] = replace(entry, source=_resolved(entry.source, f"{where}: {name}")) if known else entry
    return replace(settings, models=models)


def _resolved(source: str, where: str) -> str:
    from serverless_llm.errors import CheckpointError, ConfigurationError

    try:
        return sources.resolve(source, served=True)
    except click.UsageError as error:
        raise ConfigurationError(f"{where}: {error.message}") from error
    except (CheckpointError, ConfigurationError) as error:
        raise type(error)(f"{where}: {error}") from error


def demand_gpus(settings: Config, there: int, where: str) -> None:
    """Raises ConfigurationError where more GPUs are wanted than there are."""
    from serverless_llm.config import parse_devices
    from serverless_llm.errors import ConfigurationError

    kind, count = parse_devices(settings.devices)
    if kind == "cuda" and count > there:
        raise ConfigurationError(f"{where}: {settings.devices} on a machine where {there} NVIDIA GPU(s) can be seen")


def look_at_roots(roots: tuple[Path, ...], where: str) -> None:
    """Warns of what is not there: it may be a mount that comes later, or misspelt."""
    import logging

    log = logging.getLogger(__name__)
    for root in roots:
        if not root.is_dir():
            log.warning("%s: there is no directory %s by now: nothing can be deployed from there", where, root)


def made(state_dir: Path, where: str = "state_dir") -> Path:
    """The folder of the logs, in a state directory that nobody else may read.

    Raises:
        ConfigurationError: it cannot be made, takes no log, or is a model's.
    """
    from serverless_llm.errors import ConfigurationError
    from serverless_llm.node.state import is_model

    if is_model(state_dir):
        raise ConfigurationError(f"{where}: {state_dir} holds a model, not a server's state: choose another one")
    folder = state_dir / "logs"
    try:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        shut(state_dir)
        folder.mkdir(exist_ok=True, mode=0o700)
        (folder / "head.log").open("ab").close()
    except OSError as error:
        raise ConfigurationError(f"{where}: {error.filename or state_dir}: {error.strerror}") from error
    return folder


def shut(state_dir: Path) -> None:
    """Closes to others what may have been made open to them: a directory of this user's, for a server's state alone."""
    found = state_dir.stat()
    shared = found.st_mode & stat.S_ISVTX or found.st_uid != os.geteuid()
    if shared or not found.st_mode & 0o077:
        return
    if all(OWN.match(path.name) for path in state_dir.iterdir()):
        state_dir.chmod(0o700)


def _run(settings: Config, where: Mapping[str, str], as_json: bool) -> int:
    """Serves until a signal; the exit status."""
    import uvloop

    from serverless_llm.cli.server import Server

    made_key = not (settings.host in LOOPBACK or settings.api_key or settings.keys_file)
    key = settings.state_dir / "api-key" if made_key else None

    async def main() -> int:
        return await Server(settings, where).run(partial(announce, host=settings.host, key=key, as_json=as_json))

    return uvloop.run(main())


def announce(url: str, host: str, key: Path | None, as_json: bool) -> None:
    """`host`: what was asked for; `key`: the file of the key that was made because none was given."""
    everywhere = f"\nit listens on every address of this machine ({host})" if host in {"0.0.0.0", "::"} else ""
    hint = f"\nclients need the key in {key}" if key else ""
    say(
        {"url": url, "pid": os.getpid()},
        f"serverless-llm serves on {url}{hint}{everywhere}\ndashboard: {url}/",
        as_json,
    )
