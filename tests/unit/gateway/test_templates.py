"""Prompt ids equal transformers' `apply_chat_template(messages, add_generation_prompt=True)`."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serverless_llm.demo.tokenizer import CHAT_TEMPLATE, tokenizer_config_json, tokenizer_json
from serverless_llm.errors import CheckpointError, RequestError
from serverless_llm.gateway import fields, templates
from serverless_llm.gateway.templates import CheckpointText
from serverless_llm.gateway.text_wire import Call, Prompt

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content']}}"
    "{{'<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start|>' + message['role'] + '<|stop|>\\n\\n' + message['content'] | trim + '<|eot|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|stop|>\\n\\n' }}{% endif %}"
)
BLOCKS = """{%- if tools is none and documents is not defined or documents is none %}
    {{- bos_token }}
{%- endif %}
{% for message in messages %}
    {%- if message.role not in ['user', 'assistant'] %}{% continue %}{% endif %}
    {% generation %}
    <{{ message | tojson }}> {{ ['é', '<b>'] | tojson(indent=2) }}
    {% endgeneration %}
    {%- if message.content is string %}S
    {%- else %}{% for part in message.content %}P{{ part.text }}{% endfor %}{% endif %}
{% endfor %}
{% set ns = namespace(n=0) %}{% set ns.n = ns.n + 1 %}{{ ns.n }} {{ strftime_now('%Y') | length }} {{ eos_token }}
"""
PARTS = "{% for message in messages %}{% for part in message['content'] %}{{ part['text'] }};{% endfor %}{% endfor %}"

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "é世😀\n"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<|begin|>"},
        {"role": "user", "content": "b", "name": "x"},
    ],
]
POST = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|begin|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<|begin|>": {"id": "<|begin|>", "ids": [256], "tokens": ["<|begin|>"]}},
}

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a checkpoint's text files; keywords change tokenizer_config.json."""

    def written(adds_begin: bool = False, jinja: str | None = None, **changes: Any) -> Path:
        settings = {key: value for key, value in (tokenizer_config_json(99) | changes).items() if value is not None}
        tokenizer = tokenizer_json() | {"post_processor": POST if adds_begin else None}
        (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        if jinja is not None:
            (tmp_path / "chat_template.jinja").write_text(jinja)
        return tmp_path

    return written


def ids(directory: Path, messages: list[dict[str, Any]], **variables: Any) -> list[int]:
    call = Call("m", str(directory), "c", messages, variables=variables)
    return array("i", CheckpointText(directory).prompt(call).ids).tolist()


def reference(directory: Path, messages: list[dict[str, Any]], **variables: Any) -> list[int]:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **variables)
    return list(found)


@pytest.mark.slow
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("source", [CHAT_TEMPLATE, CHATML, LLAMA3, BLOCKS], ids=["demo", "chatml", "llama3", "blocks"])
def test_prompts_equal_transformers(write: Write, source: str, chat: list[dict[str, Any]]) -> None:
    directory = write(chat_template=source, adds_begin=True)
    assert ids(directory, chat) == reference(directory, chat)


@pytest.mark.slow
@pytest.mark.parametrize("source", [CHAT_TEMPLATE, BLOCKS, PARTS], ids=["demo", "blocks", "parts"])
def test_text_parts_reach_a_template_that_reads_them(write: Write, source: str) -> None:
    directory = write(chat_template=source)
    chat = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert ids(directory, chat) == reference(directory, chat)


DROPS = (
    "{% for m in messages %}{% if m.content is string and 'x' not in m.content %}{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("source", [CHATML, DROPS], ids=["chatml", "drops"])
def test_text_parts_are_joined_for_a_template_that_does_not(write: Write, source: str) -> None:
    directory = write(chat_template=source)
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert ids(directory, parts) == ids(directory, [{"role": "user", "content": "ab"}])


@pytest.mark.slow
def test_a_template_file_goes_before_the_config_and_named_ones_have_a_default(write: Write) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]
    directory = write(chat_template=named)
    assert ids(directory, CHATS[0]) == reference(directory, CHATS[0])
    directory = write(chat_template=CHATML, jinja=LLAMA3)
    assert ids(directory, CHATS[1]) == reference(directory, CHATS[1])


@pytest.mark.slow
def test_variables_reach_the_template(write: Write) -> None:
    directory = write(chat_template="{{ thinking }}{{ messages[0].content }}{{ bos_token }}")
    assert ids(directory, CHATS[0], thinking="no", bos_token="x") == reference(
        directory, CHATS[0], thinking="no", bos_token="x"
    )


def test_a_developer_is_the_system_of_templates_that_do_not_know_the_role(write: Write) -> None:
    chat = [{"role": "developer", "content": "x"}]
    text = CheckpointText(write(chat_template=CHATML))
    assert "<|im_start|>system" in text.render(chat, {})
    knowing = CheckpointText(write(chat_template=CHATML + "{# developer #}"))
    assert "<|im_start|>developer" in knowing.render(chat, {})


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ nothing.at.all }}", "undefined"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
        ("{% for i in range(90000) %}{{ messages[0].content }}{% endfor %}", "more than"),
        ("{% include 'x' %}", "no loader"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion"),
        (None, "no chat template; /v1/completions (serverless-llm run --raw) needs none"),
    ],
)
def test_a_template_that_fails_is_the_requests_400(
    write: Write, monkeypatch: pytest.MonkeyPatch, source: str | None, says: str
) -> None:
    monkeypatch.setattr(templates, "MAX_RENDERED", 1000)
    with pytest.raises(RequestError) as caught:
        CheckpointText(write(chat_template=source)).render([{"role": "user", "content": "x"}], {})
    assert caught.value.status == 400
    assert says in caught.value.message


