"""YAML as people write configuration in it: plain data, in which every key is the text that it is written as, `on` and
`1.10` too, and a key that stands twice in one mapping is an error."""

from __future__ import annotations

from typing import Any

import yaml
from yaml import MarkedYAMLError as MarkedYAMLError
from yaml import YAMLError as YAMLError

TAG = "tag:yaml.org,2002:"
# What YAML makes of plain text:
READ = frozenset(f"{TAG}{kind}" for kind in ("bool", "float", "int", "null", "timestamp"))


class RepeatedKeyError(MarkedYAMLError):
    """A key that its mapping has already: of the two values one would be lost without a word."""


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        node.value = [(_as_written(key), value) for key, value in node.value]
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise RepeatedKeyError(problem=f"the key {key.value!r} is there already", problem_mark=key.start_mark)
            seen.add((key.tag, str(key.value)))
        return node


def _as_written(key: yaml.Node) -> yaml.Node:
    """Another node: an alias of this one may stand as a value."""
    if isinstance(key, yaml.ScalarNode) and key.tag in READ:
        return yaml.ScalarNode(f"{TAG}str", key.value, key.start_mark, key.end_mark)
    return key


def load(text: str) -> Any:
    """The data of one document; None where it is empty.

    Raises:
        YAMLError: it is no YAML, holds more than plain data, or is a RepeatedKeyError.
        ValueError, RecursionError: as Python's own types say.
    """
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()
