"""What a person may name as a model's source: a directory, a demo checkpoint of the wheel, a hub's id, or a URL."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from serverless_llm.cli.options import pairs

if TYPE_CHECKING:
    from serverless_llm.cli.client import Server

_PART = r"[A-Za-z0-9](?:[\w.-]{0,94}\w)?"
HUB_ID = re.compile(rf"(?![^@]*(?:--|\.git(?:@|$)))(?!.*\.\.){_PART}/{_PART}(?:@\w[\w./-]*)?")  # what hubs can name


def resolve(source: str, served: bool = False, server: Server | None = None) -> str:
    """The absolute directory of a source. What a hub or a URL names is pulled unless it is here already.

    Args:
        served: headers and texts of a URL will do: a server reads the rest when it is wanted.
        server: of this machine, which is to read it.

    Raises:
        click.UsageError: it is neither a directory nor the name of a demo checkpoint, nor could it be a hub's id.
        CheckpointError: the hub or the URL has nothing that can be served.
        ConfigurationError: the server would not believe this command's disk tier.
    """
    if _is_url(source):
        return _of_url(source, served, server)
    path = _path(source)
    if path.is_dir():
        return str(path.resolve())
    if source in demos():
        return str(_demo(source))
    if path.is_file():
        raise click.UsageError(f"{source} is a file; name its directory: {path.parent}")
    if HUB_ID.fullmatch(source):
        return _of_hub(source)
    from serverless_llm.errors import did_you_mean

    raise click.UsageError(
        f"{source!r} is neither a directory nor one of {', '.join(demos())}, nor a hub's owner/name, nor a URL"
        f"{did_you_mean(source, demos())}"
    )


def demos() -> tuple[str, ...]:
    """The demo checkpoints' names."""
    from serverless_llm.demo import tasks

    return tasks.NAMES


def _demo(name: str) -> Path:
    from serverless_llm.demo import tasks

    return tasks.checkpoint_dir(name)


def _of_hub(source: str) -> str:
    from serverless_llm.cli import hub
    from serverless_llm.cli.pull import bring
    from serverless_llm.errors import CheckpointError, ConfigurationError

    wanted = hub.repository(source)
    assert wanted is not None
    try:
        return str((hub.cached(wanted) or bring(wanted)).directory)
    except (CheckpointError, ConfigurationError) as error:
        raise type(error)(f"there is no directory {source} here, and of the hub: {error}") from error


def _of_url(source: str, served: bool, server: Server | None) -> str:
    """Nothing removes it while the command runs."""
    from serverless_llm.cli.pull import announce_url, bring_url
    from serverless_llm.loader import disk_tier

    tier = disk_tier.tier()
    lease = tier.cached(source)
    if lease is None:
        if server is not None:
            _demand_same(tier.root, server)
        lease = (announce_url if served else bring_url)(source)
    if context := click.get_current_context(silent=True):
        context.with_resource(lease)
    return str(lease.directory)


def _demand_same(own: Path, server: Server) -> None:
    from serverless_llm.errors import ConfigurationError

    theirs = server.call("GET", "/admin/status")["disk_tier"]
    if os.path.realpath(theirs) != str(own):
        raise ConfigurationError(
            f"the server believes headers in its own disk tier alone, {theirs}, and this command's is {own}: "
            f"give this command XDG_CACHE_HOME={Path(theirs).parents[1]}"
        )


def url_of(source: str) -> str:
    """A URL as a model's row has it; empty of another kind of source.

    Raises:
        CheckpointError: it is not one of a checkpoint.
    """
    from serverless_llm.loader import remote

    return remote.checked(source) if remote.is_url(source) else ""


def _is_url(text: str) -> bool:
    from serverless_llm.loader import remote

    return remote.is_url(text)


def is_source(text: str) -> bool:
    """Whether `resolve` has a chance."""
    return text in demos() or _path(text).is_dir() or HUB_ID.fullmatch(text) is not None or _is_url(text)


def _path(source: str) -> Path:
    try:
        return Path(source).expanduser()
    except RuntimeError:  # `~` and a user whom nobody knows
        return Path(source)


def name_of(source: str) -> str:
    """A model's name made of its source: a hub's id as it is, without its revision, else the last part."""
    from serverless_llm.config import NAME

    path = _path(source)
    if HUB_ID.fullmatch(source) and not path.is_dir():
        return source.partition("@")[0]
    name = re.sub(r"[^\w.-]+", "-", path.resolve().name).lstrip("-._")
    if not NAME.fullmatch(name):
        raise click.UsageError(f"no name can be made of {source!r}; give it one: serverless-llm deploy NAME DIR")
    return name


def same(one: str, other: str) -> bool:
    """Whether two directories are one, or versions of what one hub's id or one URL names."""
    from serverless_llm.loader.manifest import CHECKPOINT

    first, second = (Path(os.path.realpath(path)) for path in (one, other))
    if first.name == second.name == CHECKPOINT:
        return first.parents[1] == second.parents[1]
    return first == second or (first.parent == second.parent and first.parent.name == "snapshots")


def check_name(name: str, hint: str) -> None:
    """
    Raises:
        click.BadParameter: no model can be called so; `hint` names the argument.
    """
    from serverless_llm.config import NAME, NO_NAME

    if not NAME.fullmatch(name):
        raise click.BadParameter(NO_NAME % name, param_hint=hint)


def named(given: tuple[str, ...]) -> dict[str, str]:
    """Models of `NAME=SOURCE` or bare sources, as name -> absolute directory."""
    texts = [text if "=" in text else f"{name_of(text)}={text}" for text in given]
    return {name: resolve(source, served=True) for name, source in pairs(texts, "'--model'").items()}
