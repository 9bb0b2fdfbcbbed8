"""Quantities as people write them: `2GiB`, `20MB`, `20MB/s`, `50%` of something, `90s`, `1h30m`, `-1` for ever.

All raise ConfigurationError, which does not say where the text stood: whoever read it does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from serverless_llm.errors import ConfigurationError, shortened

UNITS = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base**power
    for suffix, base in (("B", 1000), ("", 1000), ("iB", 1024))
    for power, letter in enumerate("KMGT", start=1)
}
SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
DURATION = re.compile(r"[0-9]+(?:\.[0-9]+)?|(?:[0-9]+(?:\.[0-9]+)?\s*(?:ms|[smhd])\s*)+")
ENDLESS = re.compile(r"-1(?:\.0+)?\s*(?:ms|[smhd])?")  # other servers' clients write -1m, too
PART = re.compile(r"([0-9.]+)\s*([a-z]*)")
LARGEST = 2.0**62  # bytes; more is a mistake
LONGEST = 1e12  # seconds; a longer time is a mistake, -1 is for ever
QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z%]*)\s*")


def parse_size(value: object, whole: int | None = None) -> int:
    """Bytes of `1536`, `2GiB`, `20MB` or, where `whole` is given, `50%` of it."""
    match = QUANTITY.fullmatch(str(value))
    if match and match[2] == "%" and whole is not None:
        return int(whole * min(float(match[1]), LARGEST) / 100)
    size = float(match[1]) * UNITS[match[2]] if match and match[2] in UNITS else math.inf
    if size > LARGEST:
        raise ConfigurationError(f"{value!r} is no size; write bytes, 512MiB or 2GB" + (" or 50%" if whole else ""))
    return int(size)


def parse_rate(value: object) -> float:
    """Bytes per second of `20MB/s`, or of a number."""
    try:
        return float(parse_size(str(value).strip().removesuffix("/s")))
    except ConfigurationError:
        raise ConfigurationError(f"{value!r} is no rate; write 500MB/s, 1GiB/s or bytes a second") from None


def parse_duration(value: object, forever: bool = True) -> float:
    """Seconds of `90`, `500ms`, `5m`, `1h30m`, and of `-1`, infinitely many, where `forever` may be."""
    text = str(value).strip()
    if forever and ENDLESS.fullmatch(text):
        return math.inf
    parts = PART.findall(text) if DURATION.fullmatch(text) else []
    seconds = sum(float(number) * SECONDS[unit] for number, unit in parts) if parts else math.inf
    if seconds >= LONGEST:
        allowed = "1h30m, or -1 for ever" if forever else "or 1h30m"
        raise ConfigurationError(f"{shortened(repr(value))} is no duration; write seconds, 500ms, 5m, {allowed}")
    return seconds


def parse_pairs(value: object) -> dict[str, Any]:
    """`a=1,b=2`, a list of `a=1`, or a mapping."""
    if isinstance(value, Mapping):
        return dict(value)
    parts = value.split(",") if isinstance(value, str) else list(value) if isinstance(value, Iterable) else [value]
    bad = [part for part in parts if "=" not in str(part)]
    if bad:
        raise ConfigurationError(f"{bad[0]!r} is not of the form name=value")
    pairs: dict[str, Any] = {}
    for name, _, text in (str(part).partition("=") for part in parts):
        if name.strip() in pairs:
            raise ConfigurationError(f"{name.strip()!r} is given twice")
        pairs[name.strip()] = text.strip()
    return pairs


def size(count: float) -> str:
    """Bytes as Ollama prints them: 3.8 MB."""
    value, unit = _in_units(count)
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def enough(count: float) -> str:
    """As `size`, rounded up: who gives that much has given enough."""
    value, unit = _in_units(count)
    return f"{math.ceil(value)} {unit}" if unit == "B" else f"{math.ceil(value * 10) / 10:.1f} {unit}"


def _in_units(count: float) -> tuple[float, str]:
    units = ["B", "KB", "MB", "GB", "TB"]
    value = float(count)
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return value, units[0]
