"""`serverless-llm repack`: a checkpoint in the form that reads best."""

from __future__ import annotations

from pathlib import Path

import click

from serverless_llm.cli import sources
from serverless_llm.cli.options import SHARD
from serverless_llm.cli.output import as_json, say


@click.command()
@click.argument("source", metavar="SOURCE")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--shard-size",
    type=SHARD,
    default="16GB",
    show_default=True,
    help="Most bytes of tensors in one file; a larger tensor has one of its own.",
)
@as_json
def repack(source: str, directory: Path, shard_size: str, as_json: bool) -> None:
    """Write SOURCE's checkpoint anew to DIRECTORY: few large files, aligned for direct reads.

    Every tensor stays as it is, bit for bit, and the files are ordinary safetensors. SOURCE is a directory, a demo
    checkpoint, a hub's owner/name, or a URL.
    """
    from serverless_llm.cli.progress import transfers
    from serverless_llm.loader.repack import repack as write
    from serverless_llm.quantities import parse_size, size

    with transfers() as told:
        written = write(Path(sources.resolve(source)), directory, parse_size(shard_size), told)
    nbytes = sum(shard.nbytes for shard in written)
    tensors = sum(len(shard.parts) for shard in written)
    value = {"directory": str(directory), "files": len(written), "tensors": tensors, "bytes": nbytes}
    files = "1 file" if len(written) == 1 else f"{len(written)} files"
    say(value, f"{directory}: {tensors} tensors in {files}, {size(nbytes)}", as_json)
