"""Packages that may be missing: what is said then, and that it names what the project declares."""

from __future__ import annotations

import json.decoder
import re
import tomllib
from pathlib import Path

import pytest

from serverless_llm.errors import ConfigurationError
from serverless_llm.extras import extra

ROOT = Path(__file__).parents[2]


def test_a_package_comes_with_its_modules() -> None:
    assert extra("json>=1", "tests", "decoder").decoder is json.decoder


@pytest.mark.parametrize("modules", [(), ("there",)])
def test_what_is_missing_is_named_with_what_brings_it(modules: tuple[str, ...]) -> None:
    with pytest.raises(ConfigurationError) as missing:
        extra("not_there>=1.0", "tests", *modules)
    assert str(missing.value) == ("tests need not_there (No module named 'not_there'): pip install 'not_there>=1.0'")


def test_what_is_to_be_installed_is_what_the_project_declares() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = [
        requirement
        for path in (*ROOT.glob("serverless_llm/*/*.py"), *ROOT.glob("loader/*.py"))
        for requirement in re.findall(r'\bextra\(\s*"([^"]+)"', path.read_text())
    ]
    assert len(wanted) >= 2
    assert set(wanted) <= {*declared["hub"], *declared["remote"]}
