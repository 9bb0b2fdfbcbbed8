"""Typed access to an untrusted config.json, which remembers what was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from serverless_llm.errors import CheckpointError

MOST = 1 << 31  # of any count; an arbitrary bound that every index type holds
MOST_PARTS = 10_000  # layers, or experts in a layer; an arbitrary bound on what is built for each


class Reader:
    """A JSON object of a checkpoint. A key that is absent or null takes the default.

    Attributes:
        used: every key that was asked for; what else is in the object does not reach the mathematics.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.used: set[str] = set()
        self._config = config

    def get(self, key: str) -> Any:
        self.used.add(key)
        return self._config.get(key)

    def having(self, **keys: Any) -> Reader:
        """The same object with these values; what is asked of it counts as asked here."""
        other = Reader({**self._config, **keys})
        other.used = self.used
        return other

    def has(self, key: str) -> bool:
        """Whether the key is there, null or not."""
        self.used.add(key)
        return key in self._config

    def size(self, key: str, default: int | None = None, most: int = MOST) -> int:
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < most:
            raise CheckpointError(f"config.json: {key} must be an integer from 1 to {most - 1}, not {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise CheckpointError(f"config.json: {key} must be a positive number, not {value!r}")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise CheckpointError(f"config.json: {key} must be true or false, not {value!r}")
        return value

    def size_or_zero(self, key: str, default: int) -> int:
        """A size that may be 0."""
        return 0 if self.get(key) == 0 else self.size(key, default)

    def size_or_off(self, key: str, absent: int) -> int:
        """A size, 0 where it is null; `absent` where the key is not there."""
        return self.size(key) if self.get(key) is not None else 0 if self.has(key) else absent

    def number_or_off(self, key: str, absent: float) -> float:
        """A number, 0 where it is null; `absent` where the key is not there."""
        return self.number(key) if self.get(key) is not None else 0.0 if self.has(key) else absent

    def table(self, key: str) -> Mapping[str, Any]:
        """An object, empty where there is none."""
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            raise CheckpointError(f"config.json: {key} must be an object, not {value!r}")
        return value or {}

    def refuse(self, key: str, why: str = "is not supported") -> NoReturn:
        raise CheckpointError(f"config.json: {key} {why} (its value is {self.get(key)!r})")
