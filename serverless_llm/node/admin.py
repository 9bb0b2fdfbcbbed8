"""What operators ask of the controller, and how it is answered: JSON in, status and JSON out."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeVar, get_type_hints

import msgspec

from serverless_llm.config import NAME, NO_NAME, in_words
from serverless_llm.demo import tasks
from serverless_llm.domain import MAX_COUNT, MAX_SOURCE, Footprint, ModelSpec
from serverless_llm.engine.config import ModelConfig
from serverless_llm.errors import CheckpointError, ConfigurationError, RequestError, did_you_mean, shortened
from serverless_llm.loader import disk_tier, filling
from serverless_llm.node import identity
from serverless_llm.node.threads import apart
from serverless_llm.quantities import LONGEST, parse_duration

T = TypeVar("T")

UNKNOWN = re.compile(r"(?s)Object contains unknown field `(.*)`")  # as msgspec tells of it


class DeployBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a deploy; what is not given takes the server's default."""

    source: str
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    keep_alive: float | str | None = None
    min_replicas: int = 0
    max_replicas: int = 1
    max_concurrency: int = 64
    max_queue: int = 1024
    context: int | None = None
    pinned: bool = False
    verify: Literal["off", "sample", "full"] = "off"


class PinBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pinned: bool = True


class DrainBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    drained: bool = True


def spec_of(name: str, body: bytes, keep_alive: float, roots: Sequence[Path]) -> ModelSpec:
    """The spec that a deploy asks for; blocks where its source lies.

    Args:
        keep_alive: the server's default, in seconds.
        roots: directories that the source must lie in; none: anywhere.

    Raises:
        RequestError: 400 for a bad name or body, 403 for a source outside the roots.
    """
    if not NAME.fullmatch(name):
        raise refusal(NO_NAME % name, "name")
    asked = parse(body, DeployBody)
    source = _source(asked.source, roots)
    spec = ModelSpec(
        name=name,
        source=str(source),
        dtype=asked.dtype,
        keep_alive=_keep_alive(asked.keep_alive, keep_alive),
        min_replicas=asked.min_replicas,
        max_replicas=asked.max_replicas,
        max_concurrency=asked.max_concurrency,
        max_queue=asked.max_queue,
        context=asked.context,
        pinned=asked.pinned,
        verify=asked.verify,
        url=disk_tier.url_of(source),
    )
    _check(spec)
    return spec


def _check(spec: ModelSpec) -> None:
    for field, least in (("min_replicas", 0), ("max_replicas", 1), ("max_concurrency", 1), ("max_queue", 0)):
        if getattr(spec, field) < least:
            raise refusal(f"{field} must be at least {least}", field)
        if getattr(spec, field) > MAX_COUNT:
            raise refusal(f"{field} must be at most {MAX_COUNT}", field)
    if spec.min_replicas > spec.max_replicas:
        least, most = spec.min_replicas, spec.max_replicas
        raise refusal(f"min_replicas, {least}, is more than max_replicas, {most}", "min_replicas")
    if spec.context is not None and not 1 <= spec.context <= MAX_COUNT:
        raise refusal(f"context must be 1 ... {MAX_COUNT}", "context")


def _source(source: str, roots: Sequence[Path]) -> Path:
    if len(source) > MAX_SOURCE:
        raise refusal(f"source has {len(source)} characters; a path has at most {MAX_SOURCE}", "source")
    if source in tasks.NAMES:
        return tasks.checkpoint_dir(source).resolve()
    try:
        path = Path(source).expanduser()
        if not path.is_absolute():
            raise refusal(
                "source must be the absolute path of a directory on the server; the command line knows others", "source"
            )
        path = path.resolve()
    except (ValueError, RuntimeError) as error:  # a NUL; no such user, or a loop of links
        raise refusal(f"source {source!r}: {error}", "source") from None
    if roots and not any(path.is_relative_to(root) for root in roots):
        raise RequestError(403, "permission_denied", f"{path} is outside the model roots", "source")
    return path


def _keep_alive(asked: float | str | None, default: float) -> float:
    """Seconds; -1 is for ever, as clients of other servers know it."""
    if asked is None:
        return default
    if isinstance(asked, float) and 0 <= asked < LONGEST:
        return asked
    try:
        return parse_duration(asked)
    except ConfigurationError as error:
        raise refusal(str(error), "keep_alive") from None


def parse(body: bytes, kind: type[T]) -> T:
    """Raises:
    RequestError: 400, the body is not JSON of this kind.
    """
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except msgspec.ValidationError as error:
        if unknown := UNKNOWN.fullmatch(str(error)):
            near, name = did_you_mean(unknown[1], get_type_hints(kind)), shortened(unknown[1])
            raise refusal(f"unknown field {name!r}{near}", name) from None
        place, what = in_words(error, kind)
        raise refusal(f"{place[1:]}: {what}" if place else what, place[1:] or None) from None
    except msgspec.DecodeError as error:
        raise refusal(str(error), None) from None


def refusal(message: str, param: str | None) -> RequestError:
    return RequestError(400, "invalid_request_error", message, param)


def footprint(spec: ModelSpec) -> Footprint:
    """Reads the checkpoint's headers and config; blocks on the disk.

    Raises:
        CheckpointError: it cannot be served.
    """
    if spec.url and not Path(spec.source).exists():  # a place of our own, which nobody else can mend
        raise CheckpointError(f"{spec.url} is not on the disk tier any more: deploy it again ({spec.source} is gone)")
    found = identity.read(Path(spec.source))
    model = ModelConfig.parse(found.config, spec.dtype)
    if spec.context is not None and spec.context > model.context:
        raise CheckpointError(f"context {spec.context} is more than the checkpoint's {model.context}")
    return Footprint(
        checkpoint=found.checkpoint,
        file_bytes=found.file_bytes,
        weight_bytes=model.weight_bytes({name: (one.dtype, one.shape) for name, (_, one) in found.tensors().items()}),
        kv_block_bytes=model.kv_column_bytes,
        context=spec.context or model.context,
        kv_window_bytes=model.kv_groups.sliding * model.kv_block_bytes,
        kv_window_blocks=model.kv_groups.kept,
        remote_bytes=filling.lacking(found.directory),
    )


async def read_footprint(spec: ModelSpec, limit: float) -> Footprint:
    """`footprint`, beside the loop, within `limit` seconds.

    Raises:
        RequestError: 400, it cannot be served, or what it lies on does not answer.
    """
    try:
        return await within(limit, spec.source, lambda: footprint(spec))
    except CheckpointError as error:
        raise RequestError(400, "invalid_checkpoint", with_source(error, spec), "source") from error


def with_source(error: CheckpointError, spec: ModelSpec) -> str:
    """What is wrong, and with which source, by its URL where it has one."""
    place, text = spec.url or spec.source, str(error)
    return text if place in text or spec.source in text else f"{place}: {text}"


async def within(limit: float, source: str, work: Callable[[], T]) -> T:
    """What `work`, which looks at `source`, returns or raises, beside the loop.

    Raises:
        RequestError: 400, there was no answer for `limit` seconds.
    """
    try:
        async with asyncio.timeout(limit):
            return await apart(work)
    except TimeoutError:
        message = f"{source} did not answer within {limit:g} s"
        raise RequestError(400, "invalid_checkpoint", message, "source") from None
