"""The gateway: HTTP on one side, messages with the controller on the other."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

import msgspec
from aiohttp import web

from serverless_llm import wire
from serverless_llm.errors import RequestError, shortened
from serverless_llm.gateway import body, failure, openai, openapi, page, records
from serverless_llm.gateway.access import Access
from serverless_llm.gateway.admin import Admin
from serverless_llm.gateway.completions import Completions
from serverless_llm.gateway.feed import Feed
from serverless_llm.gateway.keys import Key
from serverless_llm.gateway.metrics import Metrics
from serverless_llm.gateway.openai import CompletionRequest
from serverless_llm.gateway.options import GatewayOptions
from serverless_llm.gateway.quotas import Quotas
from serverless_llm.gateway.records import Record
from serverless_llm.gateway.requests import LiveRequests
from serverless_llm.gateway.text import TextPool

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

NAME = r"[A-Za-z0-9][\w.-]*(?:(?:/|%2[Ff])[\w.-]+)?"  # as config.NAME, in a path
POLLED = ("/health", "/ready", "/metrics", "/admin/status")  # by machines and dashboards: what they are refused is news
CLIENT_GONE = 499  # no status of HTTP; nobody receives it, but logs tell of it, as nginx's do
CALLER = web.RequestKey("caller", Key)
_VALID_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_log = logging.getLogger("serverless_llm.gateway")


class Gateway:
    """One gateway. Messages from the controller come by `receive`, those to it leave by `send`.

    `listen.Runner` serves the application: a client that goes away stops its sequence.
    """

    def __init__(
        self,
        send: Callable[[wire.Message], None],
        text: TextPool,
        generation: int,
        options: GatewayOptions | None = None,
    ) -> None:
        self._options = options or GatewayOptions()
        self.metrics = Metrics()
        self._access = Access(self._options)
        self._quotas = Quotas()
        self._models: dict[str, wire.ModelInfo] = {}
        self._ready = False
        self._problems: list[str] = []
        self._draining = False
        self._idle = asyncio.Event()
        self._page: asyncio.Future[bytes] | None = None
        self.live = LiveRequests(send, self.metrics, generation)
        self._admin = Admin(send, self._options, self.metrics.traffic.shown)
        self._feed = Feed(self._options.heartbeat_every)
        self._completions = Completions(self.live, text, self.metrics, self._options, self._models.get)
        self._receivers: dict[type[wire.Message], Callable[[Any], None]] = {
            wire.Attach: self.live.attach,
            wire.Tokens: self.live.tokens,
            wire.GivenBack: self.live.give_back,
            wire.Rejected: self.live.reject,
            wire.Catalog: self._catalog,
            wire.Answer: self._admin.answered,
            wire.News: lambda message: self._feed.tell(message.body),
        }

    def receive(self, message: wire.Message) -> None:
        """Take one message of the controller or a worker."""
        self._receivers[type(message)](message)

    def _catalog(self, message: wire.Catalog) -> None:
        models = {info.name: info for info in message.models}
        for name in self._models.keys() - models.keys():
            self.metrics.forget(name)
        self.metrics.deployed(models.keys())
        self._models.clear()
        self._models.update(models)
        self._ready, self._problems = message.ready, message.problems

    def set_keys(self, keys: Iterable[Key]) -> None:
        """The keys were read anew."""
        self._access.set_keys(keys)

    # --- stopping ---

    def drain(self) -> None:
        """Take no new request; `idle` tells when the last one has ended."""
        self._draining = True
        self._feed.close()
        self._look_idle()

    async def idle(self) -> None:
        await self._idle.wait()

    def _look_idle(self) -> None:
        if self._draining and not len(self.live):
            self._idle.set()

    def abort(self, message: str) -> None:
        """End every request now, streams by an error event."""
        for live in self.live:
            live.fail(RequestError(503, "overloaded", message, retry_after=1.0))

    # --- HTTP ---

    def application(self) -> web.Application:
        app = web.Application(middlewares=[self._edge], client_max_size=self._options.body_limit)
        app.on_response_prepare.append(_mark)
        app.add_routes(self._routes())
        return app

    def _routes(self) -> list[web.RouteDef]:
        routes = [
            web.get("/health", self._health),
            web.get("/ready", self._get_ready),
            web.get("/metrics", self._metrics_page),
            web.get("/openapi.json", self._openapi),
            web.get("/admin/events", self._feed.watch, allow_head=False),  # its head would have no end
        ]
        for prefix in ("/v1", f"/models/{{name:{NAME}}}/v1"):
            routes += [
                web.post(f"{prefix}/chat/completions", self._chat),
                web.post(f"{prefix}/completions", self._completion),
                web.get(f"{prefix}/models", self._list),
                web.get(f"{prefix}/models/{{id:{NAME}}}", self._model),
            ]
        return [*routes, *self._admin.routes(), *page.routes()]

    @web.middleware
    async def _edge(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Identity, access, every failure as an error body, and the line in the log."""
        given = request.headers.get("x-request-id", "")
        request_id = given if _VALID_ID.fullmatch(given) else uuid.uuid4().hex
        record = Record(request_id, f"{request.method} {request.rel_url.raw_path}")  # as it came: no line breaks
        records.CURRENT.set(record)
        try:
            response = await self._answer(request, handler, record)
            record.status = response.status
            if record.status >= 400 and record.end:
                self.metrics.refused(record.end)
        except asyncio.CancelledError:
            record.status, record.end = CLIENT_GONE, record.end or "client gone"
            raise
        else:
            return response
        finally:
            if not _is_routine(request.path, record.status):
                record.write()

    async def _answer(self, request: web.Request, handler: Handler, record: Record) -> web.StreamResponse:
        try:
            key = self._access.check(request)
            if key is not None:
                request[CALLER], record.key = key, key.id
            return await handler(request)
        except RequestError as error:
            response = _refused(error)
            if request.content.exception() is not None:  # where the next request begins is not known
                response.force_close()
            return response
        except web.HTTPException as error:
            return _refused(self._from_http(error, request), error)
        except ConnectionError:
            _abort(request)
            return _refused(RequestError(CLIENT_GONE, "client_gone", "nobody reads this"))
        except Exception:  # noqa: BLE001  the edge: whatever it was, the client gets an error body
            _log.exception("%s: %s failed", record.request_id, record.route)
            return _refused(RequestError(500, "engine_error", "an internal error; the log tells more"))

    def _from_http(self, error: web.HTTPException, request: web.Request) -> RequestError:
        """aiohttp's own refusals: no such route, wrong method, body over the limit."""
        if error.status == 404:
            return failure.no_route(request.method, request.path)
        if isinstance(error, web.HTTPMethodNotAllowed):
            return failure.no_method(request.method, request.path, error.allowed_methods)
        if error.status == 413:
            limit = self._options.body_limit
            return RequestError(413, "request_too_large", f"the body is over the limit of {limit} bytes")
        return RequestError(error.status, "invalid_request_error", error.reason)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._complete(request, chat=True)

    async def _completion(self, request: web.Request) -> web.StreamResponse:
        return await self._complete(request, chat=False)

    async def _complete(self, request: web.Request, chat: bool) -> web.StreamResponse:
        with self._within_quota(request.get(CALLER)) as grow:
            raw = await body.read(request, self._options.idle)
            if self._draining:  # by now
                raise RequestError(503, "overloaded", "the server is stopping", retry_after=5.0)
            parsed = openai.parse(body.decode(raw), chat)
            del raw  # a stream lives for long
            if "name" in request.match_info:
                self._named(request.match_info["name"])  # an endpoint that is not there, whatever the body names
            info = self._named(_model_name(request, parsed.model))
            if not info.checkpoint:
                raise failure.not_restored(info)
            _check_choices(info, parsed)
            grow(parsed.choices)
            try:
                return await self._completions.answer(request, records.CURRENT.get().request_id, info, parsed)
            finally:
                self._look_idle()

    @contextlib.contextmanager
    def _within_quota(self, key: Key | None) -> Iterator[Callable[[int], None]]:
        """Gives what is to be told the number of choices, once it is known.

        Raises:
            RequestError: 429, the caller's limit.
        """
        if key is None:
            yield lambda choices: None
            return
        stay = self._quotas.enter(key, asyncio.get_running_loop().time())
        try:
            yield stay.grow
        finally:
            record = records.CURRENT.get()
            stay.leave(record.prompt + record.generated)

    def _named(self, name: str) -> wire.ModelInfo:
        info = self._models.get(name)
        if info is None:
            raise failure.unknown_model(name, self._models)
        return info

    async def _list(self, request: web.Request) -> web.Response:
        name = request.match_info.get("name")
        infos = self._models.values() if name is None else [self._named(name)]
        return _json({"object": "list", "data": [_shown(info) for info in infos]})

    async def _model(self, request: web.Request) -> web.Response:
        wanted, endpoint = request.match_info["id"], request.match_info.get("name")
        if endpoint not in (None, wanted):
            raise failure.unknown_model(wanted, ())
        return _json(_shown(self._named(wanted)))

    async def _health(self, _request: web.Request) -> web.Response:
        return _json({"status": "ok"})

    async def _get_ready(self, _request: web.Request) -> web.Response:
        ready = self._ready and not self._draining
        problems = ["the server is stopping", *self._problems] if self._draining else self._problems
        return _json({"ready": ready, "problems": problems}, status=200 if ready else 503)

    async def _openapi(self, _request: web.Request) -> web.Response:
        return web.Response(body=openapi.document(), content_type="application/json")

    async def _metrics_page(self, _request: web.Request) -> web.Response:
        shown = [live for live in self.live if live.info.name in self._models]
        running = Counter((live.info.name, live.device) for live in shown if live.device)
        waiting = Counter((live.info.name, "") for live in shown if not live.device)
        self.metrics.states({name: info.state for name, info in self._models.items()})
        zero = {(name, ""): 0 for name in self._models}
        self.metrics.occupancy(zero | running, zero | waiting)
        if self._page is None or self._page.done():  # of many models it takes long: beside the loop, one for all
            self._page = asyncio.get_running_loop().run_in_executor(None, self.metrics.page)
        text = await asyncio.shield(self._page)
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4"})


