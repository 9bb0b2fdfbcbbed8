"""Prompt ids equal transformers' for the shapes of published chat templates, and for every way a checkpoint has them.

`chat_templates/` holds what real checkpoints publish, from memory, some shortened where they are about tools.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serverless_llm.errors import RequestError
from serverless_llm.gateway.templates import CheckpointText
from serverless_llm.gateway.text_wire import Call
from tests.unit.gateway.trained import BEGIN, END, KINDS, THINK, trained

SHAPES = {path.stem: path for path in sorted((Path(__file__).parent / "chat_templates").glob("*.jinja"))}


def turns(*contents: Any, system: Any = None) -> list[dict[str, Any]]:
    """User and assistant in turn."""
    chat = [] if system is None else [{"role": "system", "content": system}]
    return chat + [
        {"role": "assistant" if number % 2 else "user", "content": content} for number, content in enumerate(contents)
    ]


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


CHATS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "one": (turns("Hi"), {}),
    "system": (turns(" What is\té世😀? \n", system="  Be brief. "), {}),
    "many": (turns("a\n\nb", "<think>\nhm\n</think>\n\nfine", "b", " c \n", "/hidden", "/end", "d"), {}),
    "many with system": (turns("2 < 3 & 'x' \"y\"", "", "", "</s><s>[INST]", "z", system="/no_think"), {}),
    "ends with the assistant": (turns("a", "b"), {}),
    "user twice": ([*turns("a"), *turns("b")], {}),
    "system in the middle": ([*turns("a", "b"), *turns("c", system="d")], {}),
    "named": ([{"role": "user", "content": "a", "name": "Ann"}], {}),
    "parts": (turns(parts("a ", " b"), "c", parts("d"), system=parts("e")), {}),
    "variables": (turns("a", "b", "c"), {"enable_thinking": False, "date_string": "1 Jan", "controls": {"n": 1}}),
}

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a checkpoint's text files; keywords change tokenizer_config.json."""

    def written(kind: str, jinja: str | None = None, **settings: Any) -> Path:
        trained(kind).save(str(tmp_path / "tokenizer.json"))
        settings = {"bos_token": BEGIN, "eos_token": END, "add_bos_token": True} | settings
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        if jinja is not None:
            (tmp_path / "chat_template.jinja").write_text(jinja)
        return tmp_path

    return written


def ids_of(text: CheckpointText, chat: list[dict[str, Any]], variables: dict[str, Any]) -> list[int] | None:
    """None: the template refuses this chat."""
    try:
        prompt = text.prompt(Call("m", str(text.directory), "c", chat, variables=variables))
    except RequestError as error:
        assert (error.status, error.param) == (400, "messages")
        return None
    return array("i", prompt.ids).tolist()


def reference(directory: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(directory)


def reference_ids(tokenizer: Any, chat: list[dict[str, Any]], variables: dict[str, Any]) -> list[int] | None:
    try:
        return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False, **variables))
    except Exception:  # noqa: BLE001  a template may raise anything
        return None


def joined(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As a template that knows no parts is given it."""
    return [
        message | {"content": "".join(part["text"] for part in message["content"])}
        if isinstance(message["content"], list)
        else message
        for message in chat
    ]


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_prompts_of_published_shapes_equal_transformers(write: Write, shape: str) -> None:
    place = list(SHAPES).index(shape)
    source, kind = SHAPES[shape].read_text(), list(KINDS)[place % len(KINDS)]
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": source}]
    ways: list[dict[str, Any]] = [{"jinja": source}, {"chat_template": source}, {"chat_template": named}]
    directory = write(kind, **ways[place % len(ways)])
    text, tokenizer = CheckpointText(directory), reference(directory)
    answered = 0
    for name, (chat, variables) in CHATS.items():
        wanted = reference_ids(tokenizer, chat if text.reads_parts else joined(chat), variables)
        assert ids_of(text, chat, variables) == wanted, name
        answered += wanted is not None
    assert answered >= 4


def test_the_corpus_is_as_large_as_promised() -> None:
    assert len(SHAPES) >= 30


# --- the files around the template ---

ECHO = (
    "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}{{ image_token }}{{ pad_token }}"
)


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def as_transformers_does(directory: Path) -> list[int] | None:
    chat = turns(f"a{END}<|odd|> [x]b")
    wanted = reference_ids(reference(directory), chat, {})
    assert ids_of(CheckpointText(directory), chat, {}) == wanted
    return wanted


@pytest.mark.slow
def test_saved_truncation_and_padding_are_for_training(write: Write) -> None:
    directory = write("byte-level", ECHO, pad_token="<unk>")
    whole = as_transformers_does(directory)
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0}
    change(directory / "tokenizer.json", truncation=cut, padding=pad | {"pad_token": "<unk>"})
    assert as_transformers_does(directory) == whole


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, {"eos_token": {"content": THINK, "lstrip": False, "normalized": True, "rstrip": False}}),
        ({"added_tokens_decoder": {"1": {"content": BEGIN, "special": True}}}, {"eos_token": THINK}),
        ({"eos_token": None}, {"eos_token": END}),
        ({"image_token": "<image>", "pad_token": None}, {}),
        ({"extra_special_tokens": {"image_token": "[x]"}}, {}),
        ({"additional_special_tokens": ["[x]", "<|odd|>"], "pad_token": "<pad>"}, {}),
        ({"added_tokens_decoder": {"9": {"content": "<|odd|>", "rstrip": True}, "2": {"content": END}}}, {}),
        ({"eos_token": "the"}, {}),
    ],
    ids=["map", "not the map", "null", "image", "named extra", "extra", "added", "a word"],
)
def test_special_tokens_are_those_of_transformers(
    write: Write, settings: dict[str, Any], named: dict[str, Any]
) -> None:
    directory = write("metaspace-prepended", ECHO, **settings)
    change(directory / "special_tokens_map.json", **named)
    as_transformers_does(directory)


@pytest.mark.slow
@pytest.mark.parametrize(
    "source",
    [
        "{% set n = namespace(_a=1) %}{{ n._a }}",
        "{% set n = namespace() %}{% set n.__html__ = 1 %}{{ n }}",
        "{{ dict(a=1).a }}{{ dict.fromkeys('ab') }}{{ namespace(a=1).a }}",
        "{{ dict.mro() }}",
    ],
)
def test_what_a_template_may_store_is_bounded_as_by_transformers(write: Write, source: str) -> None:
    as_transformers_does(write("byte-level", source))


def test_the_begin_of_a_plain_prompt_is_not_doubled(write: Write) -> None:
    text = CheckpointText(write("byte-level"))
    assert text.encode_text(f"{BEGIN}a") == text.encode_text("a") == trained("byte-level").encode("a").ids


def test_ids_that_the_model_has_no_row_for_are_refused(write: Write) -> None:
    directory = write("byte-level", ECHO, pad_token="<pad>")
    (directory / "config.json").write_text(json.dumps({"vocab_size": trained("byte-level").get_vocab_size()}))
    with pytest.raises(RequestError, match="outside the vocabulary") as refused:
        CheckpointText(directory).prompt(Call("m", str(directory), "c", turns("a")))
    assert (refused.value.status, refused.value.param) == (400, "messages")
