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
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer

from serverless_llm.errors import RequestError
from serverless_llm.gateway import fields
from serverless_llm.gateway.tables import token_table
from serverless_llm.gateway.text_wire import Call, Prompt
from serverless_llm.loader.manifest import confined

MAX_RENDERED = 16 << 20  # characters of one rendered prompt; over any context, far under the memory limit
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# a loop over a message's content; only to ask `content is string` is no sign: Qwen3's then drops what is not one
READS_PARTS = re.compile(r"\bfor\s+\w+\s+in\s+[\w.\[\]'\"]*\bcontent\b")
PROBED = 8  # characters for each token of a context; a text has about four
FAILURES = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)  # as templates fail
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


class Namespace(jinja2.utils.Namespace):
    """`namespace()` without names that Python gives a meaning, as in transformers."""

    def __init__(*arguments: Any, **values: Any) -> None:  # any name may be stored, `self` among them
        self, *given = arguments
        jinja2.utils.Namespace.__init__(
            self, {_storable(name): value for name, value in dict(*given, **values).items()}
        )

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(_storable(name), value)


def _storable(name: Any) -> Any:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace takes no name that begins with an underscore: {name!r}")
    return name


class Dictionary:
    """`dict` for templates, with nothing of the type."""

    def __call__(self, *arguments: Any, **values: Any) -> dict[Any, Any]:
        return dict(*arguments, **values)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        return dict.fromkeys(*arguments)


def environment() -> ImmutableSandboxedEnvironment:
    """The environment that chat templates are written for."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _raise_exception
    made.globals |= {"dict": Dictionary(), "namespace": Namespace}
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


def _text(token: Any) -> str | None:
    """A special token as the files write it: text, or an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _special_tokens(named: dict[str, Any]) -> dict[str, str]:
    """Name -> text, as templates know them: the usual ones, and those of a model's own, such as `image_token`."""
    extra = named.get("extra_special_tokens")
    values = named | (extra if isinstance(extra, dict) else {})
    own = [name for name in values if name.endswith("_token") and name not in SPECIAL]
    texts = {name: _text(values.get(name)) for name in (*SPECIAL, *own)}
    return {name: text for name, text in texts.items() if text}


def _tokenizer(path: Path, special: dict[str, str], named: dict[str, Any]) -> Tokenizer:
    """The tokenizer with what the other files add, as transformers does; it cuts and pads nothing."""
    try:
        made = Tokenizer.from_file(str(path))
    except MemoryError:
        raise
    except Exception as error:  # tokenizers raises nothing else
        raise RequestError(500, "engine_error", f"{path} cannot be used: {error}") from error
    made.no_truncation()
    made.no_padding()
    known = {token.content for token in made.get_added_tokens_decoder().values()}
    listed = sorted((named.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0]))
    made.add_tokens([AddedToken(**token) for _, token in listed if token["content"] not in known])
    extra = named.get("extra_special_tokens") or named.get("additional_special_tokens") or []
    texts = [*special.values(), *filter(None, map(_text, extra if isinstance(extra, list) else []))]
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in texts])
    return made


