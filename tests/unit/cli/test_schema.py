"""The published schema: equal to the one in docs, and of one opinion with what `serve` takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from serverless_llm import strict_yaml
from serverless_llm.cli.schema import descriptions, schema
from serverless_llm.config import Config, load
from serverless_llm.errors import ConfigurationError
from tests.unit.cli.conftest import CommandLine
from tests.unit.test_config import MISTAKES

PUBLISHED = Path(__file__).parents[3] / "docs" / "serverless-llm.schema.json"
LATER = {  # no YAML, or judged below in another form
    "{port: 1, nodes: 1, port: 2}", "models: {m: &m {source: /x}, n: {<<: *m, source: /y, source: /z}}",
    "models: {1: /x, '1': /y}", "!!python/name:os.system x: 1",
    "port: [", "port: 2021-99-99", "hosts: &a [*a]", "models: {m: {source: /x, keep_alive: soon}}",
}  # fmt: skip
OF_THE_MACHINE = {  # which no schema knows
    "dram: 100TB", "dram: 1000", "dram: 99999999999999999999TB", "{devices: 'cuda:1', device_memory: 1000}",
    "api_key: ${env.NOWHERE}", "api_key: ${env.EMPTY}", "limits: {disk: 500}",
    "limits: 'disk=1GB,disk=2GB'",
}  # fmt: skip
EXAMPLE = """
port: 8000
devices: cpu:2
device_memory: 1GiB
dram: 20%
weights: view
keep_alive: 5m
hold: 1h30m
abandon_after: -1m
drain: 0
orphan_grace: -1
limits: {disk: 500MB/s, upload: 1000000, remote: 50MB/s}
model_roots: [/models]
hosts: a.example,b.example
api_key: ${env.MY_KEY}
threads: ${env.THREADS}
body_limit: 1MiB
models:
  mine: /models/Qwen3-0.6B
  owner/name: owner/name
  other: {source: /models/other, keep_alive: -1, pinned: true, context: 512}
"""


def valid(value: object) -> bool:
    return bool(jsonschema_rs.is_valid(schema(), value))


def test_published_schema_is_this_one(cli: CommandLine) -> None:
    """`serverless-llm serve --print-schema > docs/serverless-llm.schema.json` publishes it again."""
    outcome = cli("serve", "--print-schema")
    assert outcome.status == 0
    assert PUBLISHED.read_text() == outcome.out
    assert json.loads(outcome.out)["properties"].keys() == set(Config.__struct_fields__)


def test_every_key_is_described() -> None:
    assert descriptions(Config).keys() >= set(Config.__struct_fields__)


def test_an_example_is_valid_to_both(tmp_path: Path) -> None:
    file = tmp_path / "serverless-llm.yaml"
    file.write_text(EXAMPLE)
    assert load({}, {"HOME": "/x", "MY_KEY": "k", "THREADS": "2"}, file, memory=8 << 30).threads == 2
    assert valid(strict_yaml.load(EXAMPLE))
    assert valid(None)


@pytest.mark.parametrize("text", [text for text, *_ in MISTAKES if text not in LATER | OF_THE_MACHINE])
def test_a_mistake_is_one_to_both(tmp_path: Path, text: str) -> None:
    assert not valid(strict_yaml.load(text))


def test_defaults_of_the_schema_are_those_of_serve() -> None:
    read: Any = load({"devices": "cpu:1"}, {"HOME": "/x"}, memory=8 << 30)
    for name, key in schema()["properties"].items():
        if "default" in key and name != "devices":  # `auto` stands for those that there are
            assert getattr(read, name) == key["default"]
    with pytest.raises(ConfigurationError):
        load({"devices": "cpu:1", "port": -1}, {"HOME": "/x"}, memory=8 << 30)