def _is_routine(path: str, status: int) -> bool:
    """Whether a request like this comes every few seconds and says nothing."""
    return (path in POLLED and status == 200) or (path, status) == ("/ready", 503)


def _abort(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()


async def _mark(_request: web.Request, response: web.StreamResponse) -> None:
    record = records.CURRENT.get(None)
    response.headers["x-request-id"] = record.request_id if record else uuid.uuid4().hex
    if isinstance(response, web.HTTPException):  # aiohttp's own, from before `_edge`: an expectation it cannot meet
        response.body = failure.encoded(RequestError(response.status, "invalid_request_error", response.reason))
        response.content_type = "application/json"


def _model_name(request: web.Request, given: str | None) -> str:
    """The model of the path or of the body; both must agree."""
    path = request.match_info.get("name")
    if path is None:
        if given is None:
            raise failure.invalid("model is required", "model")
        return given
    if given is None or given == path:
        return path
    raise failure.invalid(f"this is the endpoint of {path!r}; the body names {shortened(given)!r}", "model")


def _check_choices(info: wire.ModelInfo, parsed: CompletionRequest) -> None:
    """
    Raises:
        RequestError: 400, so many choices can never run or wait at a time: each is a sequence of its own.
    """
    most = info.max_concurrency * info.max_replicas + info.max_queue
    if parsed.choices > most:
        limits = f"max_concurrency {info.max_concurrency}, max_replicas {info.max_replicas}, max_queue {info.max_queue}"
        message = f"{info.name} takes at most {most} choices at a time ({limits}), this request has {parsed.choices}"
        raise failure.invalid(message, "n" if parsed.n > 1 else "prompt")


def _shown(info: wire.ModelInfo) -> dict[str, Any]:
    return {
        "id": info.name,
        "object": "model",
        "created": info.created,
        "owned_by": "serverless-llm",
        "max_model_len": info.context,
        "status": {
            "value": info.state,
            "tier": info.tier,
            "progress": info.progress,
            "error": info.error or None,
        },
    }


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(value), content_type="application/json")


def _refused(error: RequestError, cause: web.HTTPException | None = None) -> web.Response:
    record = records.CURRENT.get()
    record.end, record.param = error.code, error.param or ""
    body, headers = failure.encoded(error), failure.headers(error)
    if cause is not None and "Allow" in cause.headers:
        headers["Allow"] = cause.headers["Allow"]
    return web.Response(status=error.status, body=body, headers=headers, content_type="application/json")
