"""The life of one completion request in the gateway: announce, tokenise beside it, hold or stream, end."""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections.abc import Callable, Coroutine
from typing import Any

from aiohttp import web

from serverless_llm import wire
from serverless_llm.domain import WorkClass
from serverless_llm.errors import RequestError
from serverless_llm.gateway import records, sse
from serverless_llm.gateway.metrics import Metrics
from serverless_llm.gateway.openai import CompletionRequest
from serverless_llm.gateway.options import GatewayOptions
from serverless_llm.gateway.requests import LiveRequest, LiveRequests
from serverless_llm.gateway.text import TextPool
from serverless_llm.gateway.text_wire import Call

SURE_BYTES = 32 << 10  # into an empty buffer: a write that never waits (asyncio's transports pause at 64 KiB)
_log = logging.getLogger("serverless_llm.request")


class Completions:
    """Answers requests for text. `info`: the model as it is deployed now."""

    def __init__(
        self,
        live: LiveRequests,
        text: TextPool,
        metrics: Metrics,
        options: GatewayOptions,
        info: Callable[[str], wire.ModelInfo | None],
    ) -> None:
        self._live = live
        self._text = text
        self._metrics = metrics
        self._options = options
        self._info = info
        self._preparing: set[asyncio.Task[None]] = set()

    async def answer(
        self, http: web.Request, request_id: str, info: wire.ModelInfo, request: CompletionRequest
    ) -> web.StreamResponse:
        """
        Raises:
            RequestError: there is no answer, and no header has left.
        """
        live = self._live.open(request_id, info, request)
        self._spawn(self._prepare(live))
        cause = "client gone"
        try:
            response = await (self._stream(http, live) if request.stream else self._whole(live))
            cause = live.finish or "error"
        except RequestError as error:
            cause = error.code
            live.fail(error)
            raise
        else:
            return response
        finally:
            self._live.close(live, cause)
            self._ended(live, cause)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._preparing.add(task)
        task.add_done_callback(self._preparing.discard)

    async def _prepare(self, live: LiveRequest) -> None:
        """Not cancelled with its request: a text process ends its short call and is used again."""
        try:
            self._live.prompted(live, await self._text.prompt(_call(live)))
        except RequestError as error:
            live.fail(error)
        except Exception:  # noqa: BLE001  the task's edge: the request must end
            _log.exception("%s: the prompt could not be made", live.request_id)
            live.fail(RequestError(500, "engine_error", "the prompt could not be made"))

    # --- not streaming ---

    async def _whole(self, live: LiveRequest) -> web.Response:
        hold = live.opened + self._options.hold
        loop = asyncio.get_running_loop()
        while not live.done:
            await live.news(None if live.first else hold)
            if not live.first and not live.done and loop.time() >= hold:
                raise self._held_too_long(live)
        if live.error is not None:
            raise live.error
        body = sse.whole(_identity(live), live.take(), live.finish, _usage(live), _metrics(live))
        return web.Response(body=body, content_type="application/json", headers=_timing(live))

    def _held_too_long(self, live: LiveRequest) -> RequestError:
        info = self._info(live.info.name) or live.info
        waited = f"no token within {self._options.hold:g} s"
        after = info.estimate_s or 0.0  # None would say that a retry is useless
        if info.state == "loaded":
            return RequestError(503, "overloaded", f"{waited}: the model is busy", retry_after=after)
        return RequestError(503, "model_loading", f"{waited}: the model is loading", retry_after=after)

    # --- streaming ---

    async def _stream(self, http: web.Request, live: LiveRequest) -> web.StreamResponse:
        live.unread_limit = self._options.unread_limit
        live.overrun = lambda: http.transport.abort() if http.transport else None
        await live.news(live.opened + self._options.commit_after)
        if live.error is not None and not live.first:
            raise live.error
        response = web.StreamResponse(headers=sse.HEADERS | _timing(live))
        await response.prepare(http)
        await self._pump(live, http, response)
        return response

    async def _pump(self, live: LiveRequest, http: web.Request, response: web.StreamResponse) -> None:
        """Every piece of text, heartbeats in between, and the end; one write for all that is there."""
        chunks = sse.Chunks(_identity(live), live.request.include_usage)
        loop, every = asyncio.get_running_loop(), self._options.heartbeat_every
        beat = loop.time() + (every if live.first else 0.0)  # headers without a token are followed by a heartbeat
        while True:
            done, text = live.done, live.take()
            out = chunks.delta(text) if text else b""
            if done:
                await self._write(http, response, out + self._end(live, chunks))
                return
            out = out or (self._heartbeat(chunks) if loop.time() >= beat else b"")
            if out:
                await self._write(http, response, out)
                beat = loop.time() + every
            await live.news(beat)

    def _end(self, live: LiveRequest, chunks: sse.Chunks) -> bytes:
        if live.error is not None:
            return sse.failed(live.error)
        return chunks.last(live.finish, _usage(live), _metrics(live))

    def _heartbeat(self, chunks: sse.Chunks) -> bytes:
        return sse.PING if self._options.heartbeat == "comment" else chunks.heartbeat()

    async def _write(self, http: web.Request, response: web.StreamResponse, data: bytes) -> None:
        """
        Raises:
            ConnectionError: the client is gone, or takes nothing for too long.
        """
        if len(data) < SURE_BYTES and http.transport is not None and not http.transport.get_write_buffer_size():
            await response.write(data)
            return
        try:
            async with asyncio.timeout(self._options.write_stall):
                await response.write(data)
        except TimeoutError:
            raise ConnectionAbortedError("the client does not read") from None

    # --- afterwards ---

    def _ended(self, live: LiveRequest, cause: str) -> None:
        name = live.info.name
        if self._info(name) is not None:
            reason = live.finish or ("error" if live.error is not None else "abort")
            self._metrics.ended(name, live.device, reason)
            if live.finish:
                self._observe(live)
        record = records.CURRENT.get()
        record.model, record.work_class, record.end = (
            name,
            WorkClass.ONLINE.value,
            live.error.code if live.error else cause,
        )
        record.prompt, record.generated = len(live.prompt.ids) // 4 if live.prompt else 0, len(live.log)
        record.device, record.restarts = live.device, live.restarts
        times = _metrics(live) if live.first else {}
        record.phases = {key: value for key, value in times.items() if isinstance(value, float)} | _phases(live)

    def _observe(self, live: LiveRequest) -> None:
        series = live.series
        assert series is not None, "finished without an attachment"
        usage = _usage(live)
        generated = usage["completion_tokens"]
        decode = live.last - live.first
        series.prompt.inc(usage["prompt_tokens"])
        series.prompt_size.observe(usage["prompt_tokens"])
        series.generated_size.observe(generated)
        series.allowed_size.observe(live.max_tokens)
        series.latency.observe(live.last - live.arrived)
        series.queue.observe(live.queue_ms / 1000)
        series.prefill.observe(live.prefill)
        series.decode.observe(decode)
        series.inference.observe(live.prefill + decode)
        if generated > 1:
            series.per_token.observe(decode / (generated - 1))
        if live.cold:
            self._metrics.cold_start(live.info.name, live.first - live.arrived)


