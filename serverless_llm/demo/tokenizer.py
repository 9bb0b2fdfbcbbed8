"""The byte-level tokenizer and chat template of demo and random checkpoints, as ordinary Hugging Face files.

A token id below 256 is that byte; five markers follow. There are no merges, so one ASCII character is one token.
The template renders the last user message and what follows it, and nothing before: these models answer one prompt
and know of no conversation, so that system messages and earlier turns do no harm.
"""

import json
from pathlib import Path
from typing import Any

BEGIN, END, USER, ASSISTANT, SYSTEM = range(256, 261)
MARKERS = {
    "<|begin|>": BEGIN,
    "<|end|>": END,
    "<|user|>": USER,
    "<|assistant|>": ASSISTANT,
    "<|system|>": SYSTEM,
}
VOCABULARY = 264  # 261 ids in use, padded to a multiple of 8

CHAT_TEMPLATE = (
    "{%- set ns = namespace(first=0) -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{%- set ns.first = loop.index0 -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- for message in messages[ns.first:] -%}"
    "{%- set role = message['role'] if message['role'] in ('user', 'assistant') else 'system' -%}"
    "{{- '<|' + role + '|>' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- elif message['content'] -%}"
    "{%- for part in message['content'] -%}{%- if part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def _byte_characters() -> list[str]:
    """Byte value -> the printable character that stands for it in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def chat_tokens(prompt: str) -> list[int]:
    """The token ids that the template gives for one user message and the generation prompt."""
    return [USER, *prompt.encode(), END, ASSISTANT]


def chat_text(prompt: str) -> str:
    """The same as text, for `/v1/completions`: the markers in it become single tokens."""
    return f"<|user|>{prompt}<|end|><|assistant|>"


def tokenizer_json() -> dict[str, Any]:
    """The contents of `tokenizer.json`."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": text, **flags} for text, number in MARKERS.items()],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {character: byte for byte, character in enumerate(_byte_characters())},
            "merges": [],
        },
    }


def tokenizer_config_json(longest: int) -> dict[str, Any]:
    """The contents of `tokenizer_config.json`; `longest` is the model's context in tokens."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "pad_token": "<|end|>",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": longest,
        "chat_template": CHAT_TEMPLATE,
    }


def write_json(path: Path, contents: dict[str, Any]) -> None:
    """Write one of a checkpoint's JSON files, indented as on the hub."""
    path.write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(directory: Path, longest: int) -> None:
    """Write both tokenizer files into `directory`."""
    write_json(directory / "tokenizer.json", tokenizer_json())
    write_json(directory / "tokenizer_config.json", tokenizer_config_json(longest))


def write_configs(directory: Path, config: dict[str, Any]) -> None:
    """Write `config.json` and `generation_config.json` with this tokenizer's end marker as the stop token."""
    tokens = {"bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": END}
    write_json(directory / "config.json", config | tokens)
    write_json(directory / "generation_config.json", tokens | {"do_sample": False})