# --- what else the files say ---


def prompted(directory: Path, **what: Any) -> Prompt:
    return CheckpointText(directory).prompt(Call("m", str(directory), "c", **what))


@pytest.mark.parametrize(
    ("adds_begin", "wanted", "begins"),
    [(True, None, True), (False, None, False), (True, True, True), (False, True, True), (True, False, False)],
)
def test_a_plain_prompt_begins_as_the_config_says(write: Write, adds_begin: bool, wanted: bool, begins: bool) -> None:
    directory = write(adds_begin=adds_begin, add_bos_token=wanted)
    found = array("i", prompted(directory, text="ab").ids).tolist()
    assert found == ([256] if begins else []) + [*b"ab"]


def test_given_ids_must_be_in_the_vocabulary(write: Write) -> None:
    directory = write()
    (directory / "config.json").write_text(json.dumps({"vocab_size": 264}))
    inside, outside = array("i", [263]).tobytes(), array("i", [264]).tobytes()
    assert prompted(directory, ids=inside).ids == inside
    with pytest.raises(RequestError) as caught:
        prompted(directory, ids=outside)
    assert (caught.value.status, caught.value.param) == (400, "prompt")


def test_the_text_of_given_ids_is_told_where_it_is_asked_for(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, ids = write(), array("i", [256, *"Grü".encode()]).tobytes()
    assert prompted(directory, ids=ids, echo=True).text == "Grü"
    assert prompted(directory, ids=ids).text == prompted(directory, text="Grü", echo=True).text == ""
    monkeypatch.setattr(templates, "MAX_RENDERED", 2)
    with pytest.raises(RequestError, match="more than 2 characters") as caught:
        prompted(directory, ids=ids, echo=True)
    assert (caught.value.status, caught.value.param) == (400, "prompt")


@pytest.mark.parametrize(
    ("generation", "config", "eos", "stops"),
    [
        ({"eos_token_id": [1, 2]}, {"eos_token_id": 3}, "<|end|>", [1, 2, 3, 257]),
        ({"eos_token_id": 5}, {"eos_token_id": None}, {"content": "<|end|>"}, [5, 257]),
        ({}, {"eos_token_id": [7, True, "x"]}, None, [7]),
        ({"eos_token_id": 261}, {"vocab_size": 261}, "no such token", []),
        ({"eos_token_id": [-1, 10**30, 2**31, 4]}, {}, None, [4]),
    ],
)
def test_stop_ids_are_the_union(
    write: Write, generation: dict[str, Any], config: dict[str, Any], eos: Any, stops: list[int]
) -> None:
    directory = write(eos_token=eos)
    (directory / "generation_config.json").write_text(json.dumps(generation))
    (directory / "config.json").write_text(json.dumps(config))
    assert prompted(directory, text="x").stop_ids == stops


def test_there_are_at_most_so_many_stop_ids(write: Write) -> None:
    directory = write()
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [*range(fields.MAX_STOP_IDS + 1)]}))
    with pytest.raises(RequestError, match="stop ids"):
        prompted(directory)


@pytest.mark.parametrize(
    ("generation", "defaults"),
    [
        ({"temperature": 0.6, "top_p": 0.95, "do_sample": True}, {"temperature": 0.6, "top_p": 0.95}),
        ({"top_k": 20, "do_sample": None}, {"top_k": 20}),
        ({"repetition_penalty": 1.05, "min_p": 0.1}, {"repetition_penalty": 1.05, "min_p": 0.1}),
        ({"repetition_penalty": 0, "min_p": 2}, {}),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
        ({"temperature": None}, {}),
        ({"temperature": -1, "top_p": 1.5, "top_k": math.nan}, {}),
        ({"temperature": math.inf, "top_p": math.nan, "top_k": -math.inf}, {}),
        ({"temperature": 10**400, "top_p": 0, "top_k": 10**30, "do_sample": False}, {"temperature": 0.0}),
        ({"temperature": True, "top_p": "1", "top_k": [1]}, {}),
    ],
)  # fmt: skip
def test_sampling_defaults(write: Write, generation: dict[str, Any], defaults: dict[str, float]) -> None:
    directory = write()
    (directory / "generation_config.json").write_text(json.dumps(generation))
    assert prompted(directory, text="x").defaults == defaults


TEXT_FILES = (
    "chat_template.jinja", "config.json", "generation_config.json", "special_tokens_map.json", "tokenizer.json",
    "tokenizer_config.json",
)  # fmt: skip


@pytest.mark.parametrize("name", TEXT_FILES)
def test_no_file_is_read_outside_the_checkpoint(tmp_path: Path, write: Write, name: str) -> None:
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    for path in [path for path in write().iterdir() if path.is_file()]:
        path.rename(directory / path.name)
    secret = tmp_path / "secret"
    secret.write_text("{}")
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to(secret)
    with pytest.raises(CheckpointError, match="link out of"):
        CheckpointText(directory)
    secret.rename(directory / "inside")
    (directory / name).unlink()
    (directory / name).symlink_to("inside")
    if name != "tokenizer.json":
        assert CheckpointText(directory).special is not None


def test_without_a_tokenizer_there_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"tokenizer\.json"):
        CheckpointText(tmp_path)
