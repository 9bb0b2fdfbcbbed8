"""Which token's logprobs go with which text, and what tokens are called."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from serverless_llm.demo import tokenizer as demo
from serverless_llm.gateway import logprobs
from serverless_llm.gateway.detokenise import StopStrings, TableVocabulary, WindowVocabulary
from serverless_llm.gateway.logprobs import Scored, Scores
from serverless_llm.gateway.tables import strings_table, token_table
from serverless_llm.gateway.text_wire import Table

BYTES = TableVocabulary(bytes(range(256)), b"".join(n.to_bytes(4, "little") for n in range(257)), 0, {300: "<|end|>"})


def window(table: Table) -> WindowVocabulary:
    return WindowVocabulary(table.blob, table.offsets, table.decoder, table.special)


@given(st.text(max_size=20), st.lists(st.text(min_size=1, max_size=3), max_size=3), st.data())
def test_the_tokens_that_are_told_of_make_the_text_that_is_sent(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    detokeniser, strings, scores = BYTES.detokeniser(), StopStrings(stops), Scores()
    sent, told, raw = "", [], text.encode()
    while raw and not strings.found:
        cut = data.draw(st.integers(1, len(raw)))
        likelihoods: list[tuple[float, list[int], list[float]]] = [(-0.5, [], [])] * cut
        piece = strings.feed(scores.feed(detokeniser, list(raw[:cut]), likelihoods))
        scores.sent(len(piece))
        sent, raw = sent + piece, raw[cut:]
        told += scores.take(rest=False)
        assert bytes(one.token for one in told).decode() == sent
    if not strings.found:
        rest = strings.finish()
        scores.sent(len(rest))
        told += scores.take(rest=True)
        sent += rest
    assert bytes(one.token for one in told).decode() == sent
    assert [one.start for one in told] == [
        len(sent.encode()[:place].decode(errors="ignore")) for place in range(len(sent.encode()))
    ]


def test_special_tokens_have_names_and_parts_of_characters_too(tmp_path: Path) -> None:
    demo.write_tokenizer(tmp_path, 256)
    table = token_table(Tokenizer.from_file(str(tmp_path / "tokenizer.json")))
    vocabulary = TableVocabulary(table.blob, table.offsets, table.strip, table.special)
    assert [vocabulary.piece(token) for token in (65, demo.END, 263)] == [b"A", b"<|end|>", b""]
    one = Scored(195, 0, (-1.0, [demo.END, 188], [-0.1, -2.0]))
    assert logprobs.text([one], vocabulary.piece)["top_logprobs"] == [{"<|end|>": -0.1, "\\xbc": -2.0, "\\xc3": -1.0}]
    (entry,) = logprobs.chat([one], vocabulary.piece)["content"]
    assert (entry["token"], entry["bytes"]) == ("\\xc3", [195])


def test_a_window_knows_what_a_token_is_amid_others() -> None:
    made = Tokenizer(models.WordLevel({"▁the": 0, "▁cat": 1, "s": 2, "[UNK]": 3}, "[UNK]"))
    made.add_special_tokens(["<s>"])
    made.decoder = decoders.Metaspace()
    vocabulary = window(strings_table(made))
    assert [vocabulary.piece(token) for token in (0, 1, 2, 4, 99)] == [b" the", b" cat", b"s", b"<s>", b""]


def test_tokens_that_look_alike_are_told_once() -> None:
    told = logprobs.text([Scored(5, 0, (-1.0, [5, 6], [-1.0, -2.0]))], lambda _: b"x")
    assert told["top_logprobs"] == [{"x": -1.0}]
