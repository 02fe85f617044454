"""Stands in for triton where it is not installed, so that the references can still be imported.

Decorators return the function as it is; nothing here can launch a kernel (`common.require_triton` says so before).
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

__all__ = ["Config", "autotune", "heuristics", "jit", "language"]


def _decorator(*arguments: Any, **named: Any) -> Any:
    if len(arguments) == 1 and not named and callable(arguments[0]):
        return arguments[0]
    return lambda function: function


jit: Callable[..., Any] = _decorator
heuristics = autotune = lambda *arguments, **named: lambda function: function
Config = SimpleNamespace


class _Constexpr:
    def __init__(self, value: Any = None) -> None:
        self.value = value


language = SimpleNamespace(constexpr=_Constexpr)
