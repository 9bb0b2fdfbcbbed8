"""Packages that only some installations have."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from serverless_llm.errors import ConfigurationError


def extra(name: str, package: str, use: str, *modules: str) -> Any:
    """A package and these modules of it, imported when first wanted.

    Args:
        name: the extra that brings it, in pyproject.toml.
        use: what needs it, in the plural; begins the message.

    Raises:
        ConfigurationError: it is not installed; says how to.
    """
    try:
        for module in modules:
            import_module(f"{package}.{module}")
        return import_module(package)
    except ImportError as error:
        raise ConfigurationError(f"{use} need {package} ({error}): {how_to_install(name)}") from error


def how_to_install(name: str) -> str:
    """An extra; the package index has another project under this one's name."""
    return f"in a clone of this project, pip install -c constraints.txt '.[{name}]'"
