"""The wall clock may be stepped at any time: it is shown to people, and decides nothing."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WALL = {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("datetime", "utcnow"), ("date", "today")}
SHOWN = {
    "serverless_llm/cli/models.py": "how long is left until a time that the server shows",
    "serverless_llm/gateway/live.py": "`created` of an answer",
    "serverless_llm/gateway/templates.py": "`strftime_now` of chat templates",
    "serverless_llm/node/controller.py": "the time of an event",
    "serverless_llm/node/registry.py": "`created` and `until` of a model, times of starts",
}  # whoever adds a file says what it shows; deadlines and durations are of time.monotonic or the loop


def reads(path: Path) -> bool:
    """Whether the file reads the wall clock."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and (node.value.id, node.attr) in WALL:
            return True
        if isinstance(node, ast.ImportFrom) and node.module == "time" and any(one.name == "time" for one in node.names):
            return True
    return False


def test_the_wall_clock_is_read_to_be_shown_only() -> None:
    parts = ("serverless_llm", "loader", "placement", "kernels")
    paths = [path for part in parts for path in (ROOT / part).rglob("*.py")]
    found = {str(path.relative_to(ROOT)) for path in paths if reads(path)}
    assert found == set(SHOWN)
