"""Entries PATTERN:FACTOR of a configuration: a number for the parameters whose names a regular expression matches."""

from __future__ import annotations

import re

from ftlab.errors import ConfigError

__all__ = ["pattern_and_factor"]

_NUMBER = re.compile(r"\d+(\.\d*)?([eE][+-]?\d+)?|\.\d+([eE][+-]?\d+)?")


def pattern_and_factor(key: str, entry: str) -> tuple[str, float]:
    """A regular expression over a whole parameter name, and the factor, at least 0.

    PATTERN matches one or more whole parts of the name, such as q_proj or layers.0. Errors: ConfigError naming `key`.
    """
    pattern, _, number = entry.rpartition(":")
    factor = float(number) if _NUMBER.fullmatch(number) else -1.0
    if not pattern or not 0 <= factor < float("inf"):
        raise ConfigError(f"{key}: {entry!r} is not PATTERN:FACTOR; give for example '{key}=[q_proj:0.5,layers.0:0]'")
    whole = rf"(?:.*\.)?(?:{pattern})(?:\..*)?"
    try:
        re.compile(whole)
    except re.error as error:
        raise ConfigError(f"{key}: {pattern!r} is not a regular expression: {error}") from error
    return whole, factor
