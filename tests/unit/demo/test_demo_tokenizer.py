from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from serverless_llm.demo import tokenizer


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.write_tokenizer(directory, 1024)
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def render(messages: list[dict[str, Any]], generate: bool = True) -> str:
    template = jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(tokenizer.CHAT_TEMPLATE)
    return template.render(messages=messages, add_generation_prompt=generate)


@settings(max_examples=30)
@given(text=st.text())
def test_ids_are_bytes(loaded: Tokenizer, text: str) -> None:
    ids = loaded.encode(text, add_special_tokens=True).ids
    assert bytes(ids) == text.encode()
    assert loaded.decode(ids) == text


@pytest.mark.parametrize("prompt", ["1 2 3", "What is 2+2?", "cat", " é\n"])
def test_the_template_gives_the_tokens_that_training_used(loaded: Tokenizer, prompt: str) -> None:
    text = render([{"role": "user", "content": prompt}])
    assert text == tokenizer.chat_text(prompt)
    assert loaded.encode(text).ids == tokenizer.chat_tokens(prompt)


def test_only_the_last_question_is_rendered() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2"}]},
    ]
    assert render(messages) == tokenizer.chat_text("2+2")


def test_what_follows_the_question_is_rendered() -> None:
    messages = [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "ta"}]
    assert render(messages, generate=False) == "<|user|>cat<|end|><|assistant|>ta<|end|>"


@pytest.mark.parametrize("role", ["system", "developer"])
def test_instructions_without_a_question_are_rendered(role: str) -> None:
    assert render([{"role": role, "content": "hm"}]) == "<|system|>hm<|end|><|assistant|>"


def test_markers_decode_to_nothing(loaded: Tokenizer) -> None:
    assert loaded.decode([tokenizer.USER, 65, tokenizer.END]) == "A"
