"""docs/decoders.md says of every decoder that transformers lists whether it is served; and it is, or is not."""

from __future__ import annotations

import pytest

from tests.unit.engine.every import every, outcome, written

ROWS = {(kind, name): told for kind, name, told in written()}


def test_the_page_has_every_decoder() -> None:
    assert sorted(ROWS) == sorted(every())


@pytest.mark.storm
@pytest.mark.parametrize(("kind", "name"), sorted(ROWS), ids=lambda one: one)
@pytest.mark.filterwarnings("ignore")
def test_a_decoder_has_transformers_numbers_or_is_refused_as_written(kind: str, name: str) -> None:
    assert outcome(kind, name) == ROWS[kind, name]
