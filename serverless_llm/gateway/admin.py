"""The operator's routes: each is one question to the controller, answered as it answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
from aiohttp import web

from serverless_llm import wire
from serverless_llm.errors import RequestError
from serverless_llm.gateway import body
from serverless_llm.gateway.options import GatewayOptions

ACTIONS = ("load", "unload", "pin")


class _Error(msgspec.Struct):
    message: str
    code: str
    param: str | None


class _Refused(msgspec.Struct):
    """An error's body, as the controller gives it."""

    error: _Error


class Admin:
    """Questions in flight, by number."""

    def __init__(
        self, send: Callable[[wire.Message], None], options: GatewayOptions, traffic: Callable[[], dict[str, Any]]
    ) -> None:
        self._send = send
        self._options = options
        self._traffic = traffic
        self._number = 0
        self._asked: dict[int, asyncio.Future[wire.Answer]] = {}

    def routes(self) -> list[web.RouteDef]:
        model = "/admin/models/{name:.+}"
        return [
            web.get("/admin/status", self.status),
            web.get("/admin/nodes", self.nodes),
            web.post("/admin/nodes/{name}/drain", self._acting("drain")),
            *(web.post(f"{model}/{action}", self._acting(action)) for action in ACTIONS),
            web.put(model, self.deploy),
            web.get(model, self.show),
            web.delete(model, self.delete),
        ]

    def answered(self, message: wire.Answer) -> None:
        asked = self._asked.get(message.id)
        if asked is not None and not asked.done():
            asked.set_result(message)

    async def status(self, _request: web.Request) -> web.Response:
        """What the controller knows, and what this gateway saw of traffic."""
        answer = await self._question("status", "", b"{}")
        status = msgspec.json.decode(answer.body, type=dict[str, msgspec.Raw])
        status["traffic"] = msgspec.Raw(msgspec.json.encode(self._traffic()))
        return _shown(answer.status, msgspec.json.encode(status))

    async def nodes(self, _request: web.Request) -> web.Response:
        return await self._ask("nodes", "", b"{}")

    async def deploy(self, request: web.Request) -> web.Response:
        return await self._ask("deploy", request.match_info["name"], await self._body(request))

    async def show(self, request: web.Request) -> web.Response:
        return await self._ask("show", request.match_info["name"], b"{}")

    async def delete(self, request: web.Request) -> web.Response:
        return await self._ask("delete", request.match_info["name"], b"{}")

    def _acting(self, action: str) -> Callable[[web.Request], asyncio.Future[web.Response]]:
        async def act(request: web.Request) -> web.Response:
            return await self._ask(action, request.match_info["name"], await self._body(request))

        return act  # type: ignore[return-value]  # aiohttp types handlers as awaitables

    async def _body(self, request: web.Request) -> bytes:
        raw = await body.read(request, self._options.idle) or b"{}"
        body.decode(raw)
        return raw

    async def _ask(self, verb: str, name: str, raw: bytes) -> web.Response:
        answer = await self._question(verb, name, raw)
        return _shown(answer.status, answer.body)

    async def _question(self, verb: str, name: str, raw: bytes) -> wire.Answer:
        """
        Raises:
            RequestError: as the controller refuses it, or 503, it does not answer in time.
        """
        self._number += 1
        number = self._number
        asked: asyncio.Future[wire.Answer] = asyncio.get_running_loop().create_future()
        self._asked[number] = asked
        self._send(wire.Ask(number, verb, name, raw))
        try:
            async with asyncio.timeout(self._options.admin_timeout):
                answer = await asked
        except TimeoutError:
            raise RequestError(503, "overloaded", "the controller did not answer in time", retry_after=5.0) from None
        finally:
            del self._asked[number]
        if answer.status >= 400:
            error = msgspec.json.decode(answer.body, type=_Refused).error
            raise RequestError(answer.status, error.code, error.message, error.param, answer.retry_after)
        return answer


def _shown(status: int, body: bytes) -> web.Response:
    return web.Response(status=status, body=body, content_type="application/json")
