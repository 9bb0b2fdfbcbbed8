"""A live request and its choices: each choice is one sequence, with a token log of its own.

A request has several choices where it asks for `n` or gives several prompts: choice `prompt * n + i` is number i of a
prompt. They share the handler that sleeps in `LiveRequest.news`, and end together where one of them fails.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from serverless_llm import wire
from serverless_llm.domain import FinishReason
from serverless_llm.errors import RequestError
from serverless_llm.gateway import fields
from serverless_llm.gateway.detokenise import NEIGHBOURS, Detokeniser, StopStrings
from serverless_llm.gateway.failure import invalid
from serverless_llm.gateway.logprobs import Scored, Scores
from serverless_llm.gateway.metrics import ServedSeries
from serverless_llm.gateway.openai import CompletionRequest
from serverless_llm.gateway.text import TokenisedPrompt

NOT_FINITE = (
    "the model's logits are NaN or infinite, so that there is no next token: its weights are damaged, or its numbers "
    "overflow in its dtype; check the checkpoint, or deploy it with dtype float32"
)
GOLDEN = 0x9E3779B97F4A7C15  # between the seeds of two choices, as between the states of SplitMix64


class LiveRequest:
    """One request from its arrival to its answer. Owned by its handler; frames reach its choices by `LiveRequests`.

    Attributes:
        sequence: of the first choice.
        choices: by their index; none once it is forgotten.
        unfinished: choices whose text is not all there.
        error: why there is no (more) text; the first one counts. None once it is forgotten.
        overrun: called when the client does not read what waits for it.
        flush: called where there is more text for a stream; wakes the handler, until that knows something quicker.
        deadline: loop time at which `news` is over at the latest; it may be put off meanwhile.
        opened: loop time of the arrival, for deadlines; uvloop's clock ticks in milliseconds.
        arrived: monotonic seconds.
        unread: characters that wait for the client, of all choices.
    """

    def __init__(self, request_id: str, info: wire.ModelInfo, request: CompletionRequest, first: int) -> None:
        """`first`: sequence of the first choice; those of the others follow it."""
        self.request_id = request_id
        self.info = info
        self.request = request
        self.created = int(time.time())
        self.opened = asyncio.get_running_loop().time()
        self.arrived = time.monotonic()
        self.error: RequestError | None = None
        self.unread = self.unread_limit = 0
        self.overrun: Callable[[], None] = _nothing
        self.flush: Callable[[], None] = self.wake
        self.deadline: float | None = None
        self._event = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self.unfinished = request.choices
        self.sequence = first
        self.choices = tuple(Choice(self, first + index, index) for index in range(self.unfinished))

    @property
    def done(self) -> bool:
        return not self.unfinished or self.error is not None

    @property
    def lead(self) -> Choice:
        """The choice that was quickest so far."""
        begun = [choice for choice in self.choices if choice.first]
        if begun:
            return min(begun, key=lambda choice: choice.first)
        return next((choice for choice in self.choices if choice.attached), self.choices[0])

    @property
    def begun(self) -> bool:
        """Whether there is a token."""
        return any(choice.first for choice in self.choices)

    @property
    def prompt_tokens(self) -> int:
        """Each prompt counts once."""
        prompts = [choice.prompt for choice in self.choices[:: self.request.n]]
        return sum(len(prompt.ids) // 4 for prompt in prompts if prompt)

    @property
    def generated_tokens(self) -> int:
        return sum(len(choice.log) for choice in self.choices)

    def fail(self, error: RequestError) -> None:
        """End this request without its (remaining) text; the first end counts."""
        if not self.done:
            self.error = error
            self.wake()

    def slow(self) -> None:
        """The client does not read what waits for it."""
        self.fail(RequestError(499, "slow_reader", "the client does not read"))
        self.overrun()

    def wake(self) -> None:
        self._event.set()

    async def news(self, deadline: float | None) -> None:
        """Sleep until there is a first token, text that nobody else writes, an end, or it is `deadline` (loop time).

        Deadlines move on with every token, so one timer follows them at leisure instead of one being armed each time.
        """
        self.deadline = deadline
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
        if self.deadline is None:
            return
        if asyncio.get_running_loop().time() < self.deadline:
            self._rearm(self.deadline)
        else:
            self._event.set()

    def forget(self) -> None:
        """The handler is through: no timer outlives it, and nothing of it waits for the garbage collector."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        self.choices = ()
        self.unfinished = 0
        self.error = None  # its traceback knows the handler's frames, and they know this
        self.flush = self.overrun = _nothing


