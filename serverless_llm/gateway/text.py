"""The pool of text processes, and the token tables that the gateway decodes with."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

import serverless_llm
from serverless_llm.errors import RequestError
from serverless_llm.gateway.detokenise import TableVocabulary, Vocabulary, WindowVocabulary
from serverless_llm.gateway.text_wire import LENGTH, Call, Fault, Reply, Table, frame, reply_decoder

START_SECONDS = 60.0  # until a text process must be ready; it takes a fraction of one where nothing is wrong
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0  # seconds between two tries to start one
REAP_SECONDS = 2.0  # for a killed one to be gone; one that reads from a dead mount goes when the mount answers
MOST_ENDS = 3  # text processes that a checkpoint may end before it is refused for a while
REFUSED, LONGEST_REFUSED = 10.0, 600.0  # seconds of that, doubled with every further one
LARGE = 1 << 20  # bytes of a call that takes long where nothing is wrong with the checkpoint; arbitrary
MOST_LARGE = 16  # of these that run or wait; each holds its prompt, and whoever comes then waits for all of them
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

    `vocabulary_size`: token ids that its model has rows for. `chats`: there is a chat template. `text`: what it says,
    where that is asked for.
    """

    ids: bytes
    vocabulary: Vocabulary
    defaults: dict[str, float]
    stop_ids: tuple[int, ...]
    vocabulary_size: int
    chats: bool = True
    text: str = ""


class _Process:
    """One running text process; serves one call at a time."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._calls, self._replies = process, process.stdin, process.stdout

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def gone(self) -> bool:
        """Whether it has ended, as far as this process was told."""
        return self._process.returncode is not None

    async def ready(self) -> None:
        await self._replies.readexactly(LENGTH.size)

    async def call(self, framed: bytes) -> Reply:
        self._calls.write(framed)
        await self._calls.drain()
        (length,) = LENGTH.unpack(await self._replies.readexactly(LENGTH.size))
        return reply_decoder.decode(await self._replies.readexactly(length))

    async def stop(self) -> None:
        """Kill, and reap unless that takes too long."""
        if not self.gone:
            self._process.kill()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REAP_SECONDS):
                await self.reaped()
        self._calls.close()

    async def reaped(self) -> None:
        await self._process.wait()

    async def killed(self) -> bool:
        """Whether somebody else did it, as the kernel does where memory is short; of one that no longer answers."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REAP_SECONDS):
                await self.reaped()
        return self._process.returncode == -signal.SIGKILL


class _Suspect:
    """A checkpoint that ended text processes: after some ends it has no call for a while.

    `stuck`: of these processes those that do not go; while there is one, there is no call.
    """

    def __init__(self) -> None:
        self.stuck = 0
        self._ends = 0
        self._refused_until = self._forgotten_at = 0.0  # loop time

    def ended(self) -> None:
        self._ends += 1
        over = self._ends - MOST_ENDS
        self._refused_until = _now() + (min(REFUSED * 2.0**over, LONGEST_REFUSED) if over >= 0 else 0.0)
        self._forgotten_at = self._refused_until + FORGOTTEN

    @property
    def forgotten(self) -> bool:
        return _now() >= self._forgotten_at and not self.stuck

    def check(self, model: str) -> None:
        """
        Raises:
            RequestError: it is refused now.
        """
        if self.stuck:
            message = f"model {model!r}: the disk that its text files are on does not answer"
            raise RequestError(503, "overloaded", message, retry_after=REFUSED)
        left = self._refused_until - _now()
        if left > 0:
            message = f"model {model!r}: its chat template or tokenizer ended {self._ends} text processes"
            raise RequestError(503, "overloaded", message, retry_after=left)


