"""What the configuration may contain: every key at every depth, the options of each group, and the nearest valid name.

A group such as `method` is declared with a base class (`MethodConfig`); its options (`LoRAConfig`, `FullConfig`) are
subclasses. Two options may hold the same keys (the schedules `linear` and `cosine`), so the plain dictionary of a
configuration, which is what is hashed and written to files, carries the option's name under `kind`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ftlab import config as configs
from ftlab.config import Config

__all__ = [
    "GROUPS",
    "KIND",
    "NOT_HASHED",
    "Key",
    "config_hash",
    "config_to_dict",
    "expected",
    "hints",
    "keys_of",
    "kind_of",
    "kinds_with",
    "nearest",
    "run_folder",
    "schema_keys",
    "suggestion",
]

GROUPS: dict[str, dict[str, type]] = {
    "model": {
        "pretrained": configs.PretrainedConfig,
        "random": configs.RandomConfig,
        "random_bert": configs.RandomBertConfig,
    },
    "data": {
        "hpo": configs.HPODataConfig,
        "files": configs.FilesDataConfig,
        "labelled": configs.LabelledDataConfig,
    },
    "method": {
        "lora": configs.LoRAConfig,
        "full": configs.FullConfig,
        "freeze": configs.FreezeConfig,
        "linear_probe": configs.LinearProbeConfig,
        "bitfit": configs.BitFitConfig,
        "gradual_unfreeze": configs.GradualUnfreezeConfig,
    },
    "regularizer": {"regularizer": configs.RegularizerConfig},
    "optimizer": {"adamw": configs.AdamWConfig},
    "schedule": {
        "constant": configs.ConstantConfig,
        "linear": configs.LinearConfig,
        "cosine": configs.CosineConfig,
        "wsd": configs.WSDConfig,
        "polynomial": configs.PolynomialConfig,
        "inverse_sqrt": configs.InverseSqrtConfig,
    },
    "precision": {"precision": configs.PrecisionConfig},
    "parallel": {"parallel": configs.ParallelConfig},
    "tracking": {"tracking": configs.TrackingConfig},
    "evaluation": {"evaluation": configs.EvaluationConfig},
}

KIND = "kind"
CUTOFF = 0.6  # least similarity (difflib ratio) of a name that is worth suggesting
# Keys that do not change what is computed, so that a run keeps its folder when they change.
NOT_HASHED = (
    "name",
    "output_dir",
    "run_dir",
    "resume",
    "tracking",
    "parallel.threads",
    "parallel.timeout_seconds",
    "checkpoint.every_steps",
    "checkpoint.every_minutes",
    "checkpoint.keep_last",
    "evaluation.samples",
    "training.preflight",
)
TYPE_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


@dataclass(frozen=True)
class Key:
    """One key of the schema: its dotted path, declared type, default-carrying field and the class that owns it."""

    path: str
    type: Any
    field: Any
    owner: type

    @property
    def help(self) -> str:
        """The sentence that explains the key."""
        return str(self.field.metadata.get("help", ""))


@cache
def hints(cls: Any) -> dict[str, Any]:
    """Resolved annotations of a dataclass."""
    return typing.get_type_hints(cls)


def kind_of(node: object) -> str | None:
    """The option's name of a group's object (`CosineConfig()` -> "cosine"); None where a group has only one class."""
    for group, options in GROUPS.items():
        if hints(Config)[group] in options.values():
            continue
        for kind, cls in options.items():
            if type(node) is cls:
                return kind
    return None


def keys_of(cls: type, prefix: str = "") -> Iterator[Key]:
    """Every key under a dataclass, parents before children."""
    for item in fields(cls):
        path = f"{prefix}{item.name}"
        kind = hints(cls)[item.name]
        yield Key(path, kind, item, cls)
        if is_dataclass(kind) and isinstance(kind, type):
            yield from keys_of(kind, f"{path}.")


@cache
def schema_keys() -> tuple[Key, ...]:
    """Every key of every option, sorted by path (a key that several options have appears once an option)."""
    found = []
    for key in keys_of(Config):
        if "." not in key.path or key.path.split(".")[0] not in GROUPS:
            found.append(key)
    for group, options in GROUPS.items():
        for cls in options.values():
            found += list(keys_of(cls, f"{group}."))
    return tuple(sorted(found, key=lambda key: key.path))


def kinds_with(path: str) -> list[str]:
    """Options of the key's group that have it: `schedule.decay_fraction` -> ["wsd"]."""
    group = path.split(".")[0]
    return [
        kind for kind, cls in GROUPS.get(group, {}).items() if path in {key.path for key in keys_of(cls, f"{group}.")}
    ]


