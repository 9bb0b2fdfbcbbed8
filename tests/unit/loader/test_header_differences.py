"""`header.parse` beside the reference: one verdict, but for the differences that docs/header.md lists."""

from __future__ import annotations

import json
import random
import tracemalloc
from base64 import b64decode
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors import SafetensorError, safe_open

from serverless_llm.errors import CheckpointError
from serverless_llm.loader import header
from tests import headers

ROOT = Path(__file__).resolve().parents[3]
CORPUS = [b64decode(one) for one in json.loads((ROOT / "tests" / "headers.json").read_text()).values()]


@pytest.mark.parametrize("difference", headers.DIFFERENCES, ids=lambda one: one.fault)
def test_a_listed_difference_is_one(difference: headers.Difference) -> None:
    mine = headers.ours(difference.example)
    assert isinstance(mine, CheckpointError)
    assert headers.listed(mine) is difference
    assert not isinstance(headers.reference(difference.example), SafetensorError)


def test_the_page_lists_each_difference_and_no_other() -> None:
    lines = (ROOT / "docs" / "header.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ")][2:]
    assert rows == [f"| {one.what} | `...{one.fault}...` | {one.reason} |" for one in headers.DIFFERENCES]


def test_a_fault_in_a_doubled_key_is_the_doubled_keys_difference() -> None:
    content = headers.file(b'{"a":{"dtype":"U8","shape":[],"data_offsets":[2,1]},"a":' + headers.GOOD + b"}", 8)
    assert not headers.disagreement(content, headers.ours(content), headers.reference(content))


def test_the_corpus_is_judged_as_the_reference_judges_it() -> None:
    faults = [headers.disagreement(one, headers.ours(one), headers.reference(one)) for one in CORPUS]
    assert not any(faults)


def test_the_reference_judges_a_file_as_it_judges_bytes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for content in CORPUS[::8]:
        path.write_bytes(content)
        judged = headers.reference(content)
        try:
            with safe_open(path, "pt") as opened:
                names = set(opened.keys())
        except SafetensorError:
            assert isinstance(judged, SafetensorError), content
        else:
            assert not isinstance(judged, SafetensorError), content
            assert names == judged.keys()


@pytest.mark.parametrize("seed", range(3))
def test_generated_headers_are_judged_as_the_reference_judges_them(seed: int) -> None:
    rng = random.Random(seed)
    accepted = 0
    for turn in range(2000):
        content = headers.generated(rng) if turn % 2 else headers.mutant(rng, rng.choice(CORPUS))
        mine = headers.ours(content)
        accepted += not isinstance(mine, CheckpointError)
        assert not headers.disagreement(content, mine, headers.reference(content))
    assert accepted > 200


@pytest.mark.parametrize("bomb", headers.BOMBS, ids=range(len(headers.BOMBS)))
def test_a_big_header_takes_at_most_ten_times_its_bytes(
    bomb: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headers, "BOMBS", [bomb])
    content = headers.big(random.Random(1), 1 << 18)
    tracemalloc.start()
    with suppress(CheckpointError):
        header.parse(content, len(content))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 10 * len(content) + headers.ALLOWANCE