class TextPool:
    """`size` text processes, each replaced when a call kills it; calls wait for a free one in order of arrival.

    All checkpoints that ended a process within a minute have at most one together, and one that goes on has none for
    longer and longer, so that they cannot hold up the others: answers in between change nothing. Large calls have one
    together with these, and are charged to nobody: they are their callers'. A few of them wait, no more.
    """

    def __init__(self, size: int = 2, limits: TextLimits | None = None) -> None:
        self._limits = limits or TextLimits()
        self._size = size
        self._free: deque[_Process] = deque()
        self._all: set[_Process] = set()
        self._waiting: deque[asyncio.Future[_Process]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._begun_in_vain: set[asyncio.Future[asyncio.subprocess.Process]] = set()
        self._vocabularies: OrderedDict[tuple[str, str], Vocabulary] = OrderedDict()
        self._suspects: dict[tuple[str, str], _Suspect] = {}
        self._turn = asyncio.Lock()  # of the suspects
        self._large = 0  # calls that run or wait
        self._closed = False

    async def start(self) -> None:
        """Spawn the processes and wait until they take calls."""
        await asyncio.gather(*(self._beside(self._spawn()) for _ in range(self._size)))

    async def close(self) -> None:
        """End every process, running calls included."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        begun = await asyncio.gather(*self._begun_in_vain, return_exceptions=True)
        vain = [_Process(one) for one in begun if not isinstance(one, BaseException)]
        await asyncio.gather(*(process.stop() for process in (*self._all, *vain)))

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._all]

    async def prompt(self, call: Call, wanted: Callable[[], bool] = lambda: True) -> TokenisedPrompt:
        """Render and tokenise; `wanted` is asked again where the call waited for its turn.

        Raises:
            RequestError: the checkpoint's files or the messages are at fault, a limit was overrun, now or before, too
                many large calls wait, or nobody wants this one any longer.
        """
        key = (call.directory, call.checkpoint)
        framed = frame(call)  # what cannot be framed costs no process
        if self._suspect(key) is None and len(framed) <= LARGE:
            process = await self._acquire()
            if self._suspect(key) is None:
                return await self._serve(process, key, call, framed)
            self._release(process)  # a call that came before overran meanwhile
        large = len(framed) > LARGE
        if large and self._large >= MOST_LARGE:
            message = f"{self._large} prompts of more than {LARGE} bytes wait already"
            raise RequestError(503, "overloaded", message, retry_after=self._limits.seconds)
        self._large += large
        try:
            async with self._turn:
                return await self._in_turn(key, call, framed, wanted)
        finally:
            self._large -= large

    async def _in_turn(
        self, key: tuple[str, str], call: Call, framed: bytes, wanted: Callable[[], bool]
    ) -> TokenisedPrompt:
        if not wanted():
            raise RequestError(499, "client_gone", "nobody reads this")
        suspect = self._suspect(key)
        if suspect is not None:
            suspect.check(call.model)
        return await self._serve(await self._acquire(), key, call, framed)

    async def check(self, model: str, directory: str, checkpoint: str) -> bool:
        """Load a checkpoint's tokenizer and compile its template, in a text process, for they may be hostile.

        Whether it has a template, without which it cannot chat.

        Raises:
            RequestError: 400, they cannot be used; 503, they ended text processes shortly before.
        """
        try:
            return (await self.prompt(Call(model, directory, checkpoint))).chats
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
        text = (call.text or reply.text) if call.echo else ""
        stop_ids, size = tuple(reply.stop_ids), reply.vocabulary_size
        return TokenisedPrompt(reply.ids, vocabulary, reply.defaults, stop_ids, size, reply.chats, text)

    def _remember(self, key: tuple[str, str], vocabulary: Vocabulary) -> None:
        self._vocabularies[key] = vocabulary
        self._vocabularies.move_to_end(key)
        while len(self._vocabularies) > 1 and self._cached() > self._limits.tables:
            self._vocabularies.popitem(last=False)

    def _cached(self) -> int:
        return sum(vocabulary.nbytes for vocabulary in self._vocabularies.values())

    async def _call(self, process: _Process, call: Call, framed: bytes) -> Reply:
        """The answer of an acquired process, which is free again or replaced afterwards.

        Before a large call it reads the checkpoint, in a time of its own: what fails then is not the prompt's fault.
        """
        large, read = len(framed) > LARGE, False
        try:
            if large:
                async with asyncio.timeout(self._limits.seconds):
                    await process.call(frame(Call(call.model, call.directory, call.checkpoint)))
                read = True
            async with asyncio.timeout(self._limits.seconds):
                reply = await process.call(framed)
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError) as error:
            late = isinstance(error, TimeoutError)
            raise await self._overrun(process, call, len(framed) if read else 0, late) from error
        except BaseException:
            self._replace(process)  # cancelled: what it would still answer belongs to nobody
            raise
        self._release(process)
        return reply

    async def _overrun(self, process: _Process, call: Call, size: int, late: bool) -> RequestError:
        """Replaces the process. `size`: of a large call whose checkpoint it had read, 0 of others."""
        key, killed = (call.directory, call.checkpoint), False
        try:
            killed = bool(size) and not late and await process.killed()
        finally:
            self._replace(process, key)
        limits = f"{self._limits.seconds:g} s and {self._limits.memory >> 20} MiB"
        if not size:
            self._suspects.setdefault(key, _Suspect()).ended()
            message = f"model {call.model!r}: its chat template or tokenizer ended a text process (limits: {limits})"
            return RequestError(500, "engine_error", message)
        if killed:
            message = f"model {call.model!r}: the text process was killed beside the prompt; memory may be short"
            return RequestError(503, "overloaded", message, retry_after=REFUSED)
        message = f"model {call.model!r}: a prompt of {size} bytes ended a text process (limits: {limits})"
        param = "prompt" if call.messages is None else "messages"
        return RequestError(400, "invalid_request_error", message, param)

    async def _acquire(self) -> _Process:
        while self._free:
            process = self._free.pop()  # the one used last has the warmest cache
            if not process.gone:
                return process
            self._replace(process)  # ended while it had nothing to do, which is no checkpoint's fault
        waiter: asyncio.Future[_Process] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self._release(waiter.result())
            raise

    def _release(self, process: _Process) -> None:
        """To the one who waits longest: a caller that asks again at once comes after all who wait."""
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(process)
                return
        self._free.append(process)

    def _replace(self, process: _Process, key: tuple[str, str] | None = None) -> None:
        if not self._closed:
            self._beside(self._respawn(process, key))

    def _beside(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Begins what `close` cancels and waits for."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _respawn(self, process: _Process, key: tuple[str, str] | None) -> None:
        _log.warning("text process %d is replaced", process.pid)
        await process.stop()
        self._all.discard(process)
        if not process.gone:
            suspect = self._suspects.setdefault(key, _Suspect()) if key else _Suspect()
            self._beside(self._await_end(process, suspect))
        pause = FIRST_PAUSE
        while not await self._spawned():
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _await_end(self, process: _Process, suspect: _Suspect) -> None:
        _log.error("text process %d was killed and does not end: what it reads from does not answer", process.pid)
        suspect.stuck += 1
        await process.reaped()
        suspect.stuck -= 1

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
        process = await self._begun()
        self._all.add(process)
        try:
            async with asyncio.timeout(START_SECONDS):
                await process.ready()
        except BaseException:
            await process.stop()
            self._all.discard(process)
            raise
        self._release(process)

    async def _begun(self) -> _Process:
        """One that may not be ready. Half begun it cannot be ended: who is cancelled meanwhile leaves that to `close`.

        Raises:
            OSError: it cannot be started.
        """
        root = str(Path(serverless_llm.__file__).parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        limits = [str(number) for number in (2 * self._limits.seconds, self._limits.memory, self._limits.cache)]
        beginning = asyncio.ensure_future(
            asyncio.create_subprocess_exec(
                *[sys.executable, "-m", "serverless_llm.gateway.text_process", *limits],
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for the head, which then stops this one
                env=os.environ | {"PYTHONPATH": path, "RAYON_NUM_THREADS": "1"},
            )
        )
        try:
            return _Process(await asyncio.shield(beginning))
        except asyncio.CancelledError:
            self._begun_in_vain.add(beginning)
            raise


def _vocabulary(table: Table | None) -> Vocabulary:
    assert table is not None, "asked for"
    if table.decoder:
        return WindowVocabulary(table.blob, table.offsets, table.decoder, table.special)
    return TableVocabulary(table.blob, table.offsets, table.strip, table.special)


def _now() -> float:
    return asyncio.get_running_loop().time()
