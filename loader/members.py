"""JSON objects from somebody else, one member at a time: whoever asks takes of each what it means to him."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import NamedTuple

from serverless_llm.errors import CheckpointError

SHOWN = 200  # characters of a string from a document that an error repeats
SPACES = " \t\n\r"  # of JSON
COLON = re.compile(rf"[{SPACES}]*:[{SPACES}]*")
OPEN = re.compile(rf"\{{[{SPACES}]*(\}}[{SPACES}]*)?")
NEXT = re.compile(rf"[{SPACES}]*(?:,[{SPACES}]*|(\}}[{SPACES}]*))")  # group 1: the object's end
SURROGATE = re.compile("[\ud800-\udfff]")  # half a pair, which JSON can smuggle in and no UTF-8 string holds


def _refuse(constant: str) -> None:
    raise ValueError(f"it has {constant}, which is no number of JSON")


DECODER = json.JSONDecoder(parse_constant=_refuse)


class Document(NamedTuple):
    """JSON, and what errors call it."""

    text: str
    what: str

    def object(self, at: int, what: str, member: Callable[[str, int], int]) -> int:
        """Where the object at `at` ends, spaces after it included; `member` takes a key and where its value begins, and
        says where that ends.

        Raises:
            CheckpointError: there is none, or it is broken.
        """
        mark = OPEN.match(self.text, at)
        if mark is None:
            raise CheckpointError(f"{what} does not begin a JSON object")
        while not mark[1]:
            key, at = self.string(mark.end())
            at = member(key, self._past(COLON, at, "no colon").end())
            mark = self._past(NEXT, at, "neither a comma nor the object's end")
        return mark.end()

    def string(self, at: int) -> tuple[str, int]:
        """The string at `at`, and where it ends.

        Raises:
            CheckpointError: there is none, or it is broken.
        """
        if not self.text.startswith('"', at):
            raise self.broken("no string", at)
        try:
            string, end = DECODER.raw_decode(self.text, at)
        except json.JSONDecodeError as error:
            raise self.broken(error.msg, error.pos) from None
        if not string.isascii() and SURROGATE.search(string):
            raise CheckpointError(f"{self.what} has the string {shown(string)}, which is not Unicode text")
        return string, end

    def broken(self, fault: str, at: int) -> CheckpointError:
        return CheckpointError(f"{self.what} is not JSON: {fault} at character {at}")

    def _past(self, pattern: re.Pattern[str], at: int, fault: str) -> re.Match[str]:
        mark = pattern.match(self.text, at)
        if mark is None:
            raise self.broken(fault, at)
        return mark


def shown(string: str) -> str:
    return repr(string if len(string) <= SHOWN else f"{string[:SHOWN]}...")
