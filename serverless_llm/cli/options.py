"""Types of the command line's values: what cannot be read is a usage error that names its flag (status 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import click

LEAST_SHARD = 1_000_000  # bytes; who asks for less has most likely forgotten a unit


class Quantity(click.ParamType):  # type: ignore[type-arg]  # click before 8.2 knows no argument
    """A text that `parse` reads; it is passed on as it stands, since its meaning may depend on the machine."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from serverless_llm.errors import ServerlessLLMError

        try:
            self._parse(value)
        except ServerlessLLMError as error:
            self.fail(str(error), param, ctx)
        return value


def _time(value: str) -> None:
    from serverless_llm.quantities import parse_duration

    parse_duration(value)


def _limited(value: str) -> None:
    from serverless_llm.quantities import parse_duration

    parse_duration(value, forever=False)


def _share(value: str) -> None:
    from serverless_llm.quantities import parse_size

    parse_size(value, whole=1)


def _shard(value: str) -> None:
    from serverless_llm.errors import ConfigurationError
    from serverless_llm.quantities import parse_size

    if parse_size(value) < LEAST_SHARD:
        raise ConfigurationError(f"{value!r} is less than 1 MB: a bare number is of bytes; write 512MiB or 10GB")


def _limit(value: str) -> None:
    from serverless_llm.quantities import parse_pairs, parse_rate

    for rate in parse_pairs(value).values():
        parse_rate(rate)


def _devices(value: str) -> None:
    from serverless_llm.config import parse_devices

    parse_devices(value)


def _source(value: str) -> None:
    from serverless_llm.loader import remote

    if remote.is_url(value):
        remote.checked(value)


def pairs(given: Iterable[str], hint: str) -> dict[str, str]:
    """What a flag that may be given again and again says, as name -> text.

    Raises:
        click.BadParameter: a name is there twice; `hint` names the flag.
    """
    from serverless_llm.errors import ConfigurationError
    from serverless_llm.quantities import parse_pairs

    try:
        return parse_pairs(given)
    except ConfigurationError as error:
        raise click.BadParameter(str(error), param_hint=hint) from None


class Whole(click.IntRange):
    """A whole number, called so where a text is none."""

    name = "whole number"


TIME = Quantity("time", _time)
LIMITED = Quantity("time", _limited)
SHARE = Quantity("size", _share)
SHARD = Quantity("size", _shard)
LIMIT = Quantity("link=rate", _limit)
DEVICES = Quantity("kind:n", _devices)
SOURCE = Quantity("source", _source)
COUNT = Whole(min=1)
ANY_COUNT = Whole(min=0)
PORT = Whole(0, 65535)
