"""The life of one completion request in the gateway: announce, tokenise beside it, hold or stream, end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import msgspec
from aiohttp import HttpVersion11, web

from serverless_llm import wire
from serverless_llm.domain import WorkClass
from serverless_llm.errors import RequestError
from serverless_llm.gateway import answers, records, sse
from serverless_llm.gateway.live import Choice, LiveRequest
from serverless_llm.gateway.metrics import Metrics
from serverless_llm.gateway.openai import CompletionRequest
from serverless_llm.gateway.options import GatewayOptions
from serverless_llm.gateway.requests import LiveRequests
from serverless_llm.gateway.stream import Stream
from serverless_llm.gateway.text import TextPool
from serverless_llm.gateway.text_wire import Call

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
        self._spawn(self._prepare(live))  # up to the call to a text process, which works while the machine does
        asyncio.get_running_loop().call_soon(self._live.announce, live)
        cause = "client gone"
        try:
            response = await (self._stream(http, live) if request.stream else self._whole(live))
            cause = "error" if live.error else live.lead.finish
        except RequestError as error:
            cause = error.code
            live.fail(error)
            raise
        else:
            return response
        finally:
            self._live.close(live, cause)
            self._ended(live, cause)
            live.forget()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._preparing.add(task)
        task.add_done_callback(self._preparing.discard)

    async def _prepare(self, live: LiveRequest) -> None:
        """Not cancelled with its request: a text process ends its short call and is used again."""
        try:
            for place, call in enumerate(_calls(live)):
                if not self._live.awaits(live):
                    return
                prompt = await self._text.prompt(call, lambda: self._live.awaits(live))
                for choice in live.choices[place * live.request.n :][: live.request.n]:
                    self._live.prompted(choice, prompt)
        except RequestError as error:
            live.fail(error)
        except Exception:  # noqa: BLE001  the task's edge: the request must end
            _log.exception("%s: the prompt could not be made", live.request_id)
            live.fail(RequestError(500, "engine_error", "the prompt could not be made"))
        finally:
            live.request.forget()

    # --- not streaming ---

    async def _whole(self, live: LiveRequest) -> web.Response:
        hold = live.opened + self._options.hold
        loop = asyncio.get_running_loop()
        while not live.done:
            await live.news(None if live.begun else hold)
            if not live.begun and not live.done and loop.time() >= hold:
                raise self._held_too_long(live)
        if live.error is not None:
            raise live.error
        headers = answers.timing(live.lead)
        return web.Response(body=answers.whole(live), content_type="application/json", headers=headers)

    def _held_too_long(self, live: LiveRequest) -> RequestError:
        info = self._info(live.info.name) or live.info
        waited = f"no token within {self._options.hold:g} s"
        after = info.estimate_s or 0.0  # None would say that a retry is useless
        if info.state == "loaded":
            return RequestError(503, "overloaded", f"{waited}: the model is busy", retry_after=after)
        why = "the model is loading" if info.state == "loading" else "there is no place for the model yet; see /ready"
        return RequestError(503, "model_loading", f"{waited}: {why}", retry_after=after)

    # --- streaming ---

    async def _stream(self, http: web.Request, live: LiveRequest) -> web.StreamResponse:
        live.unread_limit = self._options.unread_limit
        live.overrun = lambda: http.transport.abort() if http.transport else None
        await live.news(live.opened + self._options.commit_after)
        if live.error is not None:
            raise live.error
        response = web.StreamResponse(headers=sse.HEADERS | answers.timing(live.lead))
        if http.version < HttpVersion11:
            response.force_close()  # its end is the connection's, even where the client asks to keep that
        await response.prepare(http)
        await Stream(live, http, response, self._options).run()
        return response

    # --- afterwards ---

    def _ended(self, live: LiveRequest, cause: str) -> None:
        name, lead = live.info.name, live.lead
        if self._info(name) is not None:
            for choice in live.choices:
                self._observe(choice)
            if live.error is None and not live.unfinished and lead.cold:
                self._metrics.cold_start(name, lead.first - live.arrived)
        record = records.CURRENT.get()
        record.model, record.work_class = name, WorkClass.ONLINE.value
        record.end = live.error.code if live.error else cause
        record.prompt, record.generated = live.prompt_tokens, live.generated_tokens
        record.device, record.restarts = lead.device, sum(choice.restarts for choice in live.choices)
        times = answers.metrics(lead) if lead.first else {}
        phases = {key: value for key, value in times.items() if isinstance(value, float)}
        record.phases = phases | answers.phases(lead)

    def _observe(self, choice: Choice) -> None:
        """Every choice counts as a request, as in vLLM; none that was refused before any worker had it.

        What the client did wrong is no error of the server.
        """
        live, series = choice.live, choice.series
        refused = live.error is not None and live.error.status < 500
        if refused and not choice.attached:
            return
        reason = choice.finish or ("abort" if refused or live.error is None else "error")
        self._metrics.ended(live.info.name, choice.device, reason)
        if not choice.finish:
            return
        assert series is not None, "finished without an attachment"
        assert choice.prompt is not None, "finished without a prompt"
        prompt, generated = len(choice.prompt.ids) // 4, len(choice.log)
        decode = choice.last - choice.first
        series.prompt_size.observe(prompt)
        series.generated_size.observe(generated)
        series.allowed_size.observe(choice.max_tokens)
        series.latency.observe(choice.last - live.arrived)
        series.queue.observe(choice.queue_ms / 1000)
        series.prefill.observe(choice.prefill)
        series.decode.observe(decode)
        series.inference.observe(choice.prefill + decode)
        if generated > 1:
            series.per_token.observe(decode / (generated - 1))


def _calls(live: LiveRequest) -> Iterator[Call]:
    """What the text processes are asked for, prompt by prompt."""
    info, request = live.info, live.request
    call = Call(
        info.name,
        info.source,
        info.checkpoint,
        request.messages,
        variables=request.variables,
        echo=request.echo,
        context=info.context,
    )
    if request.chat:
        yield call
    for prompt in request.prompts:
        if isinstance(prompt, str):
            yield msgspec.structs.replace(call, text=prompt)
        else:
            yield msgspec.structs.replace(call, ids=prompt.tobytes())
