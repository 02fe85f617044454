"""Command lines of the small commands: ``key=value`` settings, then plain words."""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ftlab.errors import ConfigError, FtlabError

__all__ = ["at_least_one", "can_be_written", "guarded", "parse"]

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
    # Every caller hands in a dataclass, which the type variable cannot say.
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


def at_least_one(**values: int | None) -> None:
    """Raise ConfigError for the first number below 1; None is no number."""
    for key, value in values.items():
        if value is not None and value < 1:
            raise ConfigError(f"{key}={value}: give at least 1")


def can_be_written(key: str, path: str) -> None:
    """Raise ConfigError if nothing can be put at `path`; asked before the work, so that none of it is lost."""
    parent = Path(path).absolute().parent
    if not parent.is_dir():
        raise ConfigError(f"{key}={path}: there is no folder {parent}; make it, or give another place")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"{key}={path}: the folder {parent} is not writable; give another place")


def guarded(command: Callable[[list[str]], int], argv: list[str] | None) -> int:
    """Run a command; a mistake of the user, or of the file system, becomes one line on stderr and an exit status.

    `FTLAB_DEBUG=1` keeps the traceback.
    """
    try:
        return command(sys.argv[1:] if argv is None else argv)
    except (FtlabError, OSError) as error:
        if os.environ.get("FTLAB_DEBUG") == "1":
            raise
        print("error:", " ".join(_said(error).split()), file=sys.stderr)
        return error.exit_code if isinstance(error, FtlabError) else 1
    except KeyboardInterrupt:
        return 130


def _said(error: FtlabError | OSError) -> str:
    """What to tell of an error: the file first, if the operating system named one."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)
