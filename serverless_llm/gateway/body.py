"""A request's body: read within a time, and decoded."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import msgspec
from aiohttp import web

from serverless_llm.gateway.failure import invalid


async def read(request: web.Request, seconds: float) -> bytes:
    """
    Raises:
        RequestError: 400, it did not come in time, or is not encoded as its headers say.
        HTTPRequestEntityTooLarge: it is over the application's limit.
    """
    try:
        async with asyncio.timeout(seconds):
            return await _whole(request)
    except TimeoutError:
        raise invalid(f"the body did not come within {seconds:g} s") from None
    except web.RequestPayloadError:
        request.content.feed_eof()  # or aiohttp would read what is left, and log what it meets
        raise invalid("the body is not encoded as its headers say") from None


async def _whole(request: web.Request) -> bytes:
    """As `request.read`, which would keep it for as long as the answer takes."""
    request.content.set_read_chunk_size(request.client_max_size)
    chunks: list[bytes] = []
    size = 0
    while chunk := await request.content.readany():
        size += len(chunk)
        if size > request.client_max_size:
            raise web.HTTPRequestEntityTooLarge(request.client_max_size)
        chunks.append(chunk)
    return b"".join(chunks)


def decode(raw: bytes) -> dict[str, Any]:
    """A body's JSON object.

    Raises:
        RequestError: not JSON, or not an object.
    """
    gc.disable()  # it would look at millions of new lists again and again, while streams wait; JSON has no cycles
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise invalid(f"the body is not valid JSON: {error}") from error
    finally:
        gc.enable()
    if not isinstance(body, dict):
        raise invalid("the body must be a JSON object")
    return body
