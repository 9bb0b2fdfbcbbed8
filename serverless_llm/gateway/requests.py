"""The live requests of a gateway: which frame of the controller and the workers is for which choice.

Frames land here, on the loop. A token is in its choice's log before a client can see it. Frames of an older epoch than
a sequence's current one are dropped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

from serverless_llm import wire
from serverless_llm.domain import WorkClass
from serverless_llm.errors import RequestError
from serverless_llm.gateway.failure import from_rejection
from serverless_llm.gateway.live import Choice, LiveRequest
from serverless_llm.gateway.metrics import Metrics
from serverless_llm.gateway.openai import CompletionRequest
from serverless_llm.gateway.text import TokenisedPrompt

_log = logging.getLogger("serverless_llm.request")


class LiveRequests:
    """The choices of all live requests of one gateway, by sequence."""

    def __init__(self, send: Callable[[wire.Message], None], metrics: Metrics, generation: int) -> None:
        self._send = send
        self._metrics = metrics
        self._next = (generation << 32) + 1
        self._live: dict[int, Choice] = {}

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Choice]:
        return iter(tuple(self._live.values()))

    def open(self, request_id: str, info: wire.ModelInfo, request: CompletionRequest) -> LiveRequest:
        """New sequences, of which nobody knows; `announce` them next."""
        live = LiveRequest(request_id, info, request, self._next)
        self._next += len(live.choices)
        self._live.update((choice.sequence, choice) for choice in live.choices)
        return live

    def announce(self, live: LiveRequest) -> None:
        """A load may begin while their prompts are tokenised. Nothing where the request is over already."""
        if not self.awaits(live):
            return
        name, checkpoint, online = live.info.name, live.info.checkpoint, WorkClass.ONLINE.value
        keep_alive, request_id = live.request.keep_alive, live.request_id
        for choice in live.choices:
            self._send(wire.Arrive(choice.sequence, name, checkpoint, online, keep_alive, request_id))

    def awaits(self, live: LiveRequest) -> bool:
        """Whether anyone still wants its answer."""
        return not live.done and live.sequence in self._live

    def prompted(self, choice: Choice, prompt: TokenisedPrompt) -> None:
        """The prompt is there: the sequence can be dispatched, unless it is over already.

        Raises:
            RequestError: see `Choice.prepare`.
        """
        if choice.done or choice.sequence not in self._live:
            return
        choice.prepare(prompt)
        asked = choice.live.request.max_tokens or 1
        self._send(wire.Prompted(choice.sequence, len(prompt.ids) // 4, asked))

    def close(self, live: LiveRequest, cause: str) -> None:
        """The handler is through with it; sequences that may still run are stopped."""
        for choice in live.choices:
            del self._live[choice.sequence]
        self._stop(live.choices, cause)

    def _stop(self, choices: tuple[Choice, ...], cause: str) -> None:
        running = [choice for choice in choices if not choice.told]
        for choice in running:
            choice.told = True
        if running:
            self._send(wire.Gone([choice.sequence for choice in running], cause))

    def _stop_if_done(self, choice: Choice) -> None:
        """The gateway itself may find the end: a stop string, or a client that does not read."""
        if choice.done:
            self._stop((choice,), "stop string" if choice.finish else "slow reader")

    def attach(self, message: wire.Attach) -> None:
        choice = self._live.get(message.sequence)
        if choice is None or choice.done:
            self._send(wire.Gone([message.sequence], "finished"))
        elif message.epoch > choice.epoch:
            self._follow(choice, message)

    def _follow(self, choice: Choice, message: wire.Attach) -> None:
        try:
            choice.series = self._metrics.served(choice.info.name, message.device)
            self._send(choice.run(message))
        except Exception:  # noqa: BLE001  one request's fault: unanswered, the controller would attach it again for ever
            self._fail(choice, "the sequence could not be attached")

    def _fail(self, choice: Choice, why: str) -> None:
        """A bug that one request met ends that request."""
        _log.exception("%s: %s", choice.live.request_id, why)
        choice.fail(RequestError(500, "engine_error", why))
        self._stop((choice,), "error")

    def tokens(self, message: wire.Tokens) -> None:
        now = time.monotonic()
        for sequence, epoch, tokens, finish in message.entries:
            choice = self._live.get(sequence)
            if choice is None or choice.epoch != epoch or choice.done:
                continue
            try:
                choice.extend(tokens, finish, message.likelihoods.get(sequence, ()))
                self._observe(choice, len(tokens), now)
            except Exception:  # noqa: BLE001  one request's fault, in a frame with the tokens of others
                self._fail(choice, "its tokens could not be decoded")
            else:
                self._stop_if_done(choice)

    def _observe(self, choice: Choice, count: int, now: float) -> None:
        assert choice.series is not None, "tokens before an attachment"
        if count == 0:
            return
        choice.series.generated.inc(count)
        since = None if choice.first else now - choice.live.arrived
        self._metrics.traffic.tokens(count, since, now - choice.last, now)
        if choice.first:
            choice.series.gap.observe(now - choice.last)
        else:
            assert choice.prompt is not None, "tokens before the prompt"
            choice.series.prompt.inc(len(choice.prompt.ids) // 4)
            choice.first = now
            choice.prefill = now - choice.attached
            choice.series.first_token.observe(now - choice.live.arrived)
        choice.last = now

    def give_back(self, message: wire.GivenBack) -> None:
        choice = self._live.get(message.sequence)
        if choice is not None:
            choice.wait()

    def reject(self, message: wire.Rejected) -> None:
        choice = self._live.get(message.sequence)
        if choice is not None and not choice.done:
            choice.told = True
            choice.fail(from_rejection(message))
