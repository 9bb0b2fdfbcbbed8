"""One row per field of the two completion routes: what it does, what does nothing, and what is a 400.

The answers are those of `demo-count`, which counts on: to "41 42 43" it says "44 45 46 ...". A token is a character.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from serverless_llm.demo.tokenizer import chat_text

PROMPT = "41 42 43"
SHORT = "997 998"  # the answer is "999" and its end
MAX_TOKENS = 12


@dataclass(frozen=True)
class Said:
    """An answer, joined where it streamed; the first choice's text."""

    choices: list[dict[str, Any]]
    usage: dict[str, int] | None
    model: str

    @property
    def text(self) -> str:
        return str(self.choices[0]["text"])

    @property
    def texts(self) -> list[str]:
        return [choice["text"] for choice in self.choices]

    @property
    def finish(self) -> str:
        return str(self.choices[0]["finish"])

    @property
    def tokens(self) -> int:
        assert self.usage is not None
        return self.usage["completion_tokens"]

    @property
    def outcome(self) -> list[tuple[str, str]]:
        return [(choice["text"], choice["finish"]) for choice in self.choices]


class Ask(Protocol):
    """Asks for an answer through a client; fields replace or join those of the plain request."""

    chat: bool

    def __call__(self, **fields: Any) -> Said: ...

    def about(self, prompt: str) -> dict[str, Any]:
        """The field that carries `prompt` on this route."""
        ...

    def stays(self, expected: Callable[[float], bool]) -> bool:
        """Whether the model comes to stay on its device for so many seconds more."""
        ...


@dataclass(frozen=True)
class Row:
    """`used` is true where the field does what it should.

    Attributes:
        neutral: values that change nothing.
        wrong, outside: values of a wrong type, and out of range: each a 400 that names the field.
        beside: other fields of the requests for `neutral`, `wrong` and `outside`.
        required: it has no neutral value. null: null is one.
        any_value: every value does: it has no wrong type; a boolean or a text has no range.
    """

    name: str
    used: Callable[[Ask], bool]
    neutral: tuple[Any, ...] = ()
    wrong: tuple[Any, ...] = ()
    outside: tuple[Any, ...] = ()
    beside: dict[str, Any] = field(default_factory=dict)
    routes: tuple[str, ...] = ("chat", "text")
    required: bool = False
    null: bool = True
    any_value: bool = False
    unbounded: bool = False


def _same(ask: Ask, **fields: Any) -> bool:
    return ask(**fields).outcome == ask().outcome


def _penalised(name: str, value: float) -> Callable[[Ask], bool]:
    """Of two tokens that a bias makes nearly equal, the one that was said gives way to the other."""

    def used(ask: Ask) -> bool:
        bias = {"logit_bias": {"65": 100, "66": 100}, "max_tokens": 24}
        return ask(**bias).text != ask(**bias, **{name: value}).text

    return used


def _hot(ask: Ask, **fields: Any) -> str:
    """What comes of a prompt that the model does not know, at the highest temperature."""
    return ask(**ask.about("why?"), **({"temperature": 2, "max_tokens": 30, "seed": 1} | fields)).text


def _seeded(ask: Ask) -> bool:
    return _hot(ask, seed=5) == _hot(ask, seed=5) != _hot(ask, seed=6)


def _cold(**fields: Any) -> Callable[[Ask], bool]:
    """However hot, these leave only the likeliest token."""
    return lambda ask: _hot(ask) != _hot(ask, temperature=0) == _hot(ask, **fields)


def _kept(ask: Ask) -> bool:
    ask(keep_alive="1h")
    hour = ask.stays(lambda left: 3000 < left <= 3600)
    ask(keep_alive=-1)
    return hour and ask.stays(lambda left: left == math.inf)


def _chat_logprobs(ask: Ask) -> bool:
    said = ask(logprobs=True)
    content = said.choices[0]["logprobs"]["content"]
    return "".join(entry["token"] for entry in content) == said.text == ask().text and all(
        entry["logprob"] <= 0 and entry["top_logprobs"] == [] and bytes(entry["bytes"]).decode() == entry["token"]
        for entry in content
    )


