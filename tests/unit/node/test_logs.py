"""Logs that are cut while they are written."""

from __future__ import annotations

from pathlib import Path

import pytest

from serverless_llm.node import logs


def test_a_log_over_the_limit_is_cut_under_its_writers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "LIMIT", 10)
    path = tmp_path / "agent-node0.log"
    logs.cut(path)
    with path.open("ab", buffering=0) as log:
        for text, kept in ((b"small\n", b"small\n"), (b"large\n", b""), (b"0123456789\n", b""), (b"more\n", b"more\n")):
            log.write(text)
            logs.cut(path)
            assert path.read_bytes() == kept
    assert (tmp_path / "agent-node0.log.1").read_bytes() == b"0123456789\n"


def test_a_log_that_cannot_be_copied_is_cut_nevertheless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "LIMIT", 10)
    (tmp_path / "a.log.1").mkdir()
    (tmp_path / "a.log").write_bytes(bytes(11))
    logs.cut(tmp_path / "a.log")
    assert (tmp_path / "a.log").read_bytes() == b""


def test_a_log_that_cannot_be_reached_or_cut_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "LIMIT", -1)
    logs.cut(tmp_path)
    (tmp_path / "file").touch()
    logs.cut(tmp_path / "file" / "a.log")
