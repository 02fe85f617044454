"""Strict composition: a command line and conf/ become one typed, validated `Config`, or one line that says why not.

The only package that imports Hydra and OmegaConf. Hydra composes, expands sweeps and launches; `composer` registers the
dataclasses and refuses what Hydra would let through (keys appended with `+`, deleted keys, values out of range),
`explain` turns every mistake into `error: <key>: <reason>; did you mean <key>?`, and `command` is what a command calls.
"""

from ftlab.compose.command import Task, run_command
from ftlab.compose.composer import Composer, compose, conf_dir, to_yaml
from ftlab.schema import config_hash, run_folder

__all__ = ["Composer", "Task", "compose", "conf_dir", "config_hash", "run_command", "run_folder", "to_yaml"]