def _top_logprobs(ask: Ask) -> bool:
    content = ask(logprobs=True, top_logprobs=3).choices[0]["logprobs"]["content"]
    return len(content) == MAX_TOKENS and all(
        entry["top_logprobs"][0]["token"] == entry["token"]
        and len(entry["top_logprobs"]) == 3
        and sum(math.exp(top["logprob"]) for top in entry["top_logprobs"]) < 1.0001
        for entry in content
    )


def _text_logprobs(ask: Ask) -> bool:
    said = ask(logprobs=2)
    told = said.choices[0]["logprobs"]
    return (
        "".join(told["tokens"]) == said.text == ask().text
        and told["text_offset"] == list(range(len(said.text)))
        and len(told["token_logprobs"]) == len(said.text)
        and all(token in top and len(top) == 2 for token, top in zip(told["tokens"], told["top_logprobs"], strict=True))
    )


def _several_prompts(ask: Ask) -> bool:
    one, two = chat_text("7 8"), [*b"41 42"]
    said = ask(prompt=[one, two], n=2)
    return said.texts == [text for prompt in (one, two) for text in ask(prompt=prompt, n=2).texts]


def _messages(ask: Ask) -> bool:
    parts = [{"type": "text", "text": "41 42"}, {"type": "text", "text": " 43"}]
    talk = [{"role": "developer", "content": "count"}, {"role": "user", "content": parts}]
    return ask(**ask.about("7 8")).text.startswith("9 10") and _same(ask, messages=talk)


def _refused(name: str, used: Any, neutral: tuple[Any, ...], routes: tuple[str, ...] = ("chat", "text")) -> Row:
    """A field that is not supported: whatever is not neutral is a 400."""
    return Row(name, lambda _: True, neutral, wrong=(5,), outside=(used,), routes=routes)


