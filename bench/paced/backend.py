"""An upstream for proxies: OpenAI's chat route with made-up text, the first token at once, then BENCH_PACE a second."""

from __future__ import annotations

import asyncio
import json
import os
import sys

import uvloop
from aiohttp import web

PERIOD = 1 / float(os.environ["BENCH_PACE"])
BASE = {"id": "chatcmpl-0", "object": "chat.completion.chunk", "created": 0, "model": "paced"}


def event(delta: dict[str, str], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return b"data: " + json.dumps(BASE | {"choices": [choice]}).encode() + b"\n\n"


FIRST, TOKEN, LAST = event({"role": "assistant", "content": "word "}), event({"content": "word "}), event({}, "length")
DONE = b"data: [DONE]\n\n"


async def chat(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    tokens = body["max_tokens"]
    if not body.get("stream"):
        return web.json_response(whole(tokens))
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    await response.write(FIRST)
    for _ in range(tokens - 1):
        await asyncio.sleep(PERIOD)
        await response.write(TOKEN)
    await response.write(LAST + DONE)
    return response


def whole(tokens: int) -> dict[str, object]:
    message = {"role": "assistant", "content": "word " * tokens}
    usage = {"prompt_tokens": 100, "completion_tokens": tokens, "total_tokens": 100 + tokens}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}
    return BASE | {"object": "chat.completion", "choices": [choice], "usage": usage}


def main() -> None:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
    uvloop.install()
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None, access_log=None)


if __name__ == "__main__":
    main()
