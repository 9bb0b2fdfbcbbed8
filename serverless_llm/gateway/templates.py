"""A checkpoint's text files: chat template, special tokens, generation defaults, tokenizer. Runs in text processes.

Prompts equal transformers' `apply_chat_template(messages, add_generation_prompt=True)`: the same environment
(sandboxed, `trim_blocks`, `lstrip_blocks`, loop controls), the same filters and functions, and no special tokens
added to what the template wrote.
"""

from __future__ import annotations

import contextlib
import json
import re
from array import array
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from serverless_llm.errors import RequestError
from serverless_llm.gateway import fields
from serverless_llm.gateway.tables import token_table
from serverless_llm.gateway.text_wire import Call, Prompt
from serverless_llm.loader.manifest import confined

MAX_RENDERED = 16 << 20  # characters of one rendered prompt; over any context, far under the memory limit
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# a loop over a message's content; only to ask `content is string` is no sign: Qwen3's then drops what is not one
READS_PARTS = re.compile(r"\bfor\s+\w+\s+in\s+[\w.\[\]'\"]*\bcontent\b")
EXPANSION = 12  # bytes in memory per byte of tokenizer.json, measured with 32 k and 128 k vocabularies, rounded up


class Generation(Extension):
    """`{% generation %}` marks what the assistant wrote, for training; rendering passes it through."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_through"), [], [], body).set_lineno(line)

    def _through(self, caller: Callable[[], str]) -> str:
        return caller()


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment() -> ImmutableSandboxedEnvironment:
    """The environment that chat templates are written for."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return made


def _found(directory: Path, name: str) -> Path | None:
    """One of the checkpoint's files, None where there is none.

    Raises:
        CheckpointError: it is a link out of the checkpoint.
    """
    return confined(directory, name) if (directory / name).exists() else None


def _json(directory: Path, name: str) -> dict[str, Any]:
    path = _found(directory, name)
    if path is None:
        return {}
    loaded = json.loads(path.read_text(encoding="utf-8"))
    return loaded if isinstance(loaded, dict) else {}


def _ids(value: object) -> list[int]:
    """`eos_token_id` as the files write it: absent, one id or a list."""
    listed = value if isinstance(value, list) else [value]
    return [number for number in listed if fields.is_token(number)]


class CheckpointText:
    """The text side of one checkpoint. Owned by one text process."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        path = _found(directory, "tokenizer.json")
        if path is None:
            raise RequestError(500, "engine_error", f"the checkpoint has no tokenizer.json ({directory})")
        self.nbytes = EXPANSION * path.stat().st_size
        self.tokenizer = Tokenizer.from_file(str(path))
        self.settings = _json(directory, "tokenizer_config.json")
        self._config = _json(directory, "config.json")
        self._generation = _json(directory, "generation_config.json")
        self.special = self._special_tokens()
        self.source = self._template_source()
        self.reads_parts = READS_PARTS.search(self.source or "") is not None
        self._template: jinja2.Template | None = None

    def _special_tokens(self) -> dict[str, str]:
        named = _json(self.directory, "special_tokens_map.json") | self.settings
        found = {name: named.get(name) for name in SPECIAL}
        texts = {name: value["content"] if isinstance(value, dict) else value for name, value in found.items()}
        return {name: text for name, text in texts.items() if isinstance(text, str)}

    def _template_source(self) -> str | None:
        path = _found(self.directory, "chat_template.jinja")
        if path is not None:
            return path.read_text(encoding="utf-8")
        value = self.settings.get("chat_template")
        if isinstance(value, list):
            value = {entry["name"]: entry["template"] for entry in value}.get("default")
        return value if isinstance(value, str) else None

    def defaults(self) -> dict[str, float]:
        """Sampling values of generation_config.json; `do_sample: false` there means greedy, as in transformers.

        What a request could not ask for is left out.
        """
        values: dict[str, float] = {}
        for name, check in fields.SAMPLING.items():
            with contextlib.suppress(RequestError):
                values[name] = check(self._generation.get(name), name)
        return values | ({"temperature": 0.0} if self._generation.get("do_sample") is False else {})

    def stop_ids(self) -> list[int]:
        """Every id that ends a text, by any of the checkpoint's files."""
        ids = {*_ids(self._generation.get("eos_token_id")), *_ids(self._config.get("eos_token_id"))}
        named = self.tokenizer.token_to_id(self.special.get("eos_token", ""))
        return sorted(ids if named is None else ids | {named})

    def vocabulary(self) -> int:
        """Ids that the model has rows for; padding rows of its embedding count."""
        size = self._config.get("vocab_size")
        return size if isinstance(size, int) else self.tokenizer.get_vocab_size(with_added_tokens=True)

    def render(self, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
        """The chat as one text.

        Raises:
            RequestError: no template, or one that is broken or refuses these messages.
        """
        if self.source is None:
            raise RequestError(400, "invalid_request_error", "this model has no chat template", "messages")
        try:
            if self._template is None:
                self._template = environment().from_string(self.source)
            return self._run(self._template, messages, variables)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            message = f"the model's chat template failed: {error}"
            raise RequestError(400, "invalid_request_error", message, "messages") from error

    def _run(self, template: jinja2.Template, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
        pieces: list[str] = []
        size = 0
        values = {**self.special, **variables, "messages": self._adapted(messages), "tools": None, "documents": None}
        for piece in template.generate(**values, add_generation_prompt=True):
            size += len(piece)
            if size > MAX_RENDERED:
                raise ValueError(f"it wrote more than {MAX_RENDERED} characters")
            pieces.append(piece)
        text = "".join(pieces)
        text.encode()  # a surrogate is no text
        return text

    def _adapted(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Roles and text parts as this template can read them."""
        developer = "developer" if "developer" in (self.source or "") else "system"
        adapted = []
        for message in messages:
            role, content = message["role"], message["content"]
            if not (self.reads_parts or isinstance(content, str)):
                content = "".join(part["text"] for part in content)
            adapted.append(message | {"role": developer if role == "developer" else role, "content": content})
        return adapted

    def encode_text(self, text: str) -> list[int]:
        """Ids of a plain prompt, its BOS as tokenizer_config.json's `add_bos_token` says."""
        ids: list[int] = self.tokenizer.encode(text).ids
        wanted = self.settings.get("add_bos_token")
        begin = self.tokenizer.token_to_id(self.special.get("bos_token", ""))
        if begin is None or not isinstance(wanted, bool):
            return ids
        bare: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        if wanted:
            return ids if ids[:1] == [begin] else [begin, *ids]
        return bare if ids[:1] == [begin] else ids

    def _given(self, raw: bytes) -> bytes:
        largest = max(array("i", raw), default=0)
        if largest >= self.vocabulary():
            message = f"prompt: token id {largest} is outside the vocabulary of {self.vocabulary()}"
            raise RequestError(400, "invalid_request_error", message, "prompt")
        return raw

    def prompt(self, call: Call) -> Prompt:
        """The prompt that `call` describes.

        Raises:
            RequestError: it cannot be made, and why.
        """
        table = token_table(self.tokenizer) if call.table else None
        return Prompt(self._encoded(call), self.defaults(), self.stop_ids(), table, self.vocabulary())

    def _encoded(self, call: Call) -> bytes:
        if call.ids is not None:
            return self._given(call.ids)
        if call.text is not None:
            return array("i", self.encode_text(call.text)).tobytes()
        text = self.render(call.messages or [], call.variables)
        return array("i", self.tokenizer.encode(text, add_special_tokens=False).ids).tobytes()
