"""Joined deltas equal the whole decode, for any text, any bytes and any cutting into frames."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from serverless_llm.demo.tokenizer import ASSISTANT, END, tokenizer_json
from serverless_llm.errors import RequestError
from serverless_llm.gateway import tables
from serverless_llm.gateway.detokenise import (
    LONGEST_WINDOW,
    REPLACEMENT,
    Detokeniser,
    StopStrings,
    TableVocabulary,
    Vocabulary,
    WindowVocabulary,
    _WindowDetokeniser,
)
from serverless_llm.gateway.tables import strings_table, token_table

BYTE_LEVEL = Tokenizer.from_str(json.dumps(tokenizer_json()))


def sentencepiece(decoder: dict[str, Any]) -> Tokenizer:
    """A byte-fallback vocabulary as Llama 2's: three markers, 256 bytes, some pieces."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁a",
        "b",
        "▁▁",
        "é",
        "世",
        "a▁b",
    ]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    model = {"type": "BPE", "unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True, "merges": []}
    return Tokenizer.from_str(
        json.dumps(
            {
                "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": None,
                "post_processor": None, "decoder": decoder,
                "added_tokens": [{"id": number, "content": pieces[number], **special} for number in range(3)],
                "model": model | {"vocab": {piece: number for number, piece in enumerate(pieces)}},
            }
        )
    )  # fmt: skip


CHAIN: list[dict[str, Any]] = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
STRIP: dict[str, Any] = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
LLAMA = sentencepiece({"type": "Sequence", "decoders": [*CHAIN, STRIP]})
GEMMA = sentencepiece({"type": "Sequence", "decoders": CHAIN})
METASPACE = sentencepiece({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True})


def tabled(tokenizer: Tokenizer) -> Vocabulary:
    table = token_table(tokenizer)
    assert not table.decoder
    return TableVocabulary(table.blob, table.offsets, table.strip)


def windowed(tokenizer: Tokenizer) -> Vocabulary:
    table = strings_table(tokenizer)
    return WindowVocabulary(table.blob, table.offsets, table.decoder)


def deltas(detokeniser: Detokeniser, frames: Sequence[Sequence[int]]) -> list[str]:
    return [*(detokeniser.feed(frame) for frame in frames), detokeniser.finish()]


def frames_of(ids: list[int], sizes: list[int]) -> list[list[int]]:
    """`ids` cut into frames of these sizes, the rest one by one."""
    frames, at = [], 0
    for size in sizes:
        frames.append(ids[at : at + size])
        at += size
    return frames + [[number] for number in ids[at:]]


CUTS = st.lists(st.integers(0, 5), max_size=10)
WINDOW = windowed(BYTE_LEVEL)


@pytest.mark.parametrize("vocabulary", [tabled(BYTE_LEVEL), WINDOW], ids=["table", "window"])
@given(text=st.text(max_size=40), sizes=CUTS)
def test_any_text(vocabulary: Vocabulary, text: str, sizes: list[int]) -> None:
    pieces = deltas(vocabulary.detokeniser(), frames_of([*text.encode(), END], sizes))
    assert "".join(pieces) == text
    assert REPLACEMENT in text or not any(REPLACEMENT in piece for piece in pieces)


@given(ids=st.lists(st.integers(0, 300), max_size=40), sizes=CUTS)
def test_any_tokens_of_a_byte_level_vocabulary(ids: list[int], sizes: list[int]) -> None:
    pieces = deltas(tabled(BYTE_LEVEL).detokeniser(), frames_of(ids, sizes))
    assert "".join(pieces) == BYTE_LEVEL.decode(ids)


PIECES = st.integers(0, 2) | st.integers(259, 265) | st.sampled_from(list(range(3, 131)))  # bytes: ASCII only


@pytest.mark.parametrize("tokenizer", [LLAMA, GEMMA], ids=["llama", "gemma"])
@given(ids=st.lists(PIECES, max_size=30), tail=st.text(max_size=4), sizes=CUTS)
def test_any_tokens_of_a_byte_fallback_vocabulary(
    tokenizer: Tokenizer, ids: list[int], tail: str, sizes: list[int]
) -> None:
    whole = ids + [3 + byte for byte in tail.encode()]
    for vocabulary in (tabled(tokenizer), windowed(tokenizer)):
        assert "".join(deltas(vocabulary.detokeniser(), frames_of(whole, sizes))) == tokenizer.decode(whole)


@given(ids=st.lists(st.integers(259, 265), max_size=30), sizes=CUTS)
def test_a_decoder_without_a_table(ids: list[int], sizes: list[int]) -> None:
    assert token_table(METASPACE).decoder
    pieces = deltas(windowed(METASPACE).detokeniser(), frames_of(ids, sizes))
    assert "".join(pieces) == METASPACE.decode(ids)


@pytest.mark.parametrize(
    "decoder",
    [
        {"type": "Sequence", "decoders": [*CHAIN[:2]]},
        {"type": "Sequence", "decoders": [*CHAIN, STRIP | {"content": "x"}]},
        {"type": "BPEDecoder", "suffix": "</w>"},
        None,
    ],
)  # fmt: skip
def test_decoders_that_no_table_describes(decoder: Any) -> None:
    tokenizer = sentencepiece(decoder)
    assert token_table(tokenizer).decoder
    ids = [263, 3, *range(259, 265)]
    assert "".join(deltas(windowed(tokenizer).detokeniser(), [ids])) == tokenizer.decode(ids)


REPLACE = CHAIN[0]


@pytest.mark.parametrize(
    ("decoder", "named"),
    [
        (REPLACE | {"pattern": {"Regex": "(a+)+b"}}, "Replace"),  # may take for ever
        (REPLACE | {"pattern": {"String": ""}}, "Replace"),
        (REPLACE | {"content": "aaaa"}, "Replace"),  # a chain of these writes without end
        ({"type": "Sequence", "decoders": [{"type": "Sequence", "decoders": [REPLACE | {"content": "aaaa"}]}]}, "Rep"),
        ({"type": "BPEDecoder", "suffix": ""}, "BPEDecoder"),
        ({"type": "Sequence", "decoders": [*CHAIN, STRIP | {"stop": 1}]}, "Strip"),  # panics
        ({"type": "CTC", "pad_token": "a", "word_delimiter_token": "", "cleanup": True}, "CTC"),
        ({"type": "Sequence", "decoders": [REPLACE] * 17}, "so long"),
    ],
)
def test_decoders_that_could_keep_the_gateway_busy_are_refused(decoder: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError, match=f"{named}.* not supported"):
        token_table(sentencepiece(decoder))


def test_long_tokens_are_for_tables_only() -> None:
    tokenizer = json.loads(METASPACE.to_str())
    tokenizer["model"]["vocab"]["a" * 4097] = 266
    with pytest.raises(RequestError, match="so long"):
        token_table(Tokenizer.from_str(json.dumps(tokenizer)))


def test_a_vocabulary_has_a_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MOST_BYTES", 1000)
    with pytest.raises(RequestError, match="vocabulary of more than"):
        token_table(LLAMA)


def test_a_window_does_not_grow_without_text() -> None:
    """Each token costs the same, however many came before."""
    lengths: list[int] = []

    def text_of(tokens: Sequence[int]) -> str:
        lengths.append(len(tokens))
        return ""

    window = _WindowDetokeniser(text_of)
    for token in range(1000):
        window.feed([token])
    assert max(lengths) <= 2 * LONGEST_WINDOW


def test_an_incomplete_character_waits_for_its_last_byte() -> None:
    smile = "😀".encode()
    for vocabulary in (tabled(BYTE_LEVEL), WINDOW):
        assert deltas(vocabulary.detokeniser(), [[byte] for byte in smile]) == ["", "", "", "😀", ""]


def test_frames_that_all_end_within_a_character_are_no_broken_text() -> None:
    detokeniser = WINDOW.detokeniser()
    smiles = "😀" * 14
    assert "".join(deltas(detokeniser, frames_of([*smiles.encode()], [7] * 8))) == smiles


def test_bytes_that_make_no_character_do_not_wait_for_ever() -> None:
    detokeniser = WINDOW.detokeniser()
    assert REPLACEMENT in "".join(detokeniser.feed([0x80]) for _ in range(LONGEST_WINDOW))


@pytest.mark.parametrize("count", [*range(18, 26), 40, 64, 200])
def test_a_row_of_replacement_characters_is_text_as_any_other(count: int) -> None:
    whole = f"é{REPLACEMENT * count}世é"
    assert "".join(deltas(WINDOW.detokeniser(), frames_of([*whole.encode()], []))) == whole


def test_added_tokens_outside_the_byte_table_stand_for_themselves() -> None:
    spec = tokenizer_json()
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    spec["added_tokens"].append({"id": 261, "content": "a b", **flags})
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    assert "".join(deltas(tabled(tokenizer).detokeniser(), [[261], [99]])) == tokenizer.decode([261, 99]) == "a bc"


def test_a_piece_that_only_looks_like_a_byte_is_text() -> None:
    tokenizer = sentencepiece({"type": "Sequence", "decoders": CHAIN})
    tokenizer.add_tokens(["<0xZZ>"])
    odd = tokenizer.token_to_id("<0xZZ>")
    assert odd is not None
    assert "".join(deltas(tabled(tokenizer).detokeniser(), [[odd]])) == tokenizer.decode([odd]) == "<0xZZ>"


def test_special_tokens_are_no_text() -> None:
    assert deltas(tabled(BYTE_LEVEL).detokeniser(), [[ASSISTANT, ord("a"), END, 5000]]) == ["a", ""]


# --- stop strings ---


def cut(text: str, stops: Sequence[str]) -> str:
    """By definition: before the stop string that ends first, the longest of those."""
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return text[: min(ends)[1]] if ends else text


ALPHABET = st.text(alphabet="ab", max_size=12)


@given(
    text=ALPHABET,
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3),
    sizes=st.lists(st.integers(1, 4), max_size=12),
)
def test_the_text_ends_before_the_first_stop_string(text: str, stops: list[str], sizes: list[int]) -> None:
    strings = StopStrings(stops)
    sent, at = "", 0
    for size in [*sizes, len(text)]:
        sent += strings.feed(text[at : at + size])
        at += size
        assert cut(text, stops).startswith(sent)
    assert sent + strings.finish() == cut(text, stops)
    assert strings.found == (cut(text, stops) != text or any(stop in text for stop in stops))


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    strings = StopStrings(["END"])
    assert [strings.feed(piece) for piece in ("xE", "N", "x", "E")] == ["x", "", "ENx", ""]
    assert strings.finish() == "E"


def test_nothing_follows_a_stop_string() -> None:
    strings = StopStrings(["."])
    assert [strings.feed("a.b"), strings.feed("c"), strings.finish()] == ["a", "", ""]
