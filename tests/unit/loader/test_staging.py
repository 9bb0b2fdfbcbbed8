"""Staging memory: huge pages where the system has them, and when it pays."""

from __future__ import annotations

from pathlib import Path

import pytest

from serverless_llm.loader import staging
from serverless_llm.loader.staging import Staging


def test_it_begins_at_a_huge_page_and_copies_as_much_as_asked() -> None:
    stage = Staging(8192)
    assert stage._address % (2 << 20) == 0
    stage.view[:] = bytes(range(256)) * 32
    targets = [memoryview(bytearray(4096)), memoryview(bytearray(4096))]
    stage.copy(targets, 4099)
    assert b"".join(targets) == bytes(range(256)) * 16 + b"\0\1\2" + bytes(4093)


@pytest.mark.parametrize(
    ("pages", "setting", "expected"),
    [
        ("small", "always [madvise] never", True),
        ("small", "always madvise [never]", False),
        ("huge", "always [madvise] never", False),
        ("small", None, False),
    ],
)
def test_it_pays_only_where_the_pool_has_no_huge_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pages: str, setting: str | None, expected: bool
) -> None:
    monkeypatch.setattr(staging, "SETTING", tmp_path / "enabled")
    if setting:
        (tmp_path / "enabled").write_text(setting)
    assert staging.pays(pages) == expected
