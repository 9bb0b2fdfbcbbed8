"""Live requests: the token log, epochs, and what each handler is told.

The frames of the controller and the workers land here, on the loop; handlers sleep in `LiveRequest.news`. A token is
in the log before a client can see it. Frames of an older epoch than a sequence's current one are dropped.
"""

from __future__ import annotations

import asyncio
import logging
import time
from array import array
from collections.abc import Callable, Iterator, Mapping

from serverless_llm import wire
from serverless_llm.domain import WorkClass
from serverless_llm.errors import RequestError
from serverless_llm.gateway import fields
from serverless_llm.gateway.detokenise import Detokeniser, StopStrings
from serverless_llm.gateway.failure import from_rejection, invalid
from serverless_llm.gateway.metrics import Metrics, ServedSeries
from serverless_llm.gateway.openai import CompletionRequest
from serverless_llm.gateway.text import TokenisedPrompt

_log = logging.getLogger("serverless_llm.request")


class LiveRequest:
    """One request from its arrival to its answer. Owned by its handler; frames reach it through `LiveRequests`.

    Attributes:
        log: generated tokens in order, stop ids included.
        epoch: of the attachment whose tokens count; -1 before the first.
        finish: `stop` or `length` once all text is there, else "".
        error: why there is no (more) text.
        told: the controller knows that this sequence is over.
        overrun: called when the client does not read what waits for it.
        opened: loop time of the arrival, for deadlines; uvloop's clock ticks in milliseconds.
        arrived, attached, first, last: monotonic seconds, 0 before it happened; `first`, `last`: of tokens.
        prefill: seconds from the attachment to the first token.
    """

    def __init__(self, sequence: int, request_id: str, info: wire.ModelInfo, request: CompletionRequest) -> None:
        self.sequence = sequence
        self.request_id = request_id
        self.info = info
        self.request = request
        self.created = int(time.time())
        self.opened = asyncio.get_running_loop().time()
        self.arrived = time.monotonic()
        self.attached = self.first = self.last = self.prefill = 0.0
        self.prompt: TokenisedPrompt | None = None
        self.max_tokens = 0
        self.log = array("i")
        self.epoch = -1
        self.restarts = 0
        self.device = ""
        self.queue_ms = 0.0
        self.cold: dict[str, float] = {}
        self.finish = ""
        self.error: RequestError | None = None
        self.told = False
        self.unread_limit = 0
        self.overrun: Callable[[], None] = lambda: None
        self.series: ServedSeries | None = None
        self._unread: list[str] = []
        self._unread_size = 0
        self._detokeniser: Detokeniser | None = None
        self._stops = StopStrings(request.stop)
        self._stop_ids: frozenset[int] = frozenset()
        self._event = asyncio.Event()
        self._deadline: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def done(self) -> bool:
        return bool(self.finish) or self.error is not None

    async def news(self, deadline: float | None) -> None:
        """Sleep until there is a first token, text, an end, or it is `deadline` (loop time).

        Deadlines move on with every token, so one timer follows them at leisure instead of one being armed each time.
        """
        self._deadline = deadline
        if deadline is not None and (self._timer is None or self._timer.when() > deadline):
            self._rearm(deadline)
        await self._event.wait()
        self._event.clear()

    def _rearm(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(at, self._ring)

    def _ring(self) -> None:
        self._timer = None
        if self._deadline is None:
            return
        if asyncio.get_running_loop().time() < self._deadline:
            self._rearm(self._deadline)
        else:
            self._event.set()

    def forget(self) -> None:
        """The handler is through: no timer outlives it."""
        if self._timer is not None:
            self._timer.cancel()

    def take(self) -> str:
        """The text that came since the last call."""
        if not self._unread:
            return ""
        text = "".join(self._unread)
        self._unread.clear()
        self._unread_size = 0
        return text

    def prepare(self, prompt: TokenisedPrompt) -> None:
        """The prompt is tokenised; settle how much may be generated.

        Raises:
            RequestError: 400 context_length_exceeded.
        """
        tokens, context, wanted = len(prompt.ids) // 4, self.info.context, self.request.max_tokens
        if tokens == 0:
            raise invalid("the prompt is empty", "messages" if self.request.chat else "prompt")
        if tokens + (wanted or 1) > context:
            asked = f" and max_tokens asks for {wanted} more" if wanted else ""
            message = f"the context is {context} tokens long; the prompt has {tokens}{asked}"
            raise RequestError(400, "context_length_exceeded", message, "messages" if self.request.chat else "prompt")
        self.max_tokens = wanted or context - tokens
        if self.request.min_tokens > self.max_tokens:
            raise invalid(f"min_tokens must be at most {self.max_tokens}, as max_tokens or the context", "min_tokens")
        if any(token >= prompt.vocabulary_size for token, _ in self.request.logit_bias):
            raise invalid(f"logit_bias: token ids are 0 to {prompt.vocabulary_size - 1}", "logit_bias")
        ends = () if self.request.ignore_eos else prompt.stop_ids
        self._stop_ids = frozenset((*ends, *self.request.stop_token_ids))
        self._detokeniser = prompt.vocabulary.detokeniser()
        self.prompt = prompt

    def run(self, attach: wire.Attach) -> wire.Run:
        """Follow a new owner; the frame that starts or resumes the sequence there."""
        assert self.prompt is not None, "attached before it was prompted"
        if self.epoch < 0:
            self.queue_ms, self.cold = attach.queue_ms, attach.cold
        else:
            self.restarts += 1
        self.epoch, self.device = attach.epoch, attach.device
        self.attached = time.monotonic()
        request = self.request
        sampling = fields.NEUTRAL | self.prompt.defaults | request.sampling
        return wire.Run(
            sequence=self.sequence,
            epoch=attach.epoch,
            replica=attach.replica,
            prompt=self.prompt.ids,
            generated=self.log.tobytes(),
            temperature=sampling["temperature"],
            top_k=max(0, int(sampling["top_k"])),
            top_p=sampling["top_p"],
            seed=request.seed,
            max_tokens=self.max_tokens,
            stop_ids=sorted(self._stop_ids),
            min_p=sampling["min_p"],
            shaping=_shaping(sampling, request),
        )

    def extend(self, tokens: list[int], finish: str) -> None:
        """New tokens of the current epoch, and how the sequence ended at the worker, if it did."""
        assert self._detokeniser is not None, "tokens before the prompt"
        self.log.extend(tokens)
        self.told = bool(finish)
        if finish == "error":
            self.fail(RequestError(500, "engine_error", "the engine failed on this sequence"))
            return
        shown = tokens[:-1] if finish == "stop" and tokens and tokens[-1] in self._stop_ids else tokens
        text = self._stops.feed(self._detokeniser.feed(shown))
        if finish and not self._stops.found:
            text += self._stops.feed(self._detokeniser.finish()) + self._stops.finish()
        self.finish = "stop" if self._stops.found else finish
        self._offer(text)

    def _offer(self, text: str) -> None:
        streams = self.request.stream
        if text:
            self._unread.append(text)
            self._unread_size += len(text)
            if streams and self._unread_size > self.unread_limit:
                self.fail(RequestError(499, "slow_reader", "the client does not read"))
                self.overrun()
        if streams or self.finish or not self.first:
            self._event.set()

    def fail(self, error: RequestError) -> None:
        """End this request without its (remaining) text; the first end counts."""
        if not self.done:
            self.error = error
            self._event.set()


def _shaping(sampling: Mapping[str, float], request: CompletionRequest) -> wire.Shaping | None:
    """None where nothing is asked for, so that the plain path stays as short as it is."""
    presence, frequency = sampling["presence_penalty"], sampling["frequency_penalty"]
    repetition, bias = sampling["repetition_penalty"], list(request.logit_bias)
    if not (presence or frequency or repetition != 1 or bias or request.min_tokens):
        return None
    return wire.Shaping(presence, frequency, repetition, bias, request.min_tokens)


class LiveRequests:
    """All live requests of one gateway, by sequence."""

    def __init__(self, send: Callable[[wire.Message], None], metrics: Metrics, generation: int) -> None:
        self._send = send
        self._metrics = metrics
        self._next = generation << 32
        self._live: dict[int, LiveRequest] = {}

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[LiveRequest]:
        return iter(tuple(self._live.values()))

    def open(self, request_id: str, info: wire.ModelInfo, request: CompletionRequest) -> LiveRequest:
        """A new sequence, announced at once, so that a load begins while its prompt is tokenised."""
        self._next += 1
        live = self._live[self._next] = LiveRequest(self._next, request_id, info, request)
        online = WorkClass.ONLINE.value
        self._send(wire.Arrive(live.sequence, info.name, info.checkpoint, online, request.keep_alive, request_id))
        return live

    def prompted(self, live: LiveRequest, prompt: TokenisedPrompt) -> None:
        """The prompt is there: the sequence can be dispatched, unless it is over already.

        Raises:
            RequestError: see `LiveRequest.prepare`.
        """
        if live.done or live.sequence not in self._live:
            return
        live.prepare(prompt)
        self._send(wire.Prompted(live.sequence, len(prompt.ids) // 4, live.max_tokens))

    def close(self, live: LiveRequest, cause: str) -> None:
        """The handler is through with it; a sequence that may still run is stopped."""
        del self._live[live.sequence]
        live.forget()
        self._stop(live, cause)

    def _stop(self, live: LiveRequest, cause: str) -> None:
        if not live.told:
            live.told = True
            self._send(wire.Gone([live.sequence], cause))

    def _stop_if_done(self, live: LiveRequest) -> None:
        """The gateway itself may find the end: a stop string, or a client that does not read."""
        if live.done:
            self._stop(live, "stop string" if live.finish else "slow reader")

    def attach(self, message: wire.Attach) -> None:
        live = self._live.get(message.sequence)
        if live is None or live.done:
            self._send(wire.Gone([message.sequence], "finished"))
        elif message.epoch > live.epoch:
            self._follow(live, message)

    def _follow(self, live: LiveRequest, message: wire.Attach) -> None:
        try:
            live.series = self._metrics.served(live.info.name, message.device)
            self._send(live.run(message))
        except Exception:  # noqa: BLE001  one request's fault: unanswered, the controller would attach it again for ever
            _log.exception("%s: the sequence could not be attached", live.request_id)
            live.fail(RequestError(500, "engine_error", "the sequence could not be started"))
            self._stop(live, "error")

    def tokens(self, message: wire.Tokens) -> None:
        now = time.monotonic()
        for sequence, epoch, tokens, finish in message.entries:
            live = self._live.get(sequence)
            if live is not None and live.epoch == epoch and not live.done:
                live.extend(tokens, finish)
                self._observe(live, len(tokens), now)
                self._stop_if_done(live)

    def _observe(self, live: LiveRequest, count: int, now: float) -> None:
        assert live.series is not None, "tokens before an attachment"
        if count == 0:
            return
        live.series.generated.inc(count)
        self._metrics.traffic.tokens(count, None if live.first else now - live.arrived, now - live.last, now)
        if live.first:
            live.series.gap.observe(now - live.last)
        else:
            live.first = now
            live.prefill = now - live.attached
            live.series.first_token.observe(now - live.arrived)
        live.last = now

    def reject(self, message: wire.Rejected) -> None:
        live = self._live.get(message.sequence)
        if live is not None and not live.done:
            live.told = True
            live.fail(from_rejection(message))
