"""Tokens to text, piece by piece: joined deltas equal the whole decode, cut at the first stop string.

An incomplete character is held back until its last byte is there. Of a stop string nothing is ever sent: what could
be the beginning of one waits until it is known not to be.
"""

from __future__ import annotations

import codecs
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from tokenizers import decoders

REPLACEMENT = "\ufffd"
# Tokens that a window takes in before it shows what they make, be it no text or no character: a decoder's time stays in
# proportion. A character takes 4 at most, but one may itself be U+FFFD, which looks like a part of one: this is a
# multiple of 1, 2, 3 and 4, so that a row of those is cut between two, of however many tokens they are.
LONGEST_WINDOW = 60
NEIGHBOURS = 16  # arbitrary: tokens before a text, one of which is hardly ever no text


class Detokeniser(Protocol):
    """One stream's decoder. `feed` returns the text that is now certain, `finish` what was held back."""

    def feed(self, tokens: Sequence[int]) -> str: ...

    def finish(self) -> str: ...


class Vocabulary(Protocol):
    """What makes detokenisers for one checkpoint; `nbytes` is its place in the cache.

    `after`: tokens, the last `NEIGHBOURS` of them at most, whose text the stream's goes on with: it is no beginning, of
    which some decoders take a space away.
    """

    nbytes: int

    def detokeniser(self, after: Sequence[int] = ()) -> Detokeniser: ...

    def piece(self, token: int) -> bytes:
        """What one token stands for amid others; a special one: its name."""
        ...


class TableVocabulary:
    """Token id -> bytes, see `text_wire.Table`."""

    def __init__(self, blob: bytes, offsets: bytes, strip: int, special: Mapping[int, str] | None = None) -> None:
        self._blob = blob
        self._offsets = array("I", offsets)
        self._strip = strip
        self._special = special or {}
        self.nbytes = len(blob) + len(offsets)

    def bytes_of(self, tokens: Sequence[int]) -> bytes:
        """Unknown ids stand for nothing, as in tokenizers."""
        blob, offsets, last = self._blob, self._offsets, len(self._offsets) - 1
        if len(tokens) == 1:
            token = tokens[0]
            return blob[offsets[token] : offsets[token + 1]] if 0 <= token < last else b""
        return b"".join(blob[offsets[token] : offsets[token + 1]] for token in tokens if 0 <= token < last)

    def piece(self, token: int) -> bytes:
        return self.bytes_of((token,)) or self._special.get(token, "").encode()

    def detokeniser(self, after: Sequence[int] = ()) -> Detokeniser:
        return _TableDetokeniser(self, 0 if self.bytes_of(after) else self._strip)


class _TableDetokeniser:
    def __init__(self, vocabulary: TableVocabulary, strip: int) -> None:
        self._bytes_of = vocabulary.bytes_of
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._strip = strip

    def feed(self, tokens: Sequence[int]) -> str:
        text = self._decode(self._bytes_of(tokens))
        return self._stripped(text) if self._strip else text

    def finish(self) -> str:
        return self._decode(b"", True)

    def _stripped(self, text: str) -> str:
        """Only leading spaces of the whole text go, so the first other character ends the search."""
        if not text:
            return text
        rest = text.lstrip(" ")
        removed = min(self._strip, len(text) - len(rest))
        self._strip = self._strip - removed if not rest and removed < self._strip else 0
        return text[removed:]


class WindowVocabulary:
    """For decoders without a table: overlapping windows of tokens, see `text_wire.Table.decoder`."""

    def __init__(self, blob: bytes, offsets: bytes, decoder: bytes, special: Mapping[int, str] | None = None) -> None:
        self._strings = TableVocabulary(blob, offsets, 0, special)
        self._decoder = decoders.Fuse()  # any will do: its state makes it the one that is meant
        self._joined = decoder == b"null"
        if not self._joined:
            self._decoder.__setstate__(decoder)
        self.nbytes = self._strings.nbytes

    def text_of(self, tokens: Sequence[int]) -> str:
        strings = [raw.decode() for token in tokens if (raw := self._strings.bytes_of((token,)))]
        return " ".join(strings) if self._joined else self._decoder.decode(strings)

    def piece(self, token: int) -> bytes:
        if not self._strings.bytes_of((token,)):
            return self._strings.piece(token)
        return self.text_of((token, token))[len(self.text_of((token,))) :].encode()

    def detokeniser(self, after: Sequence[int] = ()) -> Detokeniser:
        while after and REPLACEMENT in self.text_of(after):  # it begins within a character
            after = after[1:]
        return _WindowDetokeniser(self.text_of, after)


class _WindowDetokeniser:
    """Decodes from the last two cuts on, so that what a token looks like beside its neighbours is kept."""

    def __init__(self, text_of: Callable[[Sequence[int]], str], after: Sequence[int] = ()) -> None:
        self._text_of = text_of
        self._window = list(after)
        self._known = len(after)  # tokens of the window whose text was returned

    def feed(self, tokens: Sequence[int]) -> str:
        return "".join(map(self._feed, tokens))  # one by one: several may all end within characters

    def _feed(self, token: int) -> str:
        self._window.append(token)
        before, after = self._decoded()
        pending = len(self._window) - self._known
        if pending < LONGEST_WINDOW and (len(after) <= len(before) or after.endswith(REPLACEMENT)):
            return ""
        del self._window[: self._known]
        self._known = len(self._window)
        return after[len(before) :]

    def finish(self) -> str:
        before, after = self._decoded()
        self._known = len(self._window)
        return after[len(before) :]

    def _decoded(self) -> tuple[str, str]:
        return self._text_of(self._window[: self._known]), self._text_of(self._window)


class StopStrings:
    """Cuts a text at the stop string that ends first (the longest of those that end together)."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """The text that may be sent; empty once a stop string was found."""
        if self.found:
            return ""
        if not self._stops:
            return text
        held = self._held + text
        ends = [(at + len(stop), at) for stop in self._stops if (at := held.find(stop)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return held[: min(ends)[1]]
        keep = self._beginning(held)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self) -> str:
        """What was held back, the text being over."""
        held, self._held = self._held, ""
        return held

    def _beginning(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        for length in range(longest, 0, -1):
            end = text[len(text) - length :]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
