"""Messages that several parts end alike."""

from __future__ import annotations

import pytest

from serverless_llm import errors
from serverless_llm.errors import did_you_mean, shortened


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("demo-cuont", ["demo-add", "demo-count"], "; did you mean 'demo-count'?"),
        ("other", ["demo-add"], ""),
        ("a" * 1000, ["a" * 999], ""),
        ("web_search_options", ["stream_options"], ""),
        ("aa", ["a" * 101, "ab", "aab"], "; did you mean 'aab'?"),
        ("name", [*map(str, range(errors.MOST_COMPARED)), "names"], ""),
    ],
)
def test_the_nearest_of_few_and_short_names(name: str, known: list[str], expected: str) -> None:
    assert did_you_mean(name, known) == expected


def test_what_is_cut_says_so() -> None:
    assert (shortened("abcdef", 6), shortened("abcdef", 4)) == ("abcdef", "abc…")
