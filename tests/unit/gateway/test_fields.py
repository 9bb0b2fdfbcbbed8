"""Single request fields: what is taken, and what is a 400 that names the field."""

from __future__ import annotations

import contextlib
import math
import sys
from array import array
from collections.abc import Callable
from typing import Any

import pytest

from serverless_llm.errors import RequestError
from serverless_llm.gateway import fields


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("5m", 300.0), ("1h30m", 5400.0), ("250ms", 0.25), ("90", 90.0), (0, 0.0), ("0", 0.0), (1.5, 1.5),
        ("2d", 172800.0), (-1, math.inf), ("-1", math.inf), ("-1m", math.inf), ("-1s", math.inf),
    ],
)  # fmt: skip
def test_keep_alive(value: Any, seconds: float) -> None:
    assert fields.keep_alive(value, "keep_alive") == seconds


@pytest.mark.parametrize(
    "value",
    [
        "", "m", "5x", "5m!", "m5", True, [], {}, math.nan, math.inf, -math.inf, 10**400, "--1", "9" * 400,
        -5, -0.5, "-3m",
    ],
)  # fmt: skip
def test_keep_alive_that_is_none(value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        fields.keep_alive(value, "keep_alive")
    assert (caught.value.status, caught.value.param) == (400, "keep_alive")


@pytest.mark.parametrize(
    ("check", "value"),
    [
        (fields.boolean, 1),
        (fields.whole(1, 9), True),
        (fields.whole(1, 9), 1.0),
        (fields.whole(1, 9), 0),
        (fields.whole(1, 9), 10),
        (fields.number(0, 2), True),
        (fields.number(0, 2), "1"),
        (fields.number(0, 2), -0.1),
        (fields.number(0, 2), 2.1),
        (fields.number(0, 1, above=True), 0),
        (fields.number(0, 2), 10**400),
        (fields.stop_strings, ""),
        (fields.stop_strings, ["a", ""]),
        (fields.stop_strings, ["a", 1]),
        (fields.stop_strings, ["a"] * 17),
        (fields.stop_strings, "a" * 1025),
        (fields.token_ids, [1, -1]),
        (fields.token_ids, [True]),
        (fields.token_ids, [2**31]),
        (fields.token_ids, 5),
        (fields.token_ids, [1] * 1025),
        (fields.logit_bias, []),
        (fields.logit_bias, {"5": 101}),
        (fields.logit_bias, {"5": "1"}),
        (fields.logit_bias, {"-5": 1}),
        (fields.logit_bias, {"\u0665": 1}),
        (fields.logit_bias, {"9" * 5000: 1}),
        (fields.logit_bias, {str(2**31): 1}),
        (fields.logit_bias, {str(token): 1 for token in range(1025)}),
        (fields.variables, {"a": 2**64}),
        (fields.variables, {"a": [{"b": [-(2**63) - 1]}]}),
        (fields.stream_options, []),
        (fields.stream_options, {"include_usage": 1}),
        (fields.stream_options, {"other": None}),
        (fields.stream_options, {"include_obfuscation": True}),
        (fields.variables, []),
        (fields.variables, {"chat_template": "x"}),
        (fields.variables, {"messages": []}),
        (fields.prompts, []),
        (fields.prompts, ["a", [1, "b"]]),
        (fields.prompts, [[1], []]),
        (fields.prompts, [[[1]]]),
        (fields.prompts, [1, "a"]),
        (fields.prompts, [1, True]),
        (fields.prompts, [1, 2**31]),
        (fields.prompts, ["a"] * 129),
        (fields.messages, [{"role": "user", "content": "x"}] * (fields.MAX_MESSAGES + 1)),
        (fields.messages, [{"role": "user", "content": [{"type": "text", "text": ""}] * (fields.MAX_MESSAGES + 1)}]),
        (fields.prompts, 5),
        (fields.messages, []),
        (fields.messages, {}),
        (fields.messages, ["hi"]),
        (fields.messages, [{"role": "tool", "content": "x"}]),
        (fields.messages, [{"content": "x"}]),
        (fields.messages, [{"role": "user"}]),
        (fields.messages, [{"role": "user", "content": None}]),
        (fields.messages, [{"role": "user", "content": 5}]),
        (fields.messages, [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        (fields.messages, [{"role": "user", "content": [{"type": "text"}]}]),
        (fields.messages, [{"role": "user", "content": ["x"]}]),
        (fields.messages, [{"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {}}]}]),
        (fields.messages, [{"role": "user", "content": "x", "colour": "red"}]),
        (fields.messages, [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]),
        (fields.messages, [{"role": "user", "content": "x", "name": 5}]),
        (fields.messages, [{"role": "user", "content": "x", "name": []}]),
    ],
)  # fmt: skip
def test_a_bad_value_names_its_field(check: fields.Check, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        check(value, "field")
    assert caught.value.status == 400
    assert caught.value.param is not None
    assert caught.value.param.startswith("field")


@pytest.mark.parametrize("prompt", [[1] * 5, ["a", [1] * 5]])
def test_a_prompt_over_any_context_is_not_looked_at(monkeypatch: pytest.MonkeyPatch, prompt: Any) -> None:
    monkeypatch.setattr(fields, "MAX_PROMPT", 4)
    with pytest.raises(RequestError, match="prompt has 5 entries, of at most 4"):
        fields.prompts(prompt, "prompt")


def test_text_parts_are_bounded_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fields, "MAX_PARTS", 4)
    message = {"role": "user", "content": [{"type": "text", "text": "a"}] * 2}
    assert fields.messages([message] * 2, "messages") == [message] * 2
    with pytest.raises(RequestError, match="messages have 6 text parts, of at most 4") as caught:
        fields.messages([message] * 3, "messages")
    assert (caught.value.status, caught.value.param) == (400, "messages")


def steps(work: Callable[[], object]) -> int:
    """Lines of Python that it runs."""
    count = 0

    def trace(frame: object, event: str, argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with contextlib.suppress(RequestError):
            work()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize(
    ("check", "value"),
    [
        (fields.variables, {"a": [1] * 5000}),
        (fields.variables, {"a": [[]] * 5000 + [2**64]}),
        (fields.stop_strings, ["a"] * 5000),
        (fields.token_ids, [1] * 5000),
        (fields.prompts, [1] * 5000),
        (fields.prompts, [[1] * 5000]),
    ],
)
def test_all_streams_wait_for_no_list_to_be_looked_at_entry_by_entry(check: fields.Check, value: Any) -> None:
    assert steps(lambda: check(value, "field")) < 50


def test_variables_that_are_nested_too_deeply() -> None:
    deep: Any = []
    for _ in range(sys.getrecursionlimit()):
        deep = [deep]
    with pytest.raises(RequestError, match="nested too deeply"):
        fields.variables({"a": deep}, "field")


def test_the_message_at_fault_is_named() -> None:
    good = {"role": "user", "content": "x"}
    with pytest.raises(RequestError) as caught:
        fields.messages(
            [good, {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "audio"}]}], "messages"
        )
    assert caught.value.param == "messages[1].content[1]"


@pytest.mark.parametrize(
    ("check", "value", "expected"),
    [
        (fields.boolean, False, False),
        (fields.whole(1, 9), 9, 9),
        (fields.number(0, 1, above=True), 1, 1.0),
        (fields.number(0, 2), 0, 0.0),
        (fields.stop_strings, "END", ("END",)),
        (fields.stop_strings, [], ()),
        (fields.stop_strings, ["a", "b"], ("a", "b")),
        (fields.token_ids, [0, 5], (0, 5)),
        (fields.logit_bias, {}, ()),
        (fields.logit_bias, {"7": 1, "5": -100.0}, ((5, -100.0), (7, 1.0))),
        (fields.stream_options, {}, False),
        (fields.stream_options, {"include_usage": None, "include_obfuscation": False}, False),
        (fields.stream_options, {"include_usage": True}, True),
        (fields.variables, {"enable_thinking": False}, {"enable_thinking": False}),
        (fields.prompts, "a", ["a"]),
        (fields.prompts, ["a"], ["a"]),
        (fields.prompts, ["a", "", "b"], ["a", "", "b"]),
        (fields.prompts, [3, 4], [array("i", [3, 4])]),
        (fields.prompts, [[3, 4]], [array("i", [3, 4])]),
        (fields.prompts, [[3, 4], "a", [5]], [array("i", [3, 4]), "a", array("i", [5])]),
    ],
)  # fmt: skip
def test_a_good_value(check: fields.Check, value: Any, expected: Any) -> None:
    assert check(value, "field") == expected


def test_messages_keep_what_templates_read() -> None:
    given = [
        {"role": "developer", "content": "a", "name": "ops"},
        {"role": "user", "content": [{"type": "text", "text": "b", "annotations": None}]},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": [], "annotations": [], "audio": None},
    ]
    assert fields.messages(given, "messages") == [
        {"role": "developer", "content": "a", "name": "ops"},
        {"role": "user", "content": [{"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c"},
    ]
