"""A real server with the bundled models, and pages in a real browser that must stay clean."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect

from serverless_llm.demo import tasks
from tests.browser import chromium
from tests.serving import Server

SMALL = ("--devices", "cpu:2", "--device-memory", "16MiB", "--dram", "64MiB")
DEMOS = ("--model", "demo-add", "--model", "demo-count", "--model", "demo-reverse")
SLOW_DISK = ("--limit", "disk=3MB/s")  # so that a load lasts about a second

expect.set_options(timeout=15_000)


@dataclass
class Watch:
    """What a page did that it must not do."""

    host: str
    expected: str  # of what Chromium notes on the console: a refusal that the test is about
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def follow(self, page: Page) -> None:
        page.on("console", lambda told: self._console(told.type, told.text))
        page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        page.on("request", lambda request: self._request(request.url))

    def _console(self, kind: str, text: str) -> None:
        if kind in ("error", "warning") and self.expected not in text:
            self.complaints.append(f"console {kind}: {text}")

    def _request(self, url: str) -> None:
        self.requests.append(url)
        if urlsplit(url).netloc != self.host:
            self.complaints.append(f"request to {url}")

    def count(self, path: str) -> int:
        return sum(urlsplit(url).path == path for url in self.requests)


@pytest.fixture(scope="session")
def chrome() -> Iterator[Browser]:
    if chromium.found() is None:
        pytest.fail("no Chromium: apt-get install chromium, or name one with CHROMIUM=...")
    with chromium.browser() as opened:
        yield opened


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("dashboard"), *SMALL, *DEMOS, *SLOW_DISK) as serving:
        yield serving


OpenPage = Callable[..., tuple[Page, Watch]]


@pytest.fixture
def opened(chrome: Browser) -> Iterator[OpenPage]:
    """Opens the dashboard of a server; at the end no page may have complained, or asked another host."""
    watches: list[Watch] = []
    contexts = []

    def open_page(
        server: Server, before: Callable[[Page], None] | None = None, expected: str = "nothing", **options: Any
    ) -> tuple[Page, Watch]:
        context = chrome.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        contexts.append(context)
        page = context.new_page()
        watch = Watch(urlsplit(server.url).netloc, expected)
        watches.append(watch)
        watch.follow(page)
        if before:
            before(page)
        page.goto(server.url)
        return page, watch

    yield open_page
    for context in contexts:
        context.close()
    assert [complaint for watch in watches for complaint in watch.complaints] == []


@pytest.fixture
def page(opened: OpenPage, server: Server) -> Page:
    """The dashboard, with everything there."""
    shown, _ = opened(server)
    expect(shown.locator("#models-table tbody tr")).not_to_have_count(0)
    return shown


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of a bundled checkpoint that a test may spoil."""
    return Path(shutil.copytree(tasks.checkpoint_dir("demo-add"), tmp_path / "copy"))
