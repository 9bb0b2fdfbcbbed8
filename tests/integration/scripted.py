"""A gateway on loopback, its clients, and at the other end of its messages a controller that follows a script."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import msgspec
import openai

from serverless_llm import framing, wire
from serverless_llm.demo import tokenizer
from serverless_llm.gateway.app import Gateway
from serverless_llm.gateway.listen import Runner, listen
from serverless_llm.gateway.options import GatewayOptions
from serverless_llm.gateway.text import TextPool

M = TypeVar("M", bound=wire.Message)
END = tokenizer.END
CONTEXT = 256
COLD = {
    "load_queue_ms": 0.001, "load_remote_ms": 0.004, "load_disk_ms": 0.02, "load_upload_ms": 0.003, "load_ms": 0.028,
}  # fmt: skip
QUICK = GatewayOptions(hold=0.05, commit_after=0.02, heartbeat_every=0.02)


def write_checkpoint(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.write_tokenizer(directory, CONTEXT)
    tokenizer.write_configs(directory, {"vocab_size": tokenizer.VOCABULARY})
    return directory


def model(name: str, source: Path, **changes: Any) -> wire.ModelInfo:
    fields: dict[str, Any] = {
        "name": name, "source": str(source), "checkpoint": "c0", "dtype": "float32", "context": CONTEXT,
        "created": 1700000000, "state": "unloaded", "tier": "disk", "progress": 0.0, "error": "", "devices": [],
        "bytes": 1000, "keep_alive": 300.0, "pinned": False, "until": None, "estimate_s": 7.2, "waiting": 0,
        "running": 0,
    }  # fmt: skip
    return wire.ModelInfo(**(fields | changes))


Behaviour = Callable[["Controller", wire.Message], None]


@dataclass
class Controller:
    """Keeps every message in `sent`; `on` is what it does about each."""

    on: Behaviour
    deliver: Callable[[wire.Message], None] = lambda _message: None
    broken: bool = False  # raises at whatever it is sent
    sent: list[wire.Message] = field(default_factory=list)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def receive(self, message: wire.Message) -> None:
        if self.broken:
            raise RuntimeError("the controller is broken")
        self.sent.append(message)
        self._news.set()
        asyncio.get_running_loop().call_soon(self.on, self, message)

    def all(self, kind: type[M]) -> list[M]:
        return [message for message in self.sent if isinstance(message, kind)]

    async def saw(self, kind: type[M], count: int = 1) -> M:
        """The `count`th message of a kind, as soon as it is there."""
        async with asyncio.timeout(10):
            while len(self.all(kind)) < count:
                self._news.clear()
                await self._news.wait()
        return self.all(kind)[count - 1]

    def attach(self, sequence: int, epoch: int = 0, **changes: Any) -> None:
        fields: dict[str, Any] = {
            "replica": 7, "destination": framing.worker_address(0, 0), "device": "n0/0", "queue_ms": 12.5, "cold": {},
        }  # fmt: skip
        self.deliver(wire.Attach(sequence=sequence, epoch=epoch, **(fields | changes)))

    def tokens(self, sequence: int, tokens: list[int], finish: str = "", epoch: int = 0) -> None:
        self.deliver(wire.Tokens([(sequence, epoch, tokens, finish)]))

    def reject(self, sequence: int, status: int, code: str, retry_after: float | None = None) -> None:
        self.deliver(wire.Rejected(sequence, status, code, "because", retry_after, retry_after is not None))


def says(text: str, finish: str = "stop", cold: dict[str, float] | None = None) -> Behaviour:
    """Answers every request with `text`, one byte a step."""
    ids = [*text.encode(), END] if finish == "stop" else [*text.encode()]

    def on(controller: Controller, message: wire.Message) -> None:
        if isinstance(message, wire.Prompted):
            controller.attach(message.sequence, cold=cold or {})
        if isinstance(message, wire.Run):
            for token in ids[:-1]:
                controller.tokens(message.sequence, [token], epoch=message.epoch)
            controller.tokens(message.sequence, ids[-1:], finish, epoch=message.epoch)

    return on


def attaches(controller: Controller, message: wire.Message) -> None:
    """Dispatches every sequence; the test sends the tokens."""
    if isinstance(message, wire.Prompted):
        controller.attach(message.sequence)


def begins(controller: Controller, message: wire.Message) -> None:
    """Dispatches every sequence and sends an "A"; the test sends the rest."""
    attaches(controller, message)
    if isinstance(message, wire.Run):
        controller.tokens(message.sequence, [65], epoch=message.epoch)


def silent(_controller: Controller, _message: wire.Message) -> None:
    """As while a load takes long."""


@dataclass
class Served:
    gateway: Gateway
    controller: Controller
    text: TextPool
    url: str
    http: aiohttp.ClientSession

    def chat(self, **changes: Any) -> Any:
        body = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}
        return self.http.post("/v1/chat/completions", json=body | changes)


@asynccontextmanager
async def served(
    tmp_path: Path, on: Behaviour, options: GatewayOptions | None = None, text: TextPool | None = None
) -> AsyncIterator[Served]:
    """A gateway with the models `demo` and `team/demo-2`, listening on a free port."""
    source = write_checkpoint(tmp_path / "demo")
    controller = Controller(on)
    text = text or TextPool(1)
    await text.start()
    gateway = Gateway(controller.receive, text, generation=3, options=options)
    controller.deliver = gateway.receive
    gateway.receive(wire.Catalog([model("demo", source), model("team/demo-2", source)], True))
    options = options or GatewayOptions()
    runner = Runner(gateway.application(), options)
    await runner.setup()
    url = f"http://127.0.0.1:{await listen(runner, '127.0.0.1', 0, options)}"
    try:
        async with aiohttp.ClientSession(url) as http:
            yield Served(gateway, controller, text, url, http)
    finally:
        await runner.cleanup()
        await text.close()


def decoded(run: wire.Run) -> tuple[list[int], list[int]]:
    """Prompt and generated tokens of a `Run`."""
    return array("i", run.prompt).tolist(), array("i", run.generated).tolist()


# --- clients ---


def run(
    tmp_path: Path,
    on: Behaviour,
    scenario: Callable[[Served], Awaitable[None]],
    options: GatewayOptions | None = None,
    loop: Callable[[Coroutine[Any, Any, None]], None] = asyncio.run,
) -> None:
    """One scenario against one server; nothing may stay open in it. `loop`: runs it."""

    async def main() -> None:
        async with served(tmp_path, on, options) as server, asyncio.timeout(45):
            await scenario(server)
            server.gateway.drain()
            await server.gateway.idle()

    loop(main())


def client(server: Served) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[Any]:
    """Decoded data events as they come; `[DONE]` and comments as text."""
    async for line in response.content:
        if line.startswith(b"data: {"):
            yield msgspec.json.decode(line[6:])
        elif line.strip():
            yield line.strip().decode()


async def error_of(response: aiohttp.ClientResponse) -> dict[str, Any]:
    body = msgspec.json.decode(await response.read())
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    assert response.content_type == "application/json"
    error: dict[str, Any] = body["error"]
    return error


async def collect(ai: openai.AsyncOpenAI, stream: bool, **options: Any) -> tuple[str, str | None]:
    """Text and finish reason of one chat, streaming or not."""
    ask: Any = ai.chat.completions.create
    answer = await ask(model="demo", messages=[{"role": "user", "content": "Hi"}], stream=stream, **options)
    if not stream:
        return answer.choices[0].message.content, answer.choices[0].finish_reason
    choices = [chunk.choices[0] async for chunk in answer]
    return "".join(choice.delta.content or "" for choice in choices), choices[-1].finish_reason