def _call(live: LiveRequest) -> Call:
    info, request = live.info, live.request
    text = request.prompt if isinstance(request.prompt, str) else None
    ids = array("i", request.prompt).tobytes() if isinstance(request.prompt, tuple) else None
    return Call(info.name, info.source, info.checkpoint, request.messages, text, ids, variables=request.variables)


def _identity(live: LiveRequest) -> sse.Identity:
    return sse.Identity(live.request.chat, live.request_id, live.created, live.info.name)


def _usage(live: LiveRequest) -> dict[str, int]:
    prompt = len(live.prompt.ids) // 4 if live.prompt else 0
    generated = len(live.log)
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _phases(live: LiveRequest) -> dict[str, float]:
    """Of a cold start, in milliseconds, as far as they are known."""
    if not live.cold:
        return {}
    prefill = {"prefill_ms": _ms(live.prefill)} if live.first else {}
    return {phase: round(value, 3) for phase, value in live.cold.items()} | prefill


def _metrics(live: LiveRequest) -> dict[str, Any]:
    to_first = _ms(live.first - live.arrived) if live.first else 0.0
    return {
        "time_to_first_token_ms": to_first,
        "queue_time_ms": round(live.queue_ms, 3),
        "generation_time_ms": _ms(live.last - live.first),
        "cold_start_ms": to_first if live.cold else 0.0,
        "cold_start_phases": _phases(live),
    }


def _timing(live: LiveRequest) -> dict[str, str]:
    """`Server-Timing`: the phases known now."""
    phases = {"queue_ms": round(live.queue_ms, 3)} if live.attached else {}
    phases |= _phases(live)
    if live.first:
        phases["first_token_ms"] = _ms(live.first - live.arrived)
    value = ", ".join(f"{name.removesuffix('_ms')};dur={duration:g}" for name, duration in phases.items())
    return {"Server-Timing": value} if value else {}
