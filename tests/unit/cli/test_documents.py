"""What the documents show must be what the product takes: command lines, flags, files."""

from __future__ import annotations

import re
import shlex
import textwrap
import tomllib
from pathlib import Path

import click
import msgspec
import pytest

from serverless_llm.cli.main import VERBS, cli
from serverless_llm.config import load
from serverless_llm.gateway import keys, openapi

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OF_OTHERS = {"--index-url", "--user-group", "--system", "--home-dir", "--now", "--build-arg", "--time", "--format"}


def shown() -> list[str]:
    """Every command line of the product, in blocks of code and in the text."""
    found = re.findall(r"ExecStart=(.*)", (ROOT / "docs" / "serverless-llm.service").read_text())
    for page in PAGES:
        text = page.read_text()
        found += re.findall(r"`(serverless-llm [^`]+)`", text)
        found += [line.strip() for line in text.splitlines() if line.startswith("    ")]
    lines = (re.search(rf"(?:^|[\s/])serverless-llm ((?:{'|'.join(VERBS)}) [^#>|]+)", line) for line in found)
    return sorted({line[1].strip() for line in lines if line})


def test_there_are_command_lines() -> None:
    assert len(shown()) > 5


@pytest.mark.parametrize("line", shown())
def test_a_command_line_that_is_shown_can_be_given(line: str) -> None:
    verb, *arguments = shlex.split(line)
    command = cli.get_command(click.Context(cli), verb)
    assert command is not None
    try:
        command.make_context(verb, arguments)
    except click.exceptions.Exit:
        assert "--help" in line


def test_every_flag_that_is_told_of_is_there() -> None:
    verbs = [cli.get_command(click.Context(cli), verb) for verb in VERBS]
    verbs += [one for verb in verbs if isinstance(verb, click.Group) for one in verb.commands.values()]
    there = {option for verb in verbs if verb for one in verb.params for option in one.opts} | {"--help", "--version"}
    for page in (ROOT / "docs" / "command-line.md", ROOT / "docs" / "operations.md"):
        told = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page.read_text()))
        assert told - there - OF_OTHERS == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_has_anybody_install_what_pypi_has_under_our_name(page: Path) -> None:
    assert not re.search(r"pip install[^\n`]* serverless-llm\b", page.read_text())


def block(page: Path, first: str) -> str:
    """The block of code that begins with a line."""
    return textwrap.dedent(
        re.findall(rf"(?m)^(    {re.escape(first)}.*\n(?:    .*\n|\n(?=    ))*)", page.read_text())[0]
    )


def test_the_configuration_of_the_readme_is_one(tmp_path: Path) -> None:
    file = tmp_path / "serverless-llm.yaml"
    file.write_text(block(ROOT / "README.md", "port: 8000"))
    read = load({}, {"HOME": "/x", "MY_KEY": "secret"}, file, memory=64 << 30)
    assert (read.devices, read.api_key, list(read.models)) == ("cpu:2", "secret", ["mine", "other"])


def test_the_guide_has_a_command_for_every_route_of_operators() -> None:
    routes = msgspec.json.decode(openapi.document())["paths"]
    there = {
        (verb.upper(), path.replace("{name}", "node0" if "/nodes/" in path else "NAME"))
        for path, item in routes.items()
        if path.startswith("/admin/")
        for verb in item.keys() - {"parameters"}
    }
    guide = (ROOT / "docs" / "operations.md").read_text()
    found = re.findall(r"(?m)^\| `curl (?:-N )?(?:-X (\w+) )?\"?\$URL([^ ?`]+)", guide)
    assert sorted((verb or "GET", path) for verb, path in found) == sorted(there)


def test_nobody_is_told_to_install_another_project() -> None:
    """The package index has something else under this name."""
    texts = {path.name: path.read_text() for path in (*PAGES, *(ROOT / "serverless_llm").rglob("*.py"))}
    assert [name for name, text in texts.items() if "serverless-llm[" in text] == []
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = re.compile(r"""constraints\.txt '\.\[([\w-]+)\]'|(?:extra|how_to_install)\("([\w-]+)\"""")
    named = {name for text in texts.values() for pair in asked.findall(text) for name in pair if name}
    assert named == {"gds", "hub", "remote", "transformers"} <= extras.keys()  # by pages and errors


def test_the_keys_of_the_guide_are_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(block(ROOT / "docs" / "operations.md", "- id: chatbot").replace("9f86d081884c7d65...", "9f" * 32))
    file.chmod(0o600)
    chatbot, operator = keys.read(file, {"CHATBOT_KEY": "k"})
    assert (chatbot.requests_per_minute, chatbot.concurrency) == (600, 32)
    assert operator.scopes == {"inference", "admin"}
