"""A dataclass field that knows what it may be."""

from __future__ import annotations

from dataclasses import field
from typing import Any

__all__ = ["LARGEST_SEED", "REQUIRED", "option"]

REQUIRED = "???"  # OmegaConf's mark of a value that the user must give
LARGEST_SEED = 2**63 - 1  # a signed 64-bit number, which every generator takes


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A dataclass field with its help and its allowed values: low <= value <= high, above < value < below.

    `default` may be a callable (a class or a lambda), which is then called for each new object.
    """
    metadata = {"help": help, "low": low, "high": high, "above": above, "below": below, "choices": choices}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)
