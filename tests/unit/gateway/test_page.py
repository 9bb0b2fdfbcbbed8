"""The dashboard's files: types, caching, policy, and that nothing in them points elsewhere."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from serverless_llm.errors import RequestError
from serverless_llm.gateway import page
from serverless_llm.gateway.access import Access
from serverless_llm.gateway.keys import full
from serverless_llm.gateway.options import GatewayOptions

OWN = sorted(name for name in page.files() if not name.startswith("vendor/"))


def served(tell: Callable[[aiohttp.ClientSession], Awaitable[None]], *keys: str) -> None:
    access = Access(GatewayOptions(keys=tuple(map(full, keys))))

    @web.middleware
    async def guard(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        try:
            access.check(request)
        except RequestError as error:
            return web.Response(status=error.status)
        return await handler(request)

    async def main() -> None:
        app = web.Application(middlewares=[guard])
        app.add_routes(page.routes())
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            async with aiohttp.ClientSession(f"http://127.0.0.1:{runner.addresses[0][1]}") as http:
                await tell(http)
        finally:
            await runner.cleanup()

    asyncio.run(main())


def test_the_page_comes_without_a_key_under_a_strict_policy() -> None:
    async def tell(http: aiohttp.ClientSession) -> None:
        async with http.get("/") as response:
            assert (response.status, response.content_type, response.charset) == (200, "text/html", "utf-8")
            policy = response.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert response.headers["X-Content-Type-Options"] == "nosniff"
        for name, kind in (("main.js", "text/javascript"), ("style.css", "text/css"), ("icon.svg", "image/svg+xml")):
            async with http.get(f"/dashboard/{name}") as response:
                assert (response.status, response.content_type) == (200, kind)

    served(tell, "a-key")


def test_without_keys_a_foreign_host_is_refused() -> None:
    async def tell(http: aiohttp.ClientSession) -> None:
        async with http.get("/", headers={"Host": "evil.example"}) as response:
            assert response.status == 403

    served(tell)


def test_an_unchanged_file_is_not_sent_again() -> None:
    async def tell(http: aiohttp.ClientSession) -> None:
        async with http.get("/") as first:
            tag = first.headers["ETag"]
            assert first.headers["Cache-Control"] == "no-cache"
        async with http.get("/", headers={"If-None-Match": tag}) as again:
            assert (again.status, again.headers["ETag"], await again.read()) == (304, tag, b"")
        async with http.get("/", headers={"If-None-Match": '"other"'}) as changed:
            assert changed.status == 200

    served(tell)


@pytest.mark.parametrize("path", ["nothing.js", "../page.py", "%2e%2e/page.py", "..%2fpage.py", "vendor", "main.js/"])
def test_nothing_but_the_files(path: str) -> None:
    async def tell(http: aiohttp.ClientSession) -> None:
        async with http.get(URL(f"/dashboard/{path}", encoded=True)) as response:
            assert response.status == 404

    served(tell)


@pytest.mark.parametrize("name", OWN)
def test_our_files_name_no_other_host_and_stay_short(name: str) -> None:
    text = page.files()[name].body.decode()
    hosts = set(re.findall(r"https?://[^\s\"'`<>)]+", text)) - {"http://www.w3.org/2000/svg"}
    assert hosts == set()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|\son\w+=\"|style=\"", text)
    assert text.count("\n") <= 400


def test_vendored_code_keeps_its_licence_and_version() -> None:
    files = page.files()
    assert b"Permission is hereby granted" in files["vendor/uPlot-LICENSE.txt"].body
    (version,) = re.findall(rb"uPlot \(v([\d.]+)\)", files["vendor/uPlot.esm.js"].body)
    assert version in files["vendor/README.md"].body
