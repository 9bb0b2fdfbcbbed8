"""A text process: renders chat templates and tokenises prompts, one call at a time, within limits.

Templates and tokenizers come from checkpoints and are not trusted: a call that overruns its time kills this process
by its own alarm (no Python code need run for that), one that overruns its memory fails; the pool starts another.
`python -m serverless_llm.gateway.text_process SECONDS BYTES CACHE_BYTES` serves calls from standard input until
it ends.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO

from serverless_llm.errors import RequestError
from serverless_llm.gateway.templates import CheckpointText
from serverless_llm.gateway.text_wire import LENGTH, Call, Fault, Reply, call_decoder, frame

MAX_MESSAGE = 2000  # characters of an error


class TextCache:
    """Least recently used checkpoints leave when all together are over `limit` bytes; the newest one always stays."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._texts: OrderedDict[tuple[str, str], CheckpointText] = OrderedDict()

    def get(self, directory: str, checkpoint: str) -> CheckpointText:
        key = (directory, checkpoint)
        found = self._texts.get(key) or CheckpointText(Path(directory))
        self._texts[key] = found
        self._texts.move_to_end(key)
        while len(self._texts) > 1 and sum(text.nbytes for text in self._texts.values()) > self._limit:
            self._texts.popitem(last=False)
        return found


def answer(call: Call, cache: TextCache) -> Reply:
    """The prompt, or why there is none; nothing that a checkpoint's files do wrong escapes."""
    try:
        return cache.get(call.directory, call.checkpoint).prompt(call)
    except RequestError as error:
        return _fault(call, error)
    except MemoryError:
        return _fault(call, RequestError(500, "engine_error", "its chat template or tokenizer ran out of memory"))
    except Exception as error:  # noqa: BLE001  the process's edge; tokenizers raises bare Exception
        return _fault(call, RequestError(500, "engine_error", f"its text files cannot be used: {error}"))


def _fault(call: Call, error: RequestError) -> Fault:
    """Its message may be a template's: of any length, and with surrogates that no frame takes."""
    message = f"model {call.model!r}: {error.message[:MAX_MESSAGE]}".encode(errors="replace").decode()
    return Fault(error.status, error.code, message, error.param)


def serve(calls: BinaryIO, replies: BinaryIO, seconds: float, cache: TextCache) -> None:
    while len(head := calls.read(LENGTH.size)) == LENGTH.size:
        body = calls.read(LENGTH.unpack(head)[0])
        signal.setitimer(signal.ITIMER_REAL, seconds)
        out = frame(answer(call_decoder.decode(body), cache))
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(out)
        replies.flush()


def main(arguments: list[str]) -> None:
    seconds, memory, cache = float(arguments[0]), int(arguments[1]), int(arguments[2])
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.stdout.buffer.write(LENGTH.pack(0))  # ready
    sys.stdout.buffer.flush()
    serve(sys.stdin.buffer, sys.stdout.buffer, seconds, TextCache(cache))


if __name__ == "__main__":
    main(sys.argv[1:])
