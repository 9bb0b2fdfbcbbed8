"""YAML as people write configuration in it: plain data, and a key that stands twice in one mapping is an error."""

from __future__ import annotations

from typing import Any

import yaml
from yaml import MarkedYAMLError as MarkedYAMLError
from yaml import YAMLError as YAMLError


class RepeatedKeyError(MarkedYAMLError):
    """A key that its mapping has already: of the two values one would be lost without a word."""


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise RepeatedKeyError(problem="this key is there already", problem_mark=key.start_mark)
            seen.add((key.tag, str(key.value)))
        return node


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
