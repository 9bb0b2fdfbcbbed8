"""`serverless-llm show`: one model, deployed or not: its checkpoint, what it needs, and how it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import click

from serverless_llm.cli import completion
from serverless_llm.cli.client import Refusal, Server, Unreachable, find, model_path, of_state_dir
from serverless_llm.cli.models import deployed, made_of, state, until
from serverless_llm.cli.output import as_json, duration, printable, seconds
from serverless_llm.cli.sources import is_source, resolve, url_of
from serverless_llm.quantities import size


@click.command()
@click.argument("model", shell_complete=completion.models_and_sources)
@of_state_dir
@as_json
def show(model: str, state_dir: Path | None, as_json: bool) -> None:
    """Tell of MODEL: a deployed name, or, whether a server runs or not, a directory, a hub id, a URL
    or a demo checkpoint."""
    from serverless_llm.errors import CheckpointError, RequestError
    from serverless_llm.loader import disk_tier

    row, start, known, own, here = _deployed(model, state_dir)
    value: dict[str, Any] = {"model": model, "deployed": row, "estimate": start, "digests": known, "own_bytes": own}
    source = row["source"] if row else resolve(model, served=True)
    try:
        value["checkpoint"] = checkpoint(source, row["dtype"] if row else "auto") if here else _elsewhere(source)
    except (CheckpointError, RequestError, OSError) as error:
        if row is None:
            raise
        value["checkpoint"] = {"source": source, "error": str(error)}
    value["checkpoint"]["url"] = row["url"] if row else disk_tier.url_of(Path(source))
    if as_json:
        click.echo(json.dumps(value))
        return
    _print(value)


def _elsewhere(source: str) -> dict[str, Any]:
    return {"source": source, "error": "on the server's machine, whose files cannot be read here"}


class Deployed(NamedTuple):
    """What a server knows of a model; nothing of one that is only a source.

    Attributes:
        row: the model as the server shows it.
        start: the estimate of its start.
        digests: the nodes that know those of its checkpoint.
        own: the bytes that no other checkpoint has, by the nodes that know them.
        here: its files are on this machine.
    """

    row: dict[str, Any] | None
    start: dict[str, float] | None
    digests: list[str]
    own: dict[str, int]
    here: bool


def _deployed(model: str, state_dir: Path | None) -> Deployed:
    try:
        server = find(state_dir)
        row = _row(server, model)
    except Unreachable:
        if not is_source(model):
            raise
        row = None
    if row is None:
        return Deployed(None, None, [], {}, True)
    nodes = server.call("GET", "/admin/status")["nodes"]
    start = None if row["state"] == "failed" else _estimate(nodes, row)
    checkpoint = row["checkpoint"]
    known = [one["node"] for one in nodes if checkpoint in one["digests"]]
    own = {one["node"]: one["own_bytes"][checkpoint] for one in nodes if checkpoint in one["own_bytes"]}
    return Deployed(row, start, known, own, server.local)


def _row(server: Server, model: str) -> dict[str, Any] | None:
    """The model as the server shows it, by its name or its source; None of a source that is not deployed."""
    try:
        row: dict[str, Any] = server.call("GET", model_path(model))
    except Refusal as error:
        if not is_source(model) or error.status != 404:
            raise
        source = resolve(model, served=True) if server.local else model
        return next(iter(made_of(deployed(server), source, url_of(model))), None)
    return row


def _estimate(nodes: list[dict[str, Any]], row: dict[str, Any]) -> dict[str, float] | None:
    """Seconds of a start on the best node, by the bandwidths that it learned; None where there is no node."""
    from serverless_llm.cluster.policy import Policy
    from serverless_llm.placement.estimate import Links, Start, startup_s

    policy, times = Policy(), []
    for node in nodes:
        held = {one["checkpoint"]: one["bytes"] for one in node["resident"]}
        lent = node["lent_bytes"].get(row["checkpoint"], 0) if row["verify"] == "off" else 0
        missing = max(0, row["bytes"] - held.get(row["checkpoint"], 0) - lent)
        known = node["bandwidth"]
        remote = min(missing, row["remote_bytes"])
        links = Links(
            known.get("remote", policy.remote_bps),
            known.get("disk", policy.disk_bps),
            known.get("upload", policy.upload_bps),
            node["overhead_s"],
        )
        for device in node["devices"]:
            upload = 0 if device["weights"] == "view" else row["bytes"]
            start = Start(0, missing - remote, upload, 0, remote)
            times.append((startup_s(start, links), startup_s(Start(0, 0, upload), links)))
    return {"start_s": min(times)[0], "from_dram_s": min(times)[1]} if times else None


def checkpoint(source: str, dtype: str) -> dict[str, Any]:
    """What the files say.

    Raises:
        CheckpointError: they cannot be served; names the source.
    """
    from serverless_llm.domain import BLOCK_TOKENS, ModelSpec
    from serverless_llm.engine.config import ModelConfig
    from serverless_llm.errors import CheckpointError
    from serverless_llm.loader import disk_tier, manifest
    from serverless_llm.node.admin import footprint, with_source

    spec = ModelSpec("show", source, dtype, url=disk_tier.url_of(Path(source)))
    try:
        needs = footprint(spec)
    except CheckpointError as error:
        raise type(error)(with_source(error, spec)) from error
    found = manifest.build(Path(source))
    dtypes = sorted({entry.dtype for _, entry in found.tensors().values()})
    config = found.config
    return {
        "source": source,
        "id": needs.checkpoint,
        "architecture": (config.get("architectures") or ["?"])[0],
        "layers": config.get("num_hidden_layers"),
        "hidden": config.get("hidden_size"),
        "vocabulary": config.get("vocab_size"),
        "dtypes": dtypes,
        "served": ModelConfig.parse(config, dtype).dtype,
        "files": len(found.files),
        "tensors": len(found.tensors()),
        "file_bytes": needs.file_bytes,
        "weight_bytes": needs.weight_bytes,
        "kv_token_bytes": needs.kv_block_bytes / BLOCK_TOKENS,
        "context": needs.context,
    }


def _print(value: dict[str, Any]) -> None:
    rows = [("status", "not deployed")]
    if value["deployed"]:
        dtype = _dtype(value["deployed"]["dtype"], value["checkpoint"].get("served"))
        rows = _of_deployed(value["deployed"], dtype, value["estimate"], value["digests"])
    if value["own_bytes"]:
        rows.append(("own bytes", ", ".join(f"{size(own)} on {node}" for node, own in value["own_bytes"].items())))
    rows += _of_checkpoint(value["checkpoint"], dict(rows)["status"])
    width = max(len(name) for name, _ in rows)
    click.echo(value["model"])
    for name, text in rows:
        click.echo(f"  {name:{width}}  {printable(text)}")


def _dtype(asked: str, served: str | None) -> str:
    """`served`: what `auto` comes to, None of files that cannot be read."""
    return f"{asked} ({served})" if asked == "auto" and served else asked


def _of_deployed(
    row: dict[str, Any], dtype: str, start: dict[str, float] | None, digests: list[str]
) -> list[tuple[str, str]]:
    status = f"failed: {row['error']}" if row["state"] == "failed" else state(row)
    rows = [("name", row["name"]), ("status", status), ("tier", row["tier"]), ("dtype", dtype)]
    if row["remote_bytes"]:
        rows.append(("on the server only", size(row["remote_bytes"])))
    if row["devices"]:
        rows += [("device", ", ".join(row["devices"])), ("until", until(row))]
    if start:
        rows.append(("next start", f"about {seconds(start['start_s'])}; {seconds(start['from_dram_s'])} from DRAM"))
    kept = "forever" if row["pinned"] or row["keep_alive"] is None else duration(row["keep_alive"])
    rows.append(("keep alive", kept + (", pinned" if row["pinned"] else "")))
    rows.append(("replicas", f"at least {row['min_replicas']}, at most {row['max_replicas']}"))
    rows.append(("limits", f"{row['max_concurrency']} requests at a time in each replica, {row['max_queue']} waiting"))
    if row["verify"] != "off":
        known = f"digests known on {', '.join(digests)}" if digests else "the next start learns the digests"
        rows.append(("verify", f"{row['verify']}; {known}"))
    if row["context"]:  # of files that cannot be read it is not known
        rows.append(("context", f"{row['context']} tokens"))
    return [*rows, ("requests", f"{row['running']} running, {row['waiting']} waiting")]


def _of_checkpoint(found: dict[str, Any], told: str) -> list[tuple[str, str]]:
    """`told`: the status, which says why a model failed."""
    url, directory = found["url"], found["source"]
    where = [("source", url), ("directory", directory)] if url else [("source", directory)]
    if "error" in found:
        return where if found["error"] in told else [*where, ("checkpoint", found["error"])]
    stored = ", ".join(found["dtypes"])
    shape = f"{found['layers']} layers of {found['hidden']}, vocabulary of {found['vocabulary']}"
    return [
        *where,
        ("architecture", f"{found['architecture']}: {shape}"),
        ("files", f"{found['files']}, {found['tensors']} tensors, {stored} in the file, {found['served']} when served"),
        ("size", f"{size(found['file_bytes'])} on disk, {size(found['weight_bytes'])} on a device"),
        ("KV", f"{size(found['kv_token_bytes'])} a token, {found['context']} tokens at most"),
    ]
