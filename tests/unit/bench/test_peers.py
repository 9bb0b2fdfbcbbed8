"""The peers' environments, as far as that needs no network."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench import peers


def test_where_an_environment_is_made_is_told_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SERVERLESS_LLM_PEERS", str(tmp_path / "file"))
    monkeypatch.setattr(sys, "argv", ["peers", "moto"])
    with pytest.raises(OSError, match="file"):
        peers.main()
    assert capsys.readouterr().out == f"moto: making {tmp_path}/file/moto, which takes minutes\n"
