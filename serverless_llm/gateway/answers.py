"""What a live request has to show: its choices' text and logprobs, whole or as a stream; usage; times."""

from __future__ import annotations

from typing import Any

from serverless_llm.gateway import logprobs, sse
from serverless_llm.gateway.live import Choice, LiveRequest


def identity(live: LiveRequest) -> sse.Identity:
    return sse.Identity(live.request.chat, live.request_id, live.created, live.info.name)


def whole(live: LiveRequest) -> bytes:
    """The body of an answer that does not stream, all choices being complete."""
    choices = [
        sse.choice(live.request.chat, choice.index, choice.take(), choice.finish, scores(choice, empty=True))
        for choice in live.choices
    ]
    return sse.whole(identity(live), choices, usage(live), metrics(live.lead))


class ChoiceStream:
    """One choice's part of a stream."""

    def __init__(self, choice: Choice) -> None:
        self._choice = choice
        self._chunks = sse.Chunks(identity(choice.live), choice.live.request.include_usage, choice.index)
        self.ended = False

    def news(self) -> bytes:
        """Chunks with all that came since the last call; the end, too."""
        choice = self._choice
        text = choice.take()
        scored = scores(choice)
        out = self._chunks.delta(text, scored) if text or scored else b""
        if choice.finish:
            self.ended = True
            out += self._chunks.last(choice.finish, metrics(choice))
        return out

    def heartbeat(self) -> bytes:
        return self._chunks.heartbeat()


def scores(choice: Choice, empty: bool = False) -> dict[str, Any] | None:
    """Logprobs of the tokens of the text that was just taken; None where there are none."""
    if choice.live.request.logprobs is None or choice.prompt is None:
        return None
    scored = choice.scored()
    if not scored and not empty:
        return None
    piece = choice.prompt.vocabulary.piece
    return (logprobs.chat if choice.live.request.chat else logprobs.text)(scored, piece)


def usage(live: LiveRequest) -> dict[str, int]:
    prompt, generated = live.prompt_tokens, live.generated_tokens
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def phases(choice: Choice) -> dict[str, float]:
    """Of a cold start, in milliseconds, as far as they are known.

    Queue, remote, disk, upload and prefill are together the time to the first token: who came late waited for the rest
    of the load only, and all that was none of the others was waiting.
    """
    if not choice.cold:
        return {}
    left = _ms((choice.first or choice.attached) - choice.live.arrived - choice.prefill)
    shown = {name: round(value, 3) for name, value in choice.cold.items()}
    for name in ("load_upload_ms", "load_disk_ms", "load_remote_ms"):
        shown[name] = min(shown[name], left)
        left = round(left - shown[name], 3)
    shown |= {"load_queue_ms": left}
    return shown | ({"prefill_ms": _ms(choice.prefill)} if choice.first else {})


def metrics(choice: Choice) -> dict[str, Any]:
    """vLLM's times of an answer, and those of its cold start."""
    to_first = _ms(choice.first - choice.live.arrived) if choice.first else 0.0
    return {
        "time_to_first_token_ms": to_first,
        "queue_time_ms": round(choice.queue_ms, 3),
        "generation_time_ms": _ms(choice.last - choice.first),
        "cold_start_ms": to_first if choice.cold else 0.0,
        "cold_start_phases": phases(choice),
    }


def timing(choice: Choice) -> dict[str, str]:
    """`Server-Timing`: the phases known now."""
    known = {"queue_ms": round(choice.queue_ms, 3)} if choice.attached else {}
    known |= phases(choice)
    if choice.first:
        known["first_token_ms"] = _ms(choice.first - choice.live.arrived)
    value = ", ".join(f"{name.removesuffix('_ms')};dur={duration:g}" for name, duration in known.items())
    return {"Server-Timing": value} if value else {}
