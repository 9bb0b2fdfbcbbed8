"""The verbs about deployed models: `deploy`, `rm`, `ls`, `ps`."""

from __future__ import annotations

import json
import os
import time
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from serverless_llm.cli import completion
from serverless_llm.cli.client import Refusal, Server, find, model_path, of_state_dir
from serverless_llm.cli.options import ANY_COUNT, COUNT, SOURCE, TIME
from serverless_llm.cli.output import as_json, duration, say, show, tell
from serverless_llm.cli.sources import check_name, name_of, resolve, same
from serverless_llm.quantities import size


def spec_of(source: str, server: Server, **options: Any) -> dict[str, Any]:
    """The body of a deploy: the source and every option that was given."""
    given = {name: value for name, value in options.items() if value is not None}
    return {"source": resolve(source, True, server) if server.local else elsewhere(source), **given}


def elsewhere(source: str) -> str:
    """A source on another machine, of which only a directory's absolute path has a meaning there."""
    if not Path(source).is_absolute():
        raise click.UsageError(
            f"the server is on another machine: name a directory there by its absolute path, not {source!r} "
            "(serverless-llm pull, run there, prints one)"
        )
    return source


@click.command()
@click.argument("name", shell_complete=completion.models_and_sources)
@click.argument("source", type=SOURCE, required=False, shell_complete=completion.sources)
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), help="Served precision.")
@click.option("--keep-alive", type=TIME, help="How long it stays on its device unused: 5m, 0, or -1 for ever.")
@click.option("--min-replicas", type=ANY_COUNT, help="Replicas that stay loaded.")
@click.option("--max-replicas", type=COUNT, help="Most replicas at a time.")
@click.option("--max-concurrency", type=COUNT, help="Sequences in one replica at a time.")
@click.option("--max-queue", type=ANY_COUNT, help="Requests that may wait for a place; a further one is refused.")
@click.option("--context", type=COUNT, help="Most tokens of a request, prompt and answer together.")
@click.option("--pinned", is_flag=True, default=None, help="Never evict it.")
@click.option(
    "--verify",
    type=click.Choice(["off", "sample", "full"]),
    help="Compare its bytes with those of the first load: at each start one block in 64, or all.",
)
@of_state_dir
@as_json
def deploy(name: str, source: str | None, state_dir: Path | None, as_json: bool, **options: Any) -> None:
    """Give the checkpoint SOURCE (a directory, a hub's owner/name, a URL, or demo-count, demo-add ...) an endpoint.

    Nothing is loaded until a first request comes. Without SOURCE, NAME itself names the checkpoint. A NAME that is
    deployed already is replaced: what is not given is at its default again, not as it was.
    """
    if source is not None:
        check_name(name, "'NAME'")
    if options["max_replicas"] is not None and (options["min_replicas"] or 0) > options["max_replicas"]:
        raise click.UsageError("--min-replicas is more than --max-replicas")
    server = find(state_dir)
    spec = spec_of(source or name, server, **options)
    given, name = source is not None, name if source else name_of(name)
    former = former_of(server, name)
    if former is not None and not given and not same(former["source"], spec["source"]):
        raise click.ClickException(
            f"{name!r} is deployed from {origin(former)}: name what is to be replaced "
            f"(serverless-llm deploy {name} SOURCE), or give this one a name of its own"
        )
    answer = server.call("PUT", model_path(name), spec)
    if former is not None:
        was = "" if former["source"] == spec["source"] else f" from {origin(former)}"
        click.echo(f"{name} was deployed already{was} and is replaced; what was not given is at its default", err=True)
    if not answer.get("chat", True):
        click.echo(f"{name} has no chat template: chats are refused; /v1/completions and run --raw work", err=True)
    if answer.get("error"):
        click.echo(f"{name} cannot be served as things are: {answer['error']}", err=True)
    _tell_of_restarts(name, answer)
    say(answer, f"{name}: {server.public or server.url}/models/{urllib.parse.quote(name)}/v1", as_json)


def former_of(server: Server, name: str) -> dict[str, Any] | None:
    """A model as the server shows it before a deploy; None of one that is not deployed."""
    try:
        row: dict[str, Any] = server.call("GET", model_path(name))
    except Refusal as refusal:
        if refusal.status != 404:
            raise
        return None
    return row


