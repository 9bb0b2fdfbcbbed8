"""Packages that only some installations have."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

from serverless_llm.errors import ConfigurationError


def extra(requirement: str, use: str, *modules: str) -> Any:
    """A package and these modules of it, imported when first wanted.

    Args:
        requirement: as pip takes it, like `obstore>=0.12`.
        use: what needs it, in the plural; begins the message.

    Raises:
        ConfigurationError: it is not installed; says how to.
    """
    name = re.split(r"[^\w.-]", requirement)[0]
    try:
        for module in modules:
            import_module(f"{name}.{module}")
        return import_module(name)
    except ImportError as error:
        raise ConfigurationError(f"{use} need {name} ({error}): pip install '{requirement}'") from error
