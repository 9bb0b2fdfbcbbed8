"""The pool of text processes, and the token tables that the gateway decodes with."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections import OrderedDict, deque
from dataclasses import dataclass
from pathlib import Path

import msgspec

import serverless_llm
from serverless_llm.errors import RequestError
from serverless_llm.gateway.detokenise import TableVocabulary, Vocabulary, WindowVocabulary
from serverless_llm.gateway.text_wire import LENGTH, Call, Fault, Reply, Table, frame, reply_decoder

START_SECONDS = 60.0  # until a text process must be ready; it takes a fraction of one where nothing is wrong
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0  # seconds between two tries to start one
MOST_ENDS = 3  # text processes that a checkpoint may end before it is refused for a while
REFUSED, LONGEST_REFUSED = 10.0, 600.0  # seconds of that, doubled with every further one
FORGOTTEN = 60.0  # seconds without another after which all is forgotten
_log = logging.getLogger("serverless_llm.text")


@dataclass(frozen=True, slots=True)
class TextLimits:
    """Of each text process: seconds per call, bytes of address space, bytes of cached tokenizers; of the gateway:
    bytes of cached token tables."""

    seconds: float = 10.0
    memory: int = 4 << 30
    cache: int = 1 << 30
    tables: int = 256 << 20


@dataclass(frozen=True, slots=True)
class TokenisedPrompt:
    """A prompt (int32, little endian), what decodes its answer, and the checkpoint's own settings.

    `vocabulary_size`: token ids that its model has rows for.
    """

    ids: bytes
    vocabulary: Vocabulary
    defaults: dict[str, float]
    stop_ids: tuple[int, ...]
    vocabulary_size: int


class _Process:
    """One running text process; serves one call at a time."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._calls, self._replies = process, process.stdin, process.stdout

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ready(self) -> None:
        await self._replies.readexactly(LENGTH.size)

    async def call(self, framed: bytes) -> Reply:
        self._calls.write(framed)
        await self._calls.drain()
        (length,) = LENGTH.unpack(await self._replies.readexactly(LENGTH.size))
        return reply_decoder.decode(await self._replies.readexactly(length))

    async def stop(self) -> None:
        """Kill and reap."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()
        self._calls.close()


class _Suspect:
    """A checkpoint that ended text processes: one call at a time, and after some ends none for a while."""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        self._ends = 0
        self._refused_until = self._forgotten_at = 0.0  # loop time

    def ended(self) -> None:
        self._ends += 1
        over = self._ends - MOST_ENDS
        self._refused_until = _now() + (min(REFUSED * 2.0**over, LONGEST_REFUSED) if over >= 0 else 0.0)
        self._forgotten_at = self._refused_until + FORGOTTEN

    @property
    def forgotten(self) -> bool:
        return _now() >= self._forgotten_at and not self.turn.locked()

    def check(self, model: str) -> None:
        """
        Raises:
            RequestError: it is refused now.
        """
        left = self._refused_until - _now()
        if left > 0:
            message = f"model {model!r}: its chat template or tokenizer ended {self._ends} text processes"
            raise RequestError(503, "engine_error", message, retry_after=left)


class TextPool:
    """`size` text processes, each replaced when a call kills it; calls wait for a free one in order of arrival.

    A checkpoint that ended a process has at most one for a minute, and none for longer and longer if it goes on, so
    that it cannot hold up the others: answers in between change nothing.
    """

    def __init__(self, size: int = 2, limits: TextLimits | None = None) -> None:
        self._limits = limits or TextLimits()
        self._size = size
        self._free: deque[_Process] = deque()
        self._all: set[_Process] = set()
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._respawns: set[asyncio.Task[None]] = set()
        self._vocabularies: OrderedDict[tuple[str, str], Vocabulary] = OrderedDict()
        self._suspects: dict[tuple[str, str], _Suspect] = {}
        self._closed = False

    async def start(self) -> None:
        """Spawn the processes and wait until they take calls."""
        await asyncio.gather(*(self._spawn() for _ in range(self._size)))

    async def close(self) -> None:
        """End every process, running calls included."""
        self._closed = True
        for task in self._respawns:
            task.cancel()
        await asyncio.gather(*self._respawns, return_exceptions=True)
        await asyncio.gather(*(process.stop() for process in self._all))

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._all]

    async def prompt(self, call: Call) -> TokenisedPrompt:
        """Render and tokenise.

        Raises:
            RequestError: the checkpoint's files or the messages are at fault, or a limit was overrun, now or before.
        """
        key = (call.directory, call.checkpoint)
        framed = frame(call)  # what cannot be framed costs no process
        if self._suspect(key) is None:
            process = await self._acquire()
            if self._suspect(key) is None:
                return await self._serve(process, key, call, framed)
            self._release(process)  # a call that came before overran meanwhile
        suspect = self._suspects[key]
        async with suspect.turn:
            suspect.check(call.model)
            return await self._serve(await self._acquire(), key, call, framed)

    async def check(self, model: str, directory: str, checkpoint: str) -> None:
        """Load a checkpoint's tokenizer and compile its template, in a text process, for they may be hostile.

        Raises:
            RequestError: 400, they cannot be used; 503, they ended text processes shortly before.
        """
        try:
            await self.prompt(Call(model, directory, checkpoint))
        except RequestError as error:
            if error.status == 503:
                raise
            raise RequestError(400, "invalid_checkpoint", error.message, "source") from error

    def _suspect(self, key: tuple[str, str]) -> _Suspect | None:
        suspect = self._suspects.get(key)
        if suspect is None or not suspect.forgotten:
            return suspect
        del self._suspects[key]
        return None

    async def _serve(self, process: _Process, key: tuple[str, str], call: Call, framed: bytes) -> TokenisedPrompt:
        known = self._vocabularies.get(key)  # not before: of many first calls only those that run send a table
        reply = await self._call(process, call, framed if known else frame(msgspec.structs.replace(call, table=True)))
        if isinstance(reply, Fault):
            raise RequestError(reply.status, reply.code, reply.message, reply.param)
        vocabulary = self._vocabularies.get(key) or known or _vocabulary(reply.table)
        self._remember(key, vocabulary)
        return TokenisedPrompt(reply.ids, vocabulary, reply.defaults, tuple(reply.stop_ids), reply.vocabulary_size)

    def _remember(self, key: tuple[str, str], vocabulary: Vocabulary) -> None:
        self._vocabularies[key] = vocabulary
        self._vocabularies.move_to_end(key)
        while len(self._vocabularies) > 1 and self._cached() > self._limits.tables:
            self._vocabularies.popitem(last=False)

    def _cached(self) -> int:
        return sum(vocabulary.nbytes for vocabulary in self._vocabularies.values())

    async def _call(self, process: _Process, call: Call, framed: bytes) -> Reply:
        """The answer of an acquired process, which is free again or replaced afterwards."""
        try:
            async with asyncio.timeout(self._limits.seconds):
                reply = await process.call(framed)
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
            self._replace(process)
            self._suspects.setdefault((call.directory, call.checkpoint), _Suspect()).ended()
            return self._overrun(call)
        except BaseException:
            self._replace(process)  # cancelled: what it would still answer belongs to nobody
            raise
        self._release(process)
        return reply

    def _overrun(self, call: Call) -> Fault:
        limits = f"{self._limits.seconds:g} s and {self._limits.memory >> 20} MiB"
        message = f"model {call.model!r}: its chat template or tokenizer ended a text process (limits: {limits})"
        return Fault(500, "engine_error", message)

    async def _acquire(self) -> _Process:
        while not self._free:
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                self._wake()  # if it was this waiter's turn, it is now the next one's
                raise
        return self._free.pop()  # the one used last has the warmest cache

    def _release(self, process: _Process) -> None:
        self._free.append(process)
        self._wake()

    def _wake(self) -> None:
        while self._free and self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def _replace(self, process: _Process) -> None:
        if self._closed:
            return
        task = asyncio.get_running_loop().create_task(self._respawn(process))
        self._respawns.add(task)
        task.add_done_callback(self._respawns.discard)

    async def _respawn(self, process: _Process) -> None:
        _log.warning("text process %d is replaced", process.pid)
        await process.stop()
        self._all.discard(process)
        pause = FIRST_PAUSE
        while not await self._spawned():
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _spawned(self) -> bool:
        try:
            await self._spawn()
        except (OSError, EOFError) as error:  # no memory, no descriptors, not ready in time
            _log.warning("a text process did not start, another try follows: %r", error)
            return False
        return True

    async def _spawn(self) -> None:
        """
        Raises:
            OSError: it cannot be started, or is not ready in time.
            EOFError: it ended before it was ready.
        """
        root = str(Path(serverless_llm.__file__).parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        limits = [str(number) for number in (2 * self._limits.seconds, self._limits.memory, self._limits.cache)]
        process = _Process(
            await asyncio.create_subprocess_exec(
                *[sys.executable, "-m", "serverless_llm.gateway.text_process", *limits],
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": path, "RAYON_NUM_THREADS": "1"},
            )
        )
        self._all.add(process)
        try:
            async with asyncio.timeout(START_SECONDS):
                await process.ready()
        except BaseException:
            self._all.discard(process)
            await process.stop()
            raise
        self._release(process)


def _vocabulary(table: Table | None) -> Vocabulary:
    assert table is not None, "asked for"
    if table.decoder:
        return WindowVocabulary(table.blob, table.offsets, table.decoder, table.special)
    return TableVocabulary(table.blob, table.offsets, table.strip, table.special)


def _now() -> float:
    return asyncio.get_running_loop().time()
