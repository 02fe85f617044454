"""From an exception of Hydra to one line that names the key, the reason and the nearest valid key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ftlab.errors import ConfigError
from ftlab.schema import GROUPS, Key, expected, hints, kinds_with, schema_keys, suggestion

if TYPE_CHECKING:
    from ftlab.compose.composer import Composer

__all__ = ["Explanation", "first_line", "flatten", "help_of", "rephrase", "unknown_key"]

IN_FILE = re.compile(r"In '(?P<file>[^']+)': ")
BAD_VALUE = re.compile(r"Value '(?P<value>.*)' of type|Cannot convert '(?P<other>.*)' to", re.DOTALL)
NOT_SUBCLASS = re.compile(r"\w+ is not a subclass of (?P<cls>\w+)\. value: (?P<value>.*)")


def unknown_key(path: str, where: str = "", kind: str = "") -> ConfigError:
    """The error for a key that does not exist, or that another option of the group has (`kind` is the one chosen)."""
    owners = kinds_with(path)
    if owners and kind not in owners:
        group = path.split(".")[0]
        chosen = f"{group}={kind}" if kind else f"the chosen {group}"
        return ConfigError(f"{where}{path}: {chosen} has no such key; it belongs to {group}={' or '.join(owners)}")
    return ConfigError(f"{where}{path}: no such key{suggestion(path, [key.path for key in schema_keys()])}")


def key_at(path: str) -> Key | None:
    """The schema's key at a path (of the first option that has it)."""
    return next((key for key in schema_keys() if key.path == path), None)


def help_of(path: str) -> str:
    """The help of the key at a path."""
    key = key_at(path)
    return key.help if key else "no help"


