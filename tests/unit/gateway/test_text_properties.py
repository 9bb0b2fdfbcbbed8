"""For any text, kind of tokenizer, framing and stop strings: what is sent is the whole decode, cut at the stop."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from serverless_llm.gateway.detokenise import (
    NEIGHBOURS,
    REPLACEMENT,
    StopStrings,
    TableVocabulary,
    Vocabulary,
    WindowVocabulary,
)
from serverless_llm.gateway.tables import strings_table, token_table
from tests.unit.gateway.trained import KINDS, THINK, TURN, trained


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    table = token_table(tokenizer)
    if table.decoder:
        return WindowVocabulary(table.blob, table.offsets, table.decoder)
    return TableVocabulary(table.blob, table.offsets, table.strip)


def windows_of(tokenizer: Tokenizer) -> Vocabulary:
    table = strings_table(tokenizer)
    return WindowVocabulary(table.blob, table.offsets, table.decoder)


def cut(text: str, stops: Sequence[str]) -> str:
    """By definition: before the stop string that ends first, the longest of those."""
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return text[: min(ends)[1]] if ends else text


def sent(vocabulary: Vocabulary, ids: Sequence[int], sizes: Sequence[int], stops: Sequence[str]) -> list[str]:
    """The deltas of a stream whose frames have these sizes, what is left over one token at a time."""
    detokeniser, strings = vocabulary.detokeniser(), StopStrings(stops)
    deltas, at = [], 0
    for size in [*sizes, *[1] * len(ids)]:
        deltas.append(strings.feed(detokeniser.feed(ids[at : at + size])))
        at += size
    return [*deltas, strings.feed(detokeniser.finish()), strings.finish()]


WORDS = st.sampled_from(
    [" ", "  ", "\n\n", "don't", " the", "qu", "世界", "😀", "👍🏽", "e\u0301", "\u200d", REPLACEMENT, "▁", THINK, TURN,
     "<0x0A>", "\x00", "ﬁ", " .", "Ġ", "##a", "</w>"]
)  # fmt: skip
TEXTS = st.lists(WORDS | st.text(max_size=6), max_size=12).map("".join)
CUTS = st.lists(st.integers(0, 5), max_size=8)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS, sizes=CUTS, data=st.data())
def test_joined_deltas_are_the_whole_decode_cut_at_the_stop(
    kind: str, text: str, sizes: list[int], data: st.DataObject
) -> None:
    tokenizer = trained(kind)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    whole = tokenizer.decode(ids)
    starts = st.integers(0, max(0, len(whole) - 1))
    inside = st.builds(lambda at, size: whole[at : at + size], starts, st.integers(1, 5)).filter(bool)
    stops = data.draw(st.lists(inside if whole else st.nothing(), max_size=2)) if whole else []
    stops += data.draw(st.lists(st.text(min_size=1, max_size=3), max_size=2))
    wanted = cut(whole, stops)
    for vocabulary in (vocabulary_of(tokenizer), windows_of(tokenizer)):
        deltas = sent(vocabulary, ids, sizes, stops)
        so_far = ""
        for delta in deltas:
            so_far += delta
            assert wanted.startswith(so_far)
        assert so_far == wanted


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS, sizes=CUTS, part=st.integers(0, 100))
def test_a_completion_goes_on_where_its_prompt_ends(kind: str, text: str, sizes: list[int], part: int) -> None:
    tokenizer = trained(kind)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    split = len(ids) * part // 100
    prompt, whole = tokenizer.decode(ids[:split]), tokenizer.decode(ids)
    assume(whole.startswith(prompt) and not prompt.endswith(REPLACEMENT))
    for vocabulary in (vocabulary_of(tokenizer), windows_of(tokenizer)):
        detokeniser = vocabulary.detokeniser(ids[max(0, split - NEIGHBOURS) : split])
        pieces = [detokeniser.feed([token]) for token in ids[split:]]
        assert prompt + "".join(pieces) + detokeniser.finish() == whole