class Choice:
    """One sequence of a request.

    Attributes:
        log: generated tokens in order, stop ids included.
        epoch: of the attachment whose tokens count; -1 before the first.
        finish: `stop` or `length` once all text is there, else "".
        told: the controller knows that this sequence is over.
        attached, first, last: monotonic seconds, 0 before it happened; `first`, `last`: of tokens.
        prefill: seconds from the attachment to the first token.
    """

    def __init__(self, live: LiveRequest, sequence: int, index: int) -> None:
        self.live = live
        self.sequence = sequence
        self.index = index
        self.attached = self.first = self.last = self.prefill = 0.0
        self.prompt: TokenisedPrompt | None = None
        self.max_tokens = 0
        self.log = array("i")
        self.epoch = -1
        self.restarts = 0
        self.device = ""
        self._begun = False
        self.queue_ms = 0.0
        self.cold: dict[str, float] = {}
        self.finish = ""
        self.told = False
        self.series: ServedSeries | None = None
        self._unread: list[str] = []
        self._echo = ""
        self._scores = None if live.request.logprobs is None else Scores()
        self._detokeniser: Detokeniser | None = None
        self._stops = StopStrings(live.request.stop)
        self._stop_ids: frozenset[int] = frozenset()

    @property
    def info(self) -> wire.ModelInfo:
        return self.live.info

    @property
    def done(self) -> bool:
        return bool(self.finish) or self.live.error is not None

    def fail(self, error: RequestError) -> None:
        """One choice's failure is the request's."""
        self.live.fail(error)

    def take(self) -> str:
        """The text that came since the last call."""
        if not self._unread:
            return ""
        text = "".join(self._unread)
        self._unread.clear()
        self.live.unread -= len(text)
        return text

    def scored(self) -> list[Scored]:
        """The tokens of the text that was taken, where their logprobs were asked for; at the end, all that are left."""
        return [] if self._scores is None else self._scores.take(bool(self.finish) and not self._stops.found)

    def prepare(self, prompt: TokenisedPrompt) -> None:
        """The prompt is tokenised; settle how much may be generated.

        Raises:
            RequestError: 400, `context_length_exceeded` among others.
        """
        request = self.live.request
        tokens, context, wanted = len(prompt.ids) // 4, self.info.context, request.max_tokens
        if tokens == 0:
            raise invalid("the prompt is empty", request.subject)
        if tokens + (wanted or 1) > context:
            asked = f" and max_tokens asks for {wanted} more" if wanted else ""
            message = f"the context is {context} tokens long; the prompt has {tokens}{asked}"
            fault = request.subject if tokens >= context else "max_tokens"
            raise RequestError(400, "context_length_exceeded", message, fault)
        self.max_tokens = wanted or context - tokens
        if request.min_tokens > self.max_tokens:
            raise invalid(f"min_tokens must be at most {self.max_tokens}, as max_tokens or the context", "min_tokens")
        _check_known("logit_bias", [token for token, _ in request.logit_bias], prompt)
        _check_known("stop_token_ids", request.stop_token_ids, prompt)
        ends = () if request.ignore_eos else prompt.stop_ids
        self._stop_ids = frozenset((*ends, *request.stop_token_ids))
        last = b"" if request.chat else prompt.ids[-4 * NEIGHBOURS :]  # a completion goes on with its prompt
        self._detokeniser = prompt.vocabulary.detokeniser(array("i", last))
        self.prompt = replace(prompt, text="") if prompt.text else prompt
        self._echo = prompt.text
        self.live.unread_limit += len(prompt.text)  # it comes at once, which no client can be too slow for

    def wait(self) -> None:
        """Its worker gave it back; what has no token yet has not begun."""
        self.device, self._begun = "", bool(self.log)

    def run(self, attach: wire.Attach) -> wire.Run:
        """Follow a new owner; the frame that starts or resumes the sequence there."""
        assert self.prompt is not None, "attached before it was prompted"
        if self._begun:
            self.restarts += 1
        else:
            self.queue_ms, self.cold = attach.queue_ms, attach.cold
        self._begun = True
        self.epoch, self.device = attach.epoch, attach.device
        self.attached = time.monotonic()
        request = self.live.request
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
            seed=request.seed + self.index % request.n * GOLDEN & (1 << 63) - 1,
            max_tokens=self.max_tokens,
            stop_ids=sorted(self._stop_ids),
            min_p=sampling["min_p"],
            shaping=_shaping(sampling, request),
            logprobs=request.logprobs,
            request_id=self.live.request_id,
            open_end=request.max_tokens is None,
        )

    def extend(self, tokens: list[int], finish: str, likelihoods: Sequence[wire.Likelihood] = ()) -> None:
        """New tokens of the current epoch, and how the sequence ended at the worker, if it did."""
        assert self._detokeniser is not None, "tokens before the prompt"
        self.log.extend(tokens)
        self.told = bool(finish)
        if finish == FinishReason.NOT_FINITE:
            self.fail(RequestError(500, "engine_error", NOT_FINITE))
            return
        shown = tokens[:-1] if finish == "stop" and tokens and tokens[-1] in self._stop_ids else tokens
        if self._scores is None:
            text = self._detokeniser.feed(shown)
        else:
            text = self._scores.feed(self._detokeniser, shown, likelihoods)
        if len(self.log) > self.live.request.min_tokens:  # until then no stop string ends it, as no stop id does
            text = self._stops.feed(text)
        if finish and not self._stops.found:
            text += self._stops.feed(self._detokeniser.finish()) + self._stops.finish()
        if self._scores is not None:
            self._scores.sent(len(text))
        self._offer(self._echo + text if self._echo else text, "stop" if self._stops.found else finish)

    def _offer(self, text: str, finish: str) -> None:
        live = self.live
        streams, self._echo = live.request.stream, ""
        if finish:
            self.finish = finish
            live.unfinished -= 1
        if text:
            self._unread.append(text)
            live.unread += len(text)
            if streams and live.unread > live.unread_limit:
                live.slow()
        if finish or not self.first:
            live.wake()
        elif streams:
            live.flush()


def _nothing() -> None:
    """There is nobody to tell."""


def _check_known(name: str, ids: Sequence[int], prompt: TokenisedPrompt) -> None:
    """
    Raises:
        RequestError: 400, the model has no row for one of them.
    """
    if max(ids, default=-1) >= prompt.vocabulary_size:
        raise invalid(f"{name}: token ids are 0 to {prompt.vocabulary_size - 1}", name)


def _shaping(sampling: Mapping[str, float], request: CompletionRequest) -> wire.Shaping | None:
    """None where nothing is asked for, so that the plain path stays as short as it is."""
    presence, frequency = sampling["presence_penalty"], sampling["frequency_penalty"]
    repetition, bias = sampling["repetition_penalty"], list(request.logit_bias)
    if not (presence or frequency or repetition != 1 or bias or request.min_tokens):
        return None
    return wire.Shaping(presence, frequency, repetition, bias, request.min_tokens)