def first_line(error: BaseException) -> str:
    """The first line of an exception's message."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def rephrase(error: BaseException, path: str, value: object = None) -> str:
    """A refused value in words: the type that its key has and the value that was given."""
    key = key_at(path)
    found = BAD_VALUE.search(str(error))
    if value is None and found:
        value = found["value"] or found["other"]
    if key is None:
        return first_line(error)
    return f"expected {expected(key.type)}, got {'null' if value is None else repr(value)}"


class Explanation:
    """Finds which override or file is behind an exception of Hydra. Composes again in parts."""

    def __init__(self, composer: Composer, overrides: list[str], mode: RunMode) -> None:
        self.composer = composer
        self.mode = mode
        self.overrides = composer.parse(overrides)
        self.groups = [item for item in self.overrides if self.is_group(item)]
        self.values = [item for item in self.overrides if not self.is_group(item)]

    def is_group(self, item: Override) -> bool:
        """Whether an override chooses an option rather than sets a value."""
        return item.key_or_group == "experiment" or bool(self.composer.options(item.key_or_group))

    def of(self, error: BaseException) -> NoReturn:
        """Raise the ConfigError that says what the user can put right."""
        for item in self.groups:
            self.check_choice(item)
        chosen = [text for item in self.groups if (text := item.input_line)]
        try:
            composed = self.composer.raw(chosen, self.mode)
        except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, OSError) as in_file:
            raise self.in_file(in_file) from error
        for item in self.values:
            self.check_path(item, composed)
        for item in self.values:
            if self.mode == RunMode.MULTIRUN and item.is_sweep_override():
                continue
            try:
                self.composer.raw([*chosen, item.input_line or ""], self.mode)
            except (HydraException, OmegaConfBaseException, ValueError) as alone:
                raise self.refused_value(item, alone) from error
        raise ConfigError(" ".join(str(error).split())) from error

    def check_choice(self, item: Override) -> None:
        """Refuse an option that the group does not have."""
        group, value = item.key_or_group, item.value()
        options = self.composer.options(group)
        if item.is_sweep_override() or item.is_delete() or f"{value}".startswith("base_"):
            return
        if not isinstance(value, str) or value not in options:
            near = suggestion(str(value), options, f"{group}={{}}")
            text = item.get_value_element_as_str()
            raise ConfigError(f"{group}={text}: no such option{near} (choices: {', '.join(options)})")
        if group in GROUPS and item.package is not None:
            raise ConfigError(f"{item.input_line}: a group cannot be put elsewhere; did you mean {group}={value}?")
        if group == "experiment" and not item.is_add():
            raise ConfigError(f"experiment={value}: an experiment is added; did you mean +experiment={value}?")
        if group in GROUPS and (item.is_add() or item.is_force_add()):
            raise ConfigError(f"{item.input_line}: {group} has an option already; did you mean {group}={value}?")

    def check_path(self, item: Override, composed: DictConfig) -> None:
        """Refuse a key that the composed options do not have."""
        path = item.key_or_group
        parts = path.split(".")
        if parts[0] == "hydra":
            known = list(flatten(OmegaConf.to_container(composed.hydra, resolve=False), "hydra."))
            if path not in known and not item.is_add() and not item.is_force_add():
                raise ConfigError(f"{path}: no such key{suggestion(path, known)}")
            return
        node: Any = composed
        for depth, part in enumerate(parts):
            cls = OmegaConf.get_type(node) if isinstance(node, DictConfig) else None
            if not is_dataclass(cls):
                return
            if part not in hints(cls):
                kind = next((kind for kind, option in GROUPS.get(parts[0], {}).items() if option is cls), "")
                raise unknown_key(path, kind=kind if depth == 1 else "")
            node = None if OmegaConf.is_missing(node, part) else node[part]

    def refused_value(self, item: Override, error: BaseException) -> ConfigError:
        """The error for one override that composes badly on its own."""
        path, cause = item.key_or_group, error.__cause__
        if path.startswith("regularizer.extra") and not item.is_add():
            return ConfigError(f"{path}: it holds nothing yet; write +{item.input_line}")
        if item.is_delete():
            return ConfigError(f"{path}: cannot be deleted; give it a value instead")
        if item.is_sweep_override():
            text = item.input_line or path
            return ConfigError(f"{text}: several values need -m (a sweep), [a,b] for a list, or quotes for a text")
        if item.is_add() and "already" in str(error):
            return ConfigError(f"{item.input_line}: the key exists; did you mean {path}={item.get_value_string()}?")
        if cause is None:
            return ConfigError(f"{path}: {' '.join(str(error).split())}")
        return ConfigError(f"{path}: {rephrase(cause, path, item.value())}")

    def in_file(self, error: BaseException) -> ConfigError:
        """The error for a YAML file that cannot be read or merged, with its path, line and key."""
        if not str(error) and error.__cause__ is not None:  # Hydra wraps what it does not know in an empty exception
            error = error.__cause__
        message = str(error) or type(error).__name__
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
            mark = error.problem_mark
            return ConfigError(f"{mark.name}:{mark.line + 1}: not YAML: {error.problem}")
        if isinstance(error, MissingConfigException) and error.missing_cfg_file:
            name = str(error.missing_cfg_file)
            group, _, option = name.rpartition("/")
            options = self.composer.options(group)
            near = suggestion(option, options, f"{group}={{}}")
            where = self.mention(option)
            return ConfigError(f"{where}{group}={option}: no such option{near} (choices: {', '.join(options)})")
        found = IN_FILE.match(message)
        file = self.composer.find(found["file"]) if found else None
        key = next((line.partition(":")[2].strip() for line in message.splitlines() if "full_key:" in line), "")
        group_name = re.search(r"Could not override '([^']+)'", message)
        if group_name:
            word = group_name[1]
            if word in GROUPS:
                return ConfigError(
                    f"{self.mention(word)}override /{word}: the primary config has no {word}; an experiment is chosen "
                    "with +experiment=..., and a primary config lists base_config and every group as config.yaml does"
                )
            near = suggestion(word, GROUPS, "override /{}")
            return ConfigError(f"{self.mention(word)}override /{word}: no such group{near}")
        subclass = NOT_SUBCLASS.search(message)
        if not key and subclass:
            key = next(
                (item.path for item in schema_keys() if getattr(item.type, "__name__", "") == subclass["cls"]), ""
            )
        where = f"{locate(file, key)}: " if file else ""
        if "not in '" in message or "is not in struct" in message:
            if key.split(".")[0] == "experiment" or (file and key == file.parent.name and key not in GROUPS):
                return ConfigError(f"{where}its first line must be `# @package _global_`")
            group, kind = key.split(".")[0], self.kind_in(message, key)
            if kinds_with(key) and not kind and file and file.parent.name == group:
                return ConfigError(
                    f"{where}{key}: list one of base_{', base_'.join(GROUPS[group])} first in its defaults"
                )
            return unknown_key(key, where, kind)
        reason = message.splitlines()[1 if found and "raised while" in message else 0]
        if subclass and key:
            reason = f"expected a mapping of keys, got {subclass['value']}"
        elif BAD_VALUE.search(message) or "Incompatible value 'None'" in message:
            reason = rephrase(error, key)
        return ConfigError(f"{where}{key + ': ' if key else ''}{reason}")

    def kind_in(self, message: str, key: str) -> str:
        """The option whose class Hydra's message names."""
        found = re.search(r"not in '(\w+)'", message)
        options = GROUPS.get(key.split(".")[0], {})
        return next((kind for kind, cls in options.items() if found and cls.__name__ == found[1]), "")

    def mention(self, word: str) -> str:
        """`file:line: ` of the chosen YAML file that holds a word; empty if none does."""
        names = [self.composer.config_name, *(f"{item.key_or_group}/{item.value()}" for item in self.groups)]
        for file in filter(None, map(self.composer.find, names)):
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
                if re.search(rf"\b{re.escape(word)}\b", line.partition("#")[0]):
                    return f"{file}:{number}: "
        return ""


def flatten(plain: Any, prefix: str = "") -> Iterator[str]:
    """Dotted paths of every key in nested dictionaries."""
    if isinstance(plain, dict):
        for key, value in plain.items():
            yield f"{prefix}{key}"
            yield from flatten(value, f"{prefix}{key}.")


def locate(file: Path, key: str) -> str:
    """`file:line` of a dotted key, whose first parts may be the file's own package."""
    node = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    parts = key.split(".")
    for start in range(len(parts)):
        line = line_of(node, parts[start:])
        if line is not None:
            return f"{file}:{line}"
    return str(file)


def line_of(node: yaml.Node | None, parts: list[str]) -> int | None:
    """Line (from 1) of the key at the end of a path of keys."""
    if not isinstance(node, yaml.MappingNode):
        return None
    for name, value in node.value:
        if name.value == parts[0]:
            return name.start_mark.line + 1 if len(parts) == 1 else line_of(value, parts[1:])
    return None