def similarity(word: str, candidate: str) -> float:
    """Ratio of the dotted paths, or nine tenths of the ratio of their last names, whichever is larger."""
    whole = difflib.SequenceMatcher(None, word, candidate).ratio()
    last = difflib.SequenceMatcher(None, word.split(".")[-1], candidate.split(".")[-1]).ratio()
    return max(whole, 0.9 * last)


def nearest(word: str, candidates: typing.Iterable[str], limit: int = 2) -> list[str]:
    """The candidate most like `word`, and those exactly as like it (at most `limit`); empty if none is alike."""
    scores = {candidate: similarity(word.lower(), candidate.lower()) for candidate in sorted(set(candidates))}
    best = max(scores.values(), default=0.0)
    if best < CUTOFF:
        return []
    return [candidate for candidate, score in scores.items() if score >= best - 1e-9][:limit]


def suggestion(word: str, candidates: typing.Iterable[str], form: str = "{}") -> str:
    """`; did you mean X?`, or nothing."""
    found = [form.format(candidate) for candidate in nearest(word, candidates)]
    return f"; did you mean {' or '.join(found)}?" if found else ""


def expected(kind: Any) -> str:
    """A declared type in words: `float | None` -> "a number or null"."""
    if isinstance(kind, types.UnionType):
        return " or ".join(expected(part) for part in typing.get_args(kind))
    if kind is type(None):
        return "null"
    if typing.get_origin(kind) is list:
        return "a list such as [a,b]"
    if typing.get_origin(kind) is dict or is_dataclass(kind):
        return "a mapping of keys"
    return TYPE_WORDS.get(kind, "a value")


# --- to a plain dictionary -------------------------------------------------------------------------------------------


def config_to_dict(node: Any) -> dict[str, Any]:
    """Plain nested dictionary of a configuration object, with the option's name under `kind`."""
    plain: dict[str, Any] = {}
    kind = kind_of(node)
    if kind is not None:
        plain[KIND] = kind
    for item in fields(node):
        value = getattr(node, item.name)
        plain[item.name] = config_to_dict(value) if is_dataclass(value) else copy_plain(value)
    return plain


def copy_plain(value: Any) -> Any:
    """Deep copy of what YAML can hold."""
    if isinstance(value, dict):
        return {key: copy_plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [copy_plain(item) for item in value]
    return value


# --- identity of a run -----------------------------------------------------------------------------------------------


def config_hash(resolved: dict[str, Any]) -> str:
    """sha256 over every key that changes the computation (all but `NOT_HASHED`), as hexadecimal."""
    kept = json.loads(json.dumps(resolved))
    for path in NOT_HASHED:
        *parents, last = path.split(".")
        node = kept
        for parent in parents:
            node = node.get(parent, {})
        node.pop(last, None)
    canonical = json.dumps(kept, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()


def run_folder(config: Config, resolved: dict[str, Any]) -> Path:
    """The run's folder: `run_dir`, or `output_dir/name-<8 hex of the hash>`. A pure function of the configuration."""
    if config.run_dir is not None:
        return Path(config.run_dir)
    return Path(config.output_dir) / f"{config.name}-{config_hash(resolved)[:8]}"
