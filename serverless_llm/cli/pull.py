"""`serverless-llm pull`: a hub's repository into the local cache, or what a URL holds into the disk tier."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from serverless_llm.cli.options import SOURCE
from serverless_llm.cli.output import as_json, say
from serverless_llm.quantities import size

if TYPE_CHECKING:
    from serverless_llm.cli.hub import Pulled, Repository
    from serverless_llm.loader.leases import Lease


@click.command()
@click.argument("source", type=SOURCE, metavar="OWNER/NAME[@REVISION]|URL")
@as_json
def pull(source: str, as_json: bool) -> None:
    """Bring a model of the Hugging Face hub, or of a URL, to this machine, and print its directory.

    Only safetensors, config and tokenizer files are read. What an interrupted pull left is gone on with. HF_HOME,
    HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are honoured; where the hub cannot be reached, a cached snapshot is taken.

    A URL is that of a checkpoint's directory: s3://, gs://, az://, https:// or http://. Stores take their credentials
    from the variables that they are known by (AWS_ACCESS_KEY_ID ...).
    """
    from serverless_llm.loader import remote

    if remote.is_url(source):
        _pull_url(source, as_json)
    else:
        _pull_hub(source, as_json)


def _pull_url(url: str, as_json: bool) -> None:
    with bring_url(url) as lease:
        sizes = [path.stat().st_size for path in lease.directory.rglob("*") if path.is_file()]
    value = {
        "url": url,
        "version": lease.directory.parent.name,
        "directory": str(lease.directory),
        "files": len(sizes),
        "bytes": sum(sizes),
        "offline": bool(lease.offline),
    }
    click.echo(f"{url}: {len(sizes)} files, {size(sum(sizes))}", err=True)
    say(value, str(lease.directory), as_json)


def bring_url(url: str) -> Lease:
    """Brings it into the disk tier, showing how far it is."""
    from serverless_llm.cli.hub import TOKENIZER
    from serverless_llm.cli.progress import transfers
    from serverless_llm.loader import disk_tier, manifest

    with transfers() as told:
        return _said(url, disk_tier.tier().bring(url, told, (manifest.CONFIG, TOKENIZER)))


def announce_url(url: str) -> Lease:
    """Brings its headers and text files into the disk tier."""
    from serverless_llm.cli.hub import TOKENIZER
    from serverless_llm.cli.progress import transfers
    from serverless_llm.loader import announce, disk_tier, manifest

    with transfers() as told:
        return _said(url, announce.announce(disk_tier.tier(), url, told, (manifest.CONFIG, TOKENIZER)))


def _said(url: str, lease: Lease) -> Lease:
    if lease.offline:
        click.echo(f"{url}: taken from the disk, since {lease.offline}", err=True)
    return lease


def _pull_hub(repository: str, as_json: bool) -> None:
    from serverless_llm.cli import hub

    wanted = hub.repository(repository)
    if wanted is None:
        raise click.UsageError(f"{repository!r} is not of the form owner/name or owner/name@revision, nor a URL")
    pulled = bring(wanted)
    value = {
        "repository": wanted.name,
        "revision": wanted.revision,
        "commit": pulled.directory.name,
        "directory": str(pulled.directory),
        "files": pulled.files,
        "bytes": pulled.nbytes,
        "offline": bool(pulled.offline),
    }
    click.echo(f"{wanted}: {pulled.files} files, {size(pulled.nbytes)}", err=True)
    say(value, str(pulled.directory), as_json)


def bring(wanted: Repository) -> Pulled:
    """Pulls it, showing how far it is."""
    from serverless_llm.cli import hub
    from serverless_llm.cli.progress import transfers

    with transfers() as told:
        pulled = hub.pull(wanted, told)
    if pulled.offline:
        click.echo(f"{wanted}: taken from the cache, since {pulled.offline}", err=True)
    return pulled