def made_of(rows: list[dict[str, Any]], directory: str, url: str) -> list[dict[str, Any]]:
    """The models of a directory; where there are none, those of the URL that it was brought from, if it was."""
    exact = [row for row in rows if os.path.realpath(row["source"]) == os.path.realpath(directory)]
    return exact or [row for row in rows if url and row["url"] == url]


def origin(row: dict[str, Any]) -> str:
    """Where a model comes from: its URL, else its directory."""
    return str(row["url"] or row["source"])


@click.command()
@click.argument("name", shell_complete=completion.models)
@of_state_dir
@as_json
def rm(name: str, state_dir: Path | None, as_json: bool) -> None:
    """Take the model NAME away; its files stay."""
    check_name(name, "'NAME'")
    answer = find(state_dir).call("DELETE", model_path(name))
    _tell_of_restarts(name, answer)
    say({"id": name, "deleted": True}, f"{name}: no longer deployed", as_json)


def _tell_of_restarts(name: str, answer: dict[str, Any]) -> None:
    if answer.get("configured"):
        click.echo(f"{name} is in the server's configuration: a restart with that deploys it as it is there", err=True)


@click.command()
@of_state_dir
@as_json
def ls(state_dir: Path | None, as_json: bool) -> None:
    """List every deployed model, loaded or not."""
    models = deployed(find(state_dir))
    if as_json:
        click.echo(json.dumps(models))
        return
    show(
        ("NAME", "SIZE", "STATE", "TIER", "SOURCE"),
        [(row["name"], size(row["bytes"]), state(row), row["tier"], origin(row)) for row in models],
    )
    for failure in failures(models):
        tell(failure)


@click.command()
@of_state_dir
@as_json
def ps(state_dir: Path | None, as_json: bool) -> None:
    """List the models that are on a device, or on their way there; and which devices are not up, and why.

    One that was removed or unloaded keeps its memory until its last request has ended, and is `leaving`.
    """
    status = find(state_dir).call("GET", "/admin/status")
    for problem in status["problems"]:
        tell(problem)
    models = [row for row in status["models"] if row["state"] in {"loading", "loaded"}]
    models += leaving(status, {(row["name"], device) for row in models for device in row["devices"]})
    if as_json:
        click.echo(json.dumps(models))
        return
    show(
        ("NAME", "SIZE", "STATE", "TIER", "DEVICE", "UNTIL"),
        [
            (row["name"], size(row["bytes"]), state(row), row["tier"], ",".join(row["devices"]), until(row))
            for row in models
        ],
    )


def leaving(status: dict[str, Any], shown: set[tuple[str, str]]) -> list[dict[str, Any]]:
    """Rows of the models that hold memory of a device beside those that are `shown`, as (name, device)."""
    return [
        {
            "name": replica["model"],
            "bytes": replica["weight_bytes"],
            "state": "leaving",
            "tier": "device",
            "devices": [device["device"]],
            "running": replica["running"],
        }
        for node in status["nodes"]
        for device in node["devices"]
        for replica in device["replicas"]
        if (replica["model"], device["device"]) not in shown and replica["state"] != "claiming"
    ]


def deployed(server: Server) -> list[dict[str, Any]]:
    """Every deployed model as the admin API shows it."""
    models: list[dict[str, Any]] = server.call("GET", "/admin/status")["models"]
    return models


def state(row: dict[str, Any]) -> str:
    if row["state"] == "loading":
        return f"loading {row['progress']:.0%}"
    return str(row["state"])


def failures(models: Sequence[dict[str, Any]]) -> list[str]:
    """Why each of the failed ones did: too long for a column, which would take the others' room."""
    return [f"{row['name']} failed: {row['error']}" for row in models if row["state"] == "failed"]


def until(row: dict[str, Any], now: float | None = None) -> str:
    """When a replica leaves its device if nobody uses it; `kept` is one of `min_replicas`."""
    if row["state"] == "leaving":
        return "in use" if row["running"] else "now"
    if row["until"] is None:
        if row["pinned"] or row["keep_alive"] is None:
            return "forever"
        return "in use" if row["running"] or row["waiting"] or row["state"] != "loaded" else "kept"
    seconds = row["until"] - (time.time() if now is None else now)
    if seconds < 1:
        return "now"
    return duration(round(seconds) if seconds < 120 else 60 * round(seconds / 60))
