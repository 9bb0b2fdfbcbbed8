"""The fuzzer of headers: it goes on where it stopped, and finds what is broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import fuzz
from serverless_llm.loader import header
from tests import headers

KNOWN = dict(list(json.loads(fuzz.CORPUS.read_text()).items())[:20])


def test_a_call_goes_on_after_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "BATCH", 300)
    monkeypatch.setattr(fuzz, "BIG", (5000, 6000))
    corpus, result = tmp_path / "corpus.json", tmp_path / "fuzz.json"
    corpus.write_text(json.dumps(KNOWN))
    for executions, seeds in ((500, 2), (900, 3)):
        options = ["--executions", str(executions), "--result", str(result), "--corpus", str(corpus)]
        monkeypatch.setattr("sys.argv", ["fuzz", *options, "--processes", "1"])
        assert fuzz.main() == 0
        told = json.loads(result.read_text())
        assert told["state"]["seeds"] == seeds
        rows = {row["metric"]: row["median"] for row in told["rows"]}
        kept = json.loads(corpus.read_text())
        assert (rows["executions"], rows["faults"], rows["corpus"]) == (seeds * 300, 0, len(kept))
        assert len(kept) > len(KNOWN)
    before = result.stat()
    assert fuzz.main() == 0
    assert result.stat() == before  # a call with nothing to do changes nothing


def test_a_parser_that_differs_or_takes_too_much_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "BATCH", 300)
    monkeypatch.setattr(fuzz, "BIG", (5000, 6000))
    monkeypatch.setattr(fuzz, "WEIGHED", 3)
    monkeypatch.setitem(header.DTYPE_BITS, "F33", 33)
    faults = (fuzz.batch(seed, KNOWN).fault for seed in range(10))  # which of them meets one is the corpus's luck
    assert any("only the reference refuses" in fault for fault in faults)
    monkeypatch.undo()
    monkeypatch.setattr(headers, "ALLOWANCE", -1_000_000)
    assert "bytes for" in fuzz.batch(1, KNOWN).fault


def test_a_crash_names_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "FIELDS", None)
    with pytest.raises(TypeError) as caught:
        fuzz.batch(1, KNOWN)
    assert caught.value.__notes__[0].startswith("seed 1: b'")
