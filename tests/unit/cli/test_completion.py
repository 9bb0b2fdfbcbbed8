"""What arguments complete to."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from serverless_llm.cli.main import main
from tests.unit.cli.conftest import CommandLine, Scripted

Completed = Callable[[str], list[str]]


@pytest.fixture
def known(server: Scripted, cli: CommandLine, tmp_path: Path) -> None:
    """A server with two models and two logs."""
    server.answers["GET", "/v1/models"] = (200, {"data": [{"id": "demo-add"}, {"id": "demolition"}]})
    (tmp_path / "head.json").write_text(json.dumps({"url": server.url, "generation": 1, "pid": os.getpid()}))
    (tmp_path / "logs").mkdir()
    for name in ("head", "agent-node0"):
        (tmp_path / "logs" / f"{name}.log").touch()


@pytest.fixture
def completed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Completed:
    """What bash is told of the last word of a line."""

    def complete(line: str) -> list[str]:
        words = ["serverless-llm", *line.split()]
        monkeypatch.setenv("_SERVERLESS_LLM_COMPLETE", "bash_complete")
        monkeypatch.setenv("COMP_WORDS", " ".join(words))
        monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
        with pytest.raises(SystemExit):
            main([])
        return capsys.readouterr().out.splitlines()

    return complete


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("run demo", ["dir,demo", "plain,demo-count", "plain,demo-add", "plain,demo-reverse", "plain,demolition"]),
        ("show demo-a", ["dir,demo-a", "plain,demo-add"]),
        ("deploy demol", ["dir,demol", "plain,demolition"]),
        ("deploy mine demo-r", ["dir,demo-r", "plain,demo-reverse"]),
        ("rm demo", ["plain,demo-add", "plain,demolition"]),
        ("logs n", ["plain,node0"]),
        ("make-checkpoint --like qwen3-0", ["plain,qwen3-0.6b"]),
        ("logs node0 h", ["plain,head"]),
    ],
)
def test_names_complete(cli: CommandLine, completed: Completed, line: str, expected: list[str]) -> None:
    assert completed(line) == expected


def test_logs_of_elsewhere_complete_to_nothing(
    cli: CommandLine, completed: Completed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVERLESS_LLM_URL", "http://gpu.invalid")
    assert completed("logs h") == [""]