class CheckpointText:
    """The text side of one checkpoint. Owned by one text process."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        path = _found(directory, "tokenizer.json")
        if path is None:
            raise RequestError(500, "engine_error", f"the checkpoint has no tokenizer.json ({directory})")
        self.nbytes = EXPANSION * path.stat().st_size
        self.settings = _json(directory, "tokenizer_config.json")
        self._config = _json(directory, "config.json")
        self._generation = _json(directory, "generation_config.json")
        named = self._named()
        self.special = _special_tokens(named)
        self.tokenizer = _tokenizer(path, self.special, named)
        self.source = self._template_source()
        self.reads_parts = READS_PARTS.search(self.source or "") is not None
        self._template: jinja2.Template | None = None

    def _named(self) -> dict[str, Any]:
        """tokenizer_config.json, and for a checkpoint without its list of tokens the older special_tokens_map.json."""
        older = {} if "added_tokens_decoder" in self.settings else _json(self.directory, "special_tokens_map.json")
        return self.settings | older

    def _template_source(self) -> str | None:
        path = _found(self.directory, "chat_template.jinja")
        if path is not None:
            return path.read_text(encoding="utf-8")
        value = self.settings.get("chat_template")
        if isinstance(value, list):
            value = {entry["name"]: entry["template"] for entry in value}.get("default")
        return value if isinstance(value, str) else None

    @cached_property
    def defaults(self) -> dict[str, float]:
        """Sampling values of generation_config.json; `do_sample: false` there means greedy, as in transformers.

        What a request could not ask for is left out.
        """
        values: dict[str, float] = {}
        for name, check in fields.SAMPLING.items():
            with contextlib.suppress(RequestError):
                values[name] = check(self._generation.get(name), name)
        return values | ({"temperature": 0.0} if self._generation.get("do_sample") is False else {})

    @cached_property
    def stop_ids(self) -> list[int]:
        """Every id that ends a text, by any of the checkpoint's files, and that its model can choose.

        Raises:
            RequestError: there are too many.
        """
        ids = {*_ids(self._generation.get("eos_token_id")), *_ids(self._config.get("eos_token_id"))}
        named = self.tokenizer.token_to_id(self.special.get("eos_token", ""))
        ids |= set() if named is None else {named}
        if len(ids) > fields.MAX_STOP_IDS:  # every frame that starts a sequence carries them
            raise RequestError(500, "engine_error", f"its files name more than {fields.MAX_STOP_IDS} stop ids")
        return sorted(number for number in ids if number < self.vocabulary)

    @cached_property
    def vocabulary(self) -> int:
        """Ids that the model has rows for; padding rows of its embedding count."""
        size = self._config.get("vocab_size")
        return size if isinstance(size, int) else self.tokenizer.get_vocab_size(with_added_tokens=True)

    def check(self) -> None:
        """
        Raises:
            RequestError: there is a template, and it does not compile.
        """
        try:
            if self.source is not None:
                self._compiled(self.source)
        except (jinja2.TemplateError, RecursionError) as error:
            message = f"its chat template does not compile: {error}"
            raise RequestError(400, "invalid_request_error", message, "messages") from error

    def render(self, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
        """The chat as one text.

        Raises:
            RequestError: no template, or one that is broken or refuses these messages.
        """
        if self.source is None:
            message = "this model has no chat template; /v1/completions (serverless-llm run --raw) needs none"
            raise RequestError(400, "invalid_request_error", message, "messages")
        try:
            return self._run(self._compiled(self.source), messages, variables)
        except (jinja2.TemplateError, *FAILURES) as error:
            message = f"the model's chat template failed: {error}"
            raise RequestError(400, "invalid_request_error", message, "messages") from error

    def _compiled(self, source: str) -> jinja2.Template:
        if self._template is None:
            self._template = environment().from_string(source)
        return self._template

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
        """Ids of a plain prompt, its BOS as tokenizer_config.json's `add_bos_token` says, and never twice."""
        ids: list[int] = self.tokenizer.encode(text).ids
        wanted = self.settings.get("add_bos_token")
        begin = self.tokenizer.token_to_id(self.special.get("bos_token", ""))
        if begin is None:
            return ids
        if isinstance(wanted, bool):
            bare: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
            adds = [begin] if wanted and ids[:1] != [begin] else []
            ids = adds + ids if wanted or ids[:1] != [begin] else bare
        return ids[1:] if ids[:2] == [begin, begin] else ids

    def _checked(self, ids: array[int], param: str) -> bytes:
        """
        Raises:
            RequestError: the model has no row for one of them.
        """
        largest = max(ids, default=0)
        if largest >= self.vocabulary:
            message = f"{param}: token id {largest} is outside the vocabulary of {self.vocabulary}"
            raise RequestError(400, "invalid_request_error", message, param)
        return ids.tobytes()

    def prompt(self, call: Call) -> Prompt:
        """The prompt that `call` describes.

        Raises:
            RequestError: it cannot be made, and why.
        """
        table = token_table(self.tokenizer) if call.table else None
        chats, ids = self.source is not None, self._encoded(call)
        text = self._decoded(ids) if call.echo and call.ids is not None else ""
        return Prompt(ids, self.defaults, self.stop_ids, table, self.vocabulary, chats, text)

    def _probe(self, text: str, context: int, param: str) -> None:
        """Of a text that is far too long its beginning tells so; to tokenise it whole takes seconds, and gigabytes.

        Raises:
            RequestError: it does not fit; the quarter is more than where it was cut can change.
        """
        if not context or len(text) <= 2 * PROBED * context:
            return
        tokens = len(self.tokenizer.encode(text[: PROBED * context], add_special_tokens=False))
        if 4 * tokens > 5 * context:
            told = f"the first {PROBED * context} characters of the prompt alone have {tokens}"
            message = f"the context is {context} tokens long; {told}"
            raise RequestError(400, "context_length_exceeded", message, param)

    def _decoded(self, ids: bytes) -> str:
        text: str = self.tokenizer.decode(array("i", ids).tolist())
        if len(text) > MAX_RENDERED:
            message = f"prompt: its text has more than {MAX_RENDERED} characters"
            raise RequestError(400, "invalid_request_error", message, "prompt")
        return text

    def _encoded(self, call: Call) -> bytes:
        if call.ids is not None:
            return self._checked(array("i", call.ids), "prompt")
        if call.text is not None:
            self._probe(call.text, call.context, "prompt")
            return self._checked(array("i", self.encode_text(call.text)), "prompt")
        if call.messages is None:
            self.check()
            return b""
        text = self.render(call.messages, call.variables)
        self._probe(text, call.context, "messages")
        return self._checked(array("i", self.tokenizer.encode(text, add_special_tokens=False).ids), "messages")