ROWS = (
    Row("model", lambda ask: ask(model="team/demo-2").model == "team/demo-2", wrong=(5,), outside=("nobody",),
        required=True),
    Row("messages", _messages, wrong=("hi", [5]), outside=([],), routes=("chat",), required=True),
    Row("prompt", lambda ask: ask(prompt=chat_text("7 8")).text.startswith("9 10") and _several_prompts(ask),
        wrong=(5, [1.5]), outside=([], [-1], [5000], ["x"] * 129), routes=("text",), required=True),
    Row("max_tokens", lambda ask: (ask(max_tokens=3).tokens, ask(max_tokens=3).finish) == (3, "length"),
        neutral=(MAX_TOKENS,), null=False, wrong=("3", True), outside=(0, 1 << 40)),
    Row("max_completion_tokens", lambda ask: ask(max_completion_tokens=3, max_tokens=None).tokens == 3,
        neutral=(MAX_TOKENS,), wrong=("3",), outside=(0, 5), routes=("chat",)),
    Row("temperature", lambda ask: _hot(ask) != _hot(ask, temperature=0), neutral=(0,), wrong=("hot", True),
        outside=(-0.1, 2.1)),
    Row("top_p", _cold(top_p=0.001), neutral=(1,), wrong=("x",), outside=(0, 1.1)),
    Row("top_k", _cold(top_k=1), neutral=(0, -1), wrong=(1.5,), outside=(-2,)),
    Row("min_p", _cold(min_p=1), neutral=(0,), wrong=("x",), outside=(-0.1, 1.1)),
    Row("presence_penalty", _penalised("presence_penalty", 2), neutral=(0,), wrong=("x",), outside=(-2.1, 2.1)),
    Row("frequency_penalty", _penalised("frequency_penalty", 2), neutral=(0,), wrong=("x",), outside=(-2.1, 2.1)),
    Row("repetition_penalty", _penalised("repetition_penalty", 5), neutral=(1,), wrong=("x",), outside=(0, 101)),
    Row("logit_bias", lambda ask: set(ask(logit_bias={"65": 100}).text) == {"A"}, neutral=({}, {"65": 0}),
        wrong=([], {"65": "x"}), outside=({"65": 101}, {"x": 1}, {"5000": 1})),
    Row("min_tokens", lambda ask: ask(**ask.about(SHORT)).tokens < 8 <= ask(**ask.about(SHORT), min_tokens=8).tokens,
        neutral=(0, 1), wrong=("x",), outside=(-1, MAX_TOKENS + 1)),
    Row("ignore_eos", lambda ask: ask(**ask.about(SHORT), ignore_eos=True).finish == "length", neutral=(False,),
        wrong=("x", 1), unbounded=True),
    Row("stop", lambda ask: ask(stop=" ").outcome == ask(stop=["x", "45", " "]).outcome == [("44", "stop")],
        neutral=([], "Z"), wrong=(5, [5]), outside=("", ["x"] * 17)),
    Row("stop_token_ids", lambda ask: ask(stop_token_ids=[32]).outcome == [("44", "stop")], neutral=([],),
        wrong=("x", ["x"]), outside=([-1], [5000], [1 << 31])),
    Row("n", lambda ask: ask(n=3).outcome == 3 * ask().outcome, neutral=(1,), wrong=("2", True), outside=(0, 129)),
    Row("best_of", lambda ask: len(ask(n=2, best_of=2).texts) == 2, neutral=(1,), wrong=("x",), outside=(0, 2),
        routes=("text",)),
    Row("seed", _seeded, neutral=(7,), wrong=("x", 1.5), outside=(1 << 63,)),
    Row("logprobs", _chat_logprobs, neutral=(False,), wrong=("x", 1), routes=("chat",), unbounded=True),
    Row("logprobs", _text_logprobs, wrong=("x", True), outside=(-1, 6), routes=("text",)),
    Row("top_logprobs", _top_logprobs, neutral=(0,), wrong=("x",), outside=(-1, 21), beside={"logprobs": True},
        routes=("chat",)),
    Row("echo", lambda ask: ask(echo=True).text == chat_text(PROMPT) + ask().text, neutral=(False,), wrong=("x", 1),
        routes=("text",), unbounded=True),
    Row("stream", lambda ask: _same(ask, stream=True), neutral=(False,), wrong=("x", 1), unbounded=True),
    Row("stream_options",
        lambda ask: ask(stream=True, stream_options={"include_usage": True}).usage == ask().usage
        and ask(stream=True).usage is None,
        neutral=({}, {"include_usage": False}), wrong=(5, {"include_usage": 1}), outside=({"colour": 1},),
        beside={"stream": True}),
    Row("keep_alive", _kept, neutral=("5m", 300), wrong=([],), outside=("5x", "", -5, "-3m")),
    Row("chat_template_kwargs",
        lambda ask: ask(chat_template_kwargs={"before": "7 8 "}).text == ask(**ask.about("7 8 41 42 43")).text,
        neutral=({}, {"other": 1}), wrong=(5,), outside=({"chat_template": "x"}, {"messages": []}), routes=("chat",)),
    # not supported
    _refused("best_of", 2, (1,), ("chat",)),
    _refused("echo", True, (False,), ("chat",)),
    _refused("top_logprobs", 2, (0,), ("text",)),
    _refused("suffix", "x", ("",)),
    _refused("tools", [{"type": "function", "function": {"name": "f"}}], ([],)),
    _refused("tool_choice", "required", ("none", "auto")),
    _refused("functions", [{"name": "f"}], ([],)),
    _refused("function_call", {"name": "f"}, ("none", "auto")),
    _refused("response_format", {"type": "json_object"}, ({"type": "text"},)),
    _refused("modalities", ["audio"], (["text"],)),
    # without effect
    *(
        Row(name, lambda _: True, neutral=values, any_value=True)
        for name, values in {
            "user": ("u",), "metadata": ({"a": "b"},), "store": (True, False), "service_tier": ("auto",),
            "parallel_tool_calls": (True, False), "prompt_cache_key": ("k",), "safety_identifier": ("s",),
        }.items()
    ),
)  # fmt: skip
