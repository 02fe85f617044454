"""Command lines of the small commands: ``key=value`` settings, then plain words."""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from ftlab.errors import ConfigError, FtlabError

__all__ = ["guarded", "parse"]

T = TypeVar("T")


def _convert(key: str, text: str, kind: Any) -> Any:
    options = typing.get_args(kind) or (kind,)
    if type(None) in options and text in ("null", "none"):
        return None
    kind = next(option for option in options if option is not type(None))
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ConfigError(f"{key}={text}: give true or false")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"{key}={text}: not a valid {kind.__name__}") from None


def parse(cls: type[T], argv: list[str], usage: str) -> tuple[T, list[str]]:
    """The dataclass `cls` filled from ``key=value`` words, and the remaining words in order.

    Words after ``--`` are never settings. ``--help`` prints `usage` and the settings, and exits.

    Raises:
        ConfigError: an unknown key (the nearest one is named), a wrong type, or a missing value.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    if {"-h", "--help"} & set(argv):
        print(usage)
        for name, item in fields.items():
            default = "required" if item.default is dataclasses.MISSING else f"default {item.default}"
            print(f"  {name}=...  {item.metadata.get('help', '')} ({default})")
        raise SystemExit(0)
    values: dict[str, Any] = {}
    words: list[str] = []
    for position, word in enumerate(argv):
        if word == "--":
            words += argv[position + 1 :]
            break
        key, equals, text = word.partition("=")
        if not equals or not key.isidentifier():
            words.append(word)
            continue
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.4)
            raise ConfigError(f"{key}: no such setting{f'; did you mean {near[0]}?' if near else ''}")
        values[key] = _convert(key, text, hints[key])
    missing = [n for n, f in fields.items() if n not in values and f.default is dataclasses.MISSING]
    if missing:
        raise ConfigError(f"{missing[0]}=... is missing; {usage}")
    return cls(**values), words


def guarded(command: Callable[[list[str]], int], argv: list[str] | None) -> int:
    """Run a command; a mistake of the user becomes one line on stderr and its exit status."""
    try:
        return command(sys.argv[1:] if argv is None else argv)
    except FtlabError as error:
        if os.environ.get("FTLAB_DEBUG") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
