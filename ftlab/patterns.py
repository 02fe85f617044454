"""Small languages of a configuration: PATTERN:NUMBER for what has a matching name, and ranges of blocks."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from ftlab.errors import ConfigError

__all__ = ["block_ranges", "pattern_and_factor", "pattern_numbers"]

_NUMBER = re.compile(r"\d+(\.\d*)?([eE][+-]?\d+)?|\.\d+([eE][+-]?\d+)?")
_START = r"(?:.*\.)?"  # PATTERN matches whole parts of a name, so whatever stands before the first is free
_MAX_RANK = 1024
_FITS: dict[str, Callable[[float], bool]] = {
    "ranks": lambda number: 1 <= number <= _MAX_RANK and number.is_integer(),
    "alphas": lambda number: number > 0,
}


def block_ranges(text: str) -> list[tuple[int, int | None]]:
    """ "20-29", "5" or "28-" and others beside it, by commas -> first and last of each; last None: the uppermost block.

    Errors: ConfigError naming method.layers.
    """
    ranges: list[tuple[int, int | None]] = []
    for part in text.replace(" ", "").split(","):
        found = re.fullmatch(r"(\d+)(-?)(\d*)", part)
        if found is None:
            raise ConfigError(
                f"method.layers: {part!r} is not a block or a range of blocks, which are counted from 0 at the bottom; "
                "give for example 20-29 or 28-"
            )
        first = int(found[1])
        ranges.append((first, int(found[3]) if found[3] else None if found[2] else first))
    return ranges


def pattern_and_factor(key: str, entry: str) -> tuple[str, float]:
    """A regular expression over a whole parameter name, and the factor, at least 0.

    PATTERN matches one or more whole parts of the name, such as q_proj or layers.0. Errors: ConfigError naming `key`.
    """
    pattern, factor = _parsed(key, entry, "PATTERN:FACTOR", "q_proj:0.5,layers.0:0", lambda number: True)
    return rf"{_START}(?:{pattern})(?:\..*)?", factor


def pattern_numbers(key: str, entries: Sequence[str]) -> dict[str, float]:
    """method.ranks (`key` ranks; whole numbers of 1 to 1024) or method.alphas (above 0) by PATTERN, in order.

    PATTERN matches a layer's whole name or its last parts. Errors: ConfigError naming the key.
    """
    example = "q_proj:8" if key == "ranks" else "q_proj:16"
    return dict(_parsed(f"method.{key}", entry, "PATTERN:NUMBER", example, _FITS[key]) for entry in entries)


def _parsed(key: str, entry: str, form: str, example: str, fits: Callable[[float], bool]) -> tuple[str, float]:
    """PATTERN and NUMBER as they stand; the number is finite, not negative, and fits."""
    pattern, _, digits = entry.rpartition(":")
    number = float(digits) if _NUMBER.fullmatch(digits) else math.nan
    if not pattern or not math.isfinite(number) or not fits(number):
        raise ConfigError(f"{key}: {entry!r} is not {form}; give for example '{key}=[{example}]'")
    try:
        re.compile(rf"{_START}(?:{pattern})")
    except re.error as error:
        raise ConfigError(f"{key}: {pattern!r} is not a regular expression: {error}") from error
    return pattern, number
