"""Write docs/configuration.md from ftlab/config/ and conf/: `python scripts/config_reference.py [--check]`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from ftlab.compose import conf_dir
from ftlab.config import Config
from ftlab.config.options import REQUIRED
from ftlab.schema import GROUPS, NOT_HASHED, Key, expected, hints, keys_of

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"
LIMITS = (("low", ">= {}"), ("above", "> {}"), ("high", "<= {}"), ("below", "< {}"))
HEAD = """# Configuration

<!-- Written by scripts/config_reference.py from ftlab/config/ and conf/. Change those, then run it again. -->

Every key with its type, default and range. Override any of them on the command line (`optimizer.lr=3e-4`), choose
another option of a group (`method=full`), add an experiment (`+experiment=lora_medical`), or sweep (`-m
training.seed=0,1,2`). Your own YAML files in the same groups are found with `--config-dir DIR`; list the option's
`base_...` first in their `defaults`, and start an experiment with `# @package _global_`. A key that is not on this page
is an error that names the nearest one.

Under `regularizer.extra` goes any class of your own: `{name: {_target_: module.Class, ...arguments}}`, called with the
model and those arguments.

Keys that do not change what is computed, so that a run keeps its folder when they change: NOT_HASHED.
"""


def default_of(key: Key) -> str:
    """The default as one would write it on the command line."""
    item = key.field
    if item.default_factory is not dataclasses.MISSING:
        value: Any = item.default_factory()
    else:
        value = item.default
    if value == REQUIRED:
        return "required"
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, list):
        return f"`[{','.join(value)}]`"
    return f"`{value}`"


def allowed(key: Key) -> str:
    """Type, range and choices."""
    metadata = key.field.metadata
    if metadata.get("choices"):
        return ", ".join(f"`{choice}`" for choice in metadata["choices"])
    limits = [form.format(metadata[name]) for name, form in LIMITS if metadata.get(name) is not None]
    return ", ".join([expected(key.type), *limits])


def table(keys: list[Key]) -> list[str]:
    """One row a key that holds a value."""
    rows = ["", "| key | default | allowed | meaning |", "|---|---|---|---|"]
    for key in keys:
        if not dataclasses.is_dataclass(key.type):
            meaning = key.help.replace("|", "\\|")
            rows.append(f"| `{key.path}` | {default_of(key)} | {allowed(key)} | {meaning} |")
    return rows


def options_of(group: str) -> list[str]:
    """The YAML files of a group with their first comment line."""
    lines = [""]
    for file in sorted((conf_dir() / group).glob("*.yaml")):
        comments = [line for line in file.read_text("utf-8").splitlines() if line.startswith("# ")]
        about = next(line.removeprefix("# ") for line in comments if "@package" not in line)
        lines.append(
            f"- `{group}={file.stem}`: {about}" if group != "experiment" else f"- `+experiment={file.stem}`: {about}"
        )
    return lines


def page() -> str:
    """The whole page."""
    lines = HEAD.replace("NOT_HASHED", ", ".join(f"`{name}`" for name in NOT_HASHED)).splitlines()
    lines += ["", "## The run", *table([key for key in keys_of(Config) if "." not in key.path])]
    for name in ("training", "checkpoint", "head"):
        lines += ["", f"## {name}", *table(list(keys_of(hints(Config)[name], f"{name}.")))]
    for group, options in GROUPS.items():
        lines += ["", f"## {group}", *options_of(group)]
        shared = [key.path for key in keys_of(hints(Config)[group], f"{group}.")] if len(options) > 1 else []
        if shared:
            base = hints(Config)[group]
            lines += ["", base.__doc__ or "", *table(list(keys_of(base, f"{group}.")))]
        for kind, cls in options.items():
            own = [key for key in keys_of(cls, f"{group}.") if key.path not in shared]
            lines += ["", f"### base_{kind}" if len(options) > 1 else "", (cls.__doc__ or "").split("\n")[0]]
            lines += table(own) if own else []
    lines += ["", "## experiment", *options_of("experiment")]
    text = "\n".join(lines)
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text + "\n"


def main() -> int:
    """Write the page, or with --check say whether it is current."""
    if "--check" in sys.argv[1:]:
        current = PAGE.is_file() and PAGE.read_text("utf-8") == page()
        print(f"{PAGE.name} is {'current' if current else 'out of date: run python scripts/config_reference.py'}")
        return 0 if current else 1
    PAGE.write_text(page(), "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
