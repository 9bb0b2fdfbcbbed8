"""`serverless-llm pull`: a hub's repository into the local cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from serverless_llm.cli.output import as_json, say
from serverless_llm.quantities import size

if TYPE_CHECKING:
    from serverless_llm.cli.hub import Pulled, Repository


@click.command()
@click.argument("repository", metavar="OWNER/NAME[@REVISION]")
@as_json
def pull(repository: str, as_json: bool) -> None:
    """Bring a model of the Hugging Face hub into the local cache, and print its directory.

    Only safetensors, config and tokenizer files are read. What an interrupted pull left is gone on with. HF_HOME,
    HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are honoured; where the hub cannot be reached, a cached snapshot is taken.
    """
    from serverless_llm.cli import hub

    wanted = hub.repository(repository)
    if wanted is None:
        raise click.UsageError(f"{repository!r} is not of the form owner/name or owner/name@revision")
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
