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
    assert extra("any", "json", "tests", "decoder").decoder is json.decoder


@pytest.mark.parametrize("modules", [(), ("there",)])
def test_what_is_missing_is_named_with_what_brings_it(modules: tuple[str, ...]) -> None:
    with pytest.raises(ConfigurationError) as missing:
        extra("some", "not_there", "tests", *modules)
    assert str(missing.value) == (
        "tests need not_there (No module named 'not_there'): "
        "in a clone of this project, pip install -c constraints.txt '.[some]'"
    )


def test_what_is_to_be_installed_is_what_the_project_declares() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = [
        asked
        for path in (*ROOT.glob("serverless_llm/*/*.py"), *ROOT.glob("loader/*.py"))
        for asked in re.findall(r'\bextra\(\s*"([^"]+)", "([^"]+)"', path.read_text())
    ]
    assert len(wanted) >= 2
    for name, package in wanted:
        assert [one.partition(">=")[0].removesuffix("-cu13") for one in declared[name]] == [package]
