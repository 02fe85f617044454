"""Stands in for packages that ftlab imports and a machine for measurements need not have."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

__all__ = ["stand_in"]

# Reads quantised checkpoints; nothing here reads a checkpoint.
OPTIONAL = {"gguf": ("gguf", "gguf.constants", "gguf.quants")}


class _Absent(ModuleType):
    """Any name can be imported from it; none can be used."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def absent(*arguments: Any, **named: Any) -> Any:
            raise ModuleNotFoundError(f"{self.__name__} is not installed here")

        return absent


def stand_in() -> list[str]:
    """Put a stand-in where an optional package is missing; returns which were."""
    found = []
    for package, modules in OPTIONAL.items():
        if package not in sys.modules and importlib.util.find_spec(package) is None:
            found.append(package)
            for name in modules:
                sys.modules[name] = _Absent(name)
    return found
