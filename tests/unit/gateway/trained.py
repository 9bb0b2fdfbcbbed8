"""One small tokenizer of each kind that checkpoints carry, trained here: the same in every run."""

from __future__ import annotations

import functools
import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog, doesn't it? It's 1,234.5 times as quick.",
    "Der schnelle braune Fuchs; la vivacità è già là. naïve café",
    "def f(x):\n    return x  # a  comment\n\n\tend",
    "世界 こんにちは мир 😀👍🏽 e\u0301 \u200d <b>",
] * 2
BEGIN, END, TURN, THINK = "<s>", "</s>", "<|im_start|>", "<think>"
SPECIAL = ["<unk>", BEGIN, END]
VOCABULARY = 420
MARK = "▁"
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ALPHABET = sorted({character for text in CORPUS for character in text.replace(" ", MARK)})
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _byte_level(split: pre_tokenizers.PreTokenizer | None) -> Tokenizer:
    """GPT-2's shape; with a split of its own Llama 3's and Qwen's."""
    made = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    made.pre_tokenizer = byte_level if split is None else pre_tokenizers.Sequence([split, byte_level])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def _byte_fallback(first: list[normalizers.Normalizer], strip: int, split: bool = False) -> Tokenizer:
    """SentencePiece BPE as converted for Llama 2 and Gemma: `▁` for spaces, `<0x..>` for unknown characters."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if split:
        made.pre_tokenizer = pre_tokenizers.Metaspace(replacement=MARK, prepend_scheme="first", split=False)
    else:
        made.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", MARK)])
    chain = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*chain, *([decoders.Strip(" ", strip, 0)] if strip else [])])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY + 256, special_tokens=[*SPECIAL, *BYTES], initial_alphabet=ALPHABET, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return _plain_bytes(made)


def _plain_bytes(made: Tokenizer) -> Tokenizer:
    """The byte pieces belong to the vocabulary alone, as SentencePiece's conversion writes them."""
    spec = json.loads(made.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in BYTES]
    return Tokenizer.from_str(json.dumps(spec))


def _unigram() -> Tokenizer:
    """T5's and XLM-R's shape: whole decoder Metaspace, which knows the first token from the others."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement=MARK, prepend_scheme="always")
    made.decoder = decoders.Metaspace(replacement=MARK, prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def _wordpiece() -> Tokenizer:
    """BERT's shape."""
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    trainer = trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    return made


def _suffixed() -> Tokenizer:
    """CLIP's and the first GPT's shape: `</w>` ends a word."""
    made = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


KINDS = {
    "byte-level": lambda: _byte_level(None),
    "byte-level-split": lambda: _byte_level(pre_tokenizers.Split(Regex(QWEN), "isolated")),
    "metaspace-prepended": lambda: _byte_fallback([normalizers.Prepend(MARK)], strip=1),
    "metaspace-bare": lambda: _byte_fallback([], strip=0),
    "metaspace-first": lambda: _byte_fallback([], strip=1, split=True),
    "unigram": _unigram,
    "wordpiece": _wordpiece,
    "suffixed": _suffixed,
}


@functools.cache
def trained(kind: str) -> Tokenizer:
    """A tokenizer of this kind that begins texts with `BEGIN`, and knows a special and a plain added token."""
    made = KINDS[kind]()
    made.add_special_tokens([AddedToken(TURN, special=True, normalized=False)])
    made.add_tokens([AddedToken(THINK, special=False, normalized=False)])
    made.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, made.token_to_id(BEGIN))]
    )
    return made
