"""`make screenshots`: the dashboard in light and dark, as docs/dashboard.md shows it, of a real server with some load.

The pictures go to docs/images/. Needs Chromium and what the development environment has.
"""

from __future__ import annotations

import base64
import struct
import sys
import tempfile
import threading
import zlib
from pathlib import Path

import numpy as np
from playwright.sync_api import Browser, Page, expect

from tests.browser import chromium
from tests.serving import Server

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "images"
MOST = 150 * 1000  # bytes of a picture
OPTIONS = ("--devices", "cpu:2", "--device-memory", "7MB", "--dram", "64MB", "--limit", "disk=2MB/s")
MODELS = ("--model", "demo-add", "--model", "demo-count", "--model", "demo-reverse", "--model", "team/add=demo-add")
PROMPTS = {"demo-add": "12+13=", "demo-count": "41 42 43", "demo-reverse": "stressed", "team/add": "1+1="}
SECONDS = 30  # of load before the pictures, so that the charts have something to show


def load(server: Server, stop: threading.Event, turn: int) -> None:
    """Asks one model after another, so that they evict each other now and then."""
    while not stop.is_set():
        model = list(PROMPTS)[(turn // 8) % len(PROMPTS)]
        body = {"model": model, "prompt": PROMPTS[model], "max_tokens": 150, "ignore_eos": True}
        server.put("/v1/completions", body, "POST")
        turn += 1
        stop.wait(0.1)


PIXELS = """async (png) => {
  const bytes = Uint8Array.from(atob(png), (one) => one.charCodeAt(0));
  const picture = await createImageBitmap(new Blob([bytes]));
  const canvas = new OffscreenCanvas(picture.width, picture.height);
  const context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0);
  const { data, width, height } = context.getImageData(0, 0, picture.width, picture.height);
  let text = "";
  for (let at = 0; at < data.length; at += 32768) text += String.fromCharCode(...data.subarray(at, at + 32768));
  return [btoa(text), width, height];
}"""


def squeezed(browser: Browser, png: bytes) -> bytes:
    """The same picture in its 256 most frequent colours, which is a quarter of the bytes; others become the nearest."""
    blank = browser.new_page()
    text, width, height = blank.evaluate(PIXELS, base64.b64encode(png).decode())
    blank.close()
    pixels = np.frombuffer(base64.b64decode(text), np.uint8).reshape(-1, 4)[:, :3]
    colours, which, counts = np.unique(pixels, axis=0, return_inverse=True, return_counts=True)
    palette = colours[np.argsort(-counts)[:256]]
    nearest = np.abs(colours[:, None, :].astype(int) - palette[None]).sum(axis=2).argmin(axis=1).astype(np.uint8)
    rows = np.zeros((height, 1 + width), np.uint8)  # each begins with its filter: none
    rows[:, 1:] = nearest[which].reshape(height, width)
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    parts = [
        (b"IHDR", header),
        (b"PLTE", palette.tobytes()),
        (b"IDAT", zlib.compress(rows.tobytes(), 9)),
        (b"IEND", b""),
    ]
    return png[:8] + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    )


def take(browser: Browser, page: Page, url: str, scheme: str) -> Path:
    path = FOLDER / f"dashboard-{scheme}.png"
    page.goto(url)
    expect(page.locator("#link")).to_have_text("connected")
    expect(page.locator("#starts-table tbody tr")).not_to_have_count(0)
    expect(page.locator("#events-list li")).not_to_have_count(0)
    path.write_bytes(squeezed(browser, page.screenshot(full_page=True, animations="disabled")))
    return path


def main() -> int:
    FOLDER.mkdir(parents=True, exist_ok=True)
    stop = threading.Event()
    with tempfile.TemporaryDirectory() as state, Server(Path(state), *OPTIONS, *MODELS) as server:
        asking = [threading.Thread(target=load, args=(server, stop, turn)) for turn in (0, 5, 21)]
        for one in asking:
            one.start()
        try:
            stop.wait(SECONDS)
            with chromium.browser() as browser:
                sizes = {}
                for scheme in ("light", "dark"):
                    page = browser.new_page(
                        color_scheme="light" if scheme == "light" else "dark", viewport={"width": 1280, "height": 800}
                    )
                    path = take(browser, page, server.url, scheme)
                    sizes[path] = path.stat().st_size
        finally:
            stop.set()
            for one in asking:
                one.join()
    for path, size in sizes.items():
        print(f"{path}: {size} bytes")
    return 1 if max(sizes.values()) > MOST else 0


if __name__ == "__main__":
    sys.exit(main())
