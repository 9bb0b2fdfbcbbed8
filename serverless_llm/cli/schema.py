"""The JSON Schema of the configuration file, for editors: `serverless-llm serve --print-schema`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec

from serverless_llm.config import BOUNDS, HOST, NAME, Config, Limits, ModelEntry
from serverless_llm.quantities import ENDLESS, UNITS

FROM_ENVIRONMENT = {"type": "string", "pattern": r"^\$\{env\.\w+\}$"}
_UNIT = "|".join(sorted(filter(None, UNITS), key=len, reverse=True))
_SIZE = rf"^\s*[0-9]+(\.[0-9]+)?\s*({_UNIT})?"
_BYTES = {"type": "integer", "minimum": 0}
SIZE = {"anyOf": [_BYTES, {"type": "string", "pattern": rf"{_SIZE}\s*$"}, FROM_ENVIRONMENT]}
RATE = {"anyOf": [_BYTES, {"type": "string", "pattern": rf"{_SIZE}(/s)?\s*$"}, FROM_ENVIRONMENT]}
SHARE = {"anyOf": [*SIZE["anyOf"], {"type": "string", "pattern": r"^\s*[0-9]+(\.[0-9]+)?\s*%\s*$"}]}
_TIME = r"([0-9]+(\.[0-9]+)?\s*(ms|[smhd])?\s*)+"
LIMITED = {
    "anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": rf"^\s*{_TIME}$"}, FROM_ENVIRONMENT]
}
TIME = {
    "anyOf": [*LIMITED["anyOf"], {"const": -1}, {"type": "string", "pattern": rf"^\s*{ENDLESS.pattern}\s*$"}],
}
DEVICES = {"type": "string", "pattern": r"^(auto|(cpu|cuda)(:[1-9][0-9]*)?)$"}
TEXTS = {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "string"}]}
_HOST = rf"({HOST.pattern})"
HOSTS = {
    "anyOf": [
        {"type": "array", "items": {"type": "string", "pattern": f"^{_HOST}$"}},
        {"type": "string", "pattern": f"^{_HOST}(,{_HOST})*$"},
    ]
}
LINKS = {"type": "object", "additionalProperties": False, "properties": dict.fromkeys(Limits.__struct_fields__, RATE)}
WRITTEN: dict[str, Any] = {  # as people write it, where that is not as it is kept
    **dict.fromkeys(("dram", "device_memory"), SHARE),
    **dict.fromkeys(("keep_alive", "hold", "abandon_after", "orphan_grace"), TIME),
    "drain": LIMITED,
    "hosts": HOSTS,
    "model_roots": TEXTS,
    "body_limit": SIZE,
    "api_key": {"type": "string", "pattern": r"\S"},
    "devices": DEVICES,
    "limits": {"anyOf": [LINKS, {"type": "string", "pattern": r"^\w+=[^,=]+(,\w+=[^,=]+)*$"}]},
}
PLACE = re.compile(r"^        (\w+(?:, \w+)*): (.*(?:\n            .*)*)", re.MULTILINE)


def schema() -> dict[str, Any]:
    """Every key of the file, as it may be written there."""
    model = {"type": "object", "additionalProperties": False, "required": ["source"], "properties": _keys(ModelEntry)}
    models = {"anyOf": [{"type": "string", "description": "The source alone."}, model]}
    keys = _keys(Config)
    keys["models"] |= {
        "type": "object",
        "additionalProperties": models,
        "propertyNames": {"pattern": f"^(?:{NAME.pattern})$"},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "serverless-llm.yaml",
        "description": "What `serverless-llm serve` runs with.",
        "type": ["object", "null"],
        "additionalProperties": False,
        "properties": keys,
    }


def _keys(kind: type[msgspec.Struct]) -> dict[str, dict[str, Any]]:
    told = descriptions(kind)
    return {
        field.name: _key(field) | ({"description": told[field.name]} if field.name in told else {})
        for field in msgspec.structs.fields(kind)
    }


def _key(field: msgspec.structs.FieldInfo) -> dict[str, Any]:
    """One key; null stands for its default, and texts for numbers too, since `${env.NAME}` is one."""
    if field.name == "models":
        return {}
    written = WRITTEN.get(field.name) or msgspec.json.schema(field.type, schema_hook=_hook)
    least, most = BOUNDS.get(field.name, (None, None))
    if field.name not in WRITTEN and least is not None:
        written = written | {"minimum": least, "maximum": most}
    forms = written.get("anyOf", [written])
    others = [{"type": "null"}, *([] if {"type": "string"} in forms else [FROM_ENVIRONMENT])]
    others = [form for form in others if form not in forms]
    fixed = isinstance(field.default, str | int | bool) and field.name != "threads"  # which depends on the machine
    known = {"default": field.default} if fixed else {}
    return {"anyOf": [*forms, *others]} | known


def _hook(kind: type) -> dict[str, Any]:
    if kind is Path:
        return {"type": "string"}
    raise NotImplementedError(kind)


def descriptions(kind: type) -> dict[str, str]:
    """What the `Attributes` of a docstring say, by name."""
    _, _, listed = (kind.__doc__ or "").partition("Attributes:\n")
    return {name: " ".join(text.split()) for names, text in PLACE.findall(listed) for name in names.split(", ")}
