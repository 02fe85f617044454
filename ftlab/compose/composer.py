"""Composition: overrides and YAML files become one typed, validated `Config`."""

from __future__ import annotations

import importlib.resources
import os
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra import version as hydra_version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

import ftlab
from ftlab.compose.explain import Explanation, first_line, flatten, help_of, rephrase, unknown_key
from ftlab.config import Config
from ftlab.errors import ConfigError, FtlabError
from ftlab.optim.schedules import make_schedule
from ftlab.schema import GROUPS, config_to_dict, hints, suggestion
from ftlab.validate import validate

__all__ = ["Composer", "check_keys", "compose", "conf_dir", "register", "to_yaml", "without_hydra"]


def conf_dir() -> Path:
    """The folder of the YAML files: inside an installed wheel, or beside the package in a checkout."""
    inside = Path(str(importlib.resources.files("ftlab"))) / "conf"
    beside = Path(ftlab.__file__).resolve().parent.parent / "conf"
    for folder in (inside, beside):
        if (folder / "config.yaml").is_file():
            return folder
    raise FtlabError(f"conf/config.yaml was found neither in {inside} nor in {beside}; install ftlab again")


@cache
def register() -> None:
    """Put each option's dataclass into Hydra's ConfigStore as `base_<option>`; the YAML files list it first."""
    store = ConfigStore.instance()
    store.store(name="base_config", node=Config)
    for group, options in GROUPS.items():
        for kind, cls in options.items():
            store.store(group=group, name=f"base_{kind}", node=cls)


# --- composition -----------------------------------------------------------------------------------------------------


class Composer:
    """Hydra's loader over conf/ and the user's own folder, and a strict reading of what it composes."""

    def __init__(self, name: str, conf: Path, user_dir: Path | None = None, config_name: str = "config") -> None:
        hydra_version.setbase("1.3")
        register()
        search_path = create_config_search_path(str(conf))
        if user_dir is not None:
            anchor = SearchPathQuery(provider="schema")
            search_path.prepend(provider="command-line", path=f"file://{user_dir.absolute()}", anchor=anchor)
        GlobalHydra.instance().clear()
        self.hydra = Hydra.create_main_hydra2(task_name=name, config_search_path=search_path)
        self.folders = [conf, *([user_dir] if user_dir is not None else [])]
        self.config_name = config_name
        if self.find(config_name) is None:
            names = [file.stem for folder in self.folders for file in folder.glob("*.yaml")]
            raise ConfigError(f"--config-name {config_name}: no such file{suggestion(config_name, names)}")

    def find(self, name: str) -> Path | None:
        """The YAML file of a config such as `method/lora`; None for one that is only a dataclass."""
        found = (folder / f"{name}.yaml" for folder in self.folders)
        return next((file for file in found if file.is_file()), None)

    def options(self, group: str) -> list[str]:
        """The choices of a group, without the dataclasses behind them."""
        return [name for name in self.hydra.config_loader.get_group_options(group) if not name.startswith("base_")]

    def parse(self, overrides: Iterable[str]) -> list[Override]:
        """The command line's overrides by Hydra's grammar."""
        parser = OverridesParser.create(config_loader=self.hydra.config_loader)
        parsed = []
        for text in overrides:
            try:
                parsed += parser.parse_overrides([text])
            except HydraException as error:
                reason = str(error).splitlines()
                why = next((line for line in reason if "Error parsing" not in line), "it cannot be read")
                raise ConfigError(f"{text}: write key=value, quoting special characters ({why.strip()})") from error
        return parsed

    def raw(self, overrides: list[str], mode: RunMode = RunMode.RUN) -> DictConfig:
        """What Hydra composes, with its own node `hydra`, or Hydra's exception."""
        return self.hydra.compose_config(self.config_name, list(overrides), mode)

    def compose(self, overrides: list[str], mode: RunMode = RunMode.RUN) -> DictConfig:
        """Compose strictly: a key outside the schema, wherever it came from, raises ConfigError."""
        try:
            composed = self.raw(overrides, mode)
        except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, OSError) as error:
            if os.environ.get("FTLAB_DEBUG") == "1":
                traceback.print_exc()
            Explanation(self, overrides, mode).of(error)
        check_keys(composed)
        return composed

    def typed(self, composed: DictConfig) -> tuple[Config, dict[str, Any]]:
        """The dataclasses and the plain dictionary of a composed configuration, complete and validated."""
        settings = without_hydra(composed)
        try:
            OmegaConf.resolve(settings)
            missing = sorted(OmegaConf.missing_keys(settings))
            if missing:
                raise ConfigError(f"{missing[0]}: a value is needed ({help_of(missing[0])}); give {missing[0]}=...")
            config = OmegaConf.to_object(settings)
        except InterpolationResolutionError as error:
            raise ConfigError(f"{unresolved(settings)}: {first_line(error)}; give it a value") from error
        except OmegaConfBaseException as error:
            raise ConfigError(f"{error.full_key}: {rephrase(error, str(error.full_key))}") from error
        assert isinstance(config, Config)
        validate(config)
        if config.training.max_steps is not None:  # otherwise the number of steps depends on the data
            make_schedule(config.schedule, config.training.max_steps)
        return config, config_to_dict(config)


def compose(overrides: Sequence[str] = (), config_dir: Path | None = None) -> tuple[Config, dict[str, Any]]:
    """Compose and validate in one call, for tests and scripts. Raises ConfigError."""
    composer = Composer("ftlab", conf_dir(), config_dir)
    try:
        composer.parse(overrides)
        return composer.typed(composer.compose(list(overrides)))
    finally:
        GlobalHydra.instance().clear()


def unresolved(settings: DictConfig) -> str:
    """Path of the first key whose interpolation fails."""
    for path in flatten(OmegaConf.to_container(settings, resolve=False)):
        try:
            OmegaConf.select(settings, path)
        except InterpolationResolutionError:
            return path
    return "configuration"


def to_yaml(resolved: dict[str, Any]) -> str:
    """A plain configuration as YAML, keys in the order of the dataclasses."""
    text: str = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)
    return text


def without_hydra(composed: DictConfig) -> DictConfig:
    """A copy without Hydra's own node."""
    settings = composed.copy()
    with open_dict(settings):
        settings.pop("hydra", None)
    return settings


def check_keys(composed: DictConfig) -> None:
    """Raise ConfigError for a key that the schema does not have, a key deleted, and a group without an option."""
    settings = without_hydra(composed)
    if OmegaConf.get_type(settings) is not Config:
        raise ConfigError("the primary config must list base_config first in its defaults")
    for group, options in GROUPS.items():
        if group in settings and OmegaConf.get_type(settings, group) not in options.values():
            raise ConfigError(f"{group}: no option chosen; give {group}=... (`--help` lists them)")
    check_node(settings, "")


def check_node(node: DictConfig, prefix: str) -> None:
    """The part of `check_keys` at and below one typed node."""
    cls: Any = OmegaConf.get_type(node)
    for name in map(str, node):
        if name not in hints(cls):
            raise unknown_key(f"{prefix}{name}")
    for name in hints(cls):
        if name not in node.keys():  # noqa: SIM118 (`in node` is false for a value still missing)
            raise ConfigError(f"{prefix}{name}: cannot be deleted; give it a value instead")
        if not OmegaConf.is_missing(node, name) and is_dataclass(OmegaConf.get_type(node, name)):
            check_node(node[name], f"{prefix}{name}.")
