"""Conversations as read from a source, before any token: messages, records, splits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ftlab.config import DataConfig, FilesDataConfig, HPODataConfig, LabelledDataConfig
from ftlab.errors import ConfigError

__all__ = ["ROLES", "Message", "Record", "SourceInfo", "Splits", "load_records", "with_system", "wording"]

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Record:
    """A conversation whose last message is the assistant's: the reference answer.

    `group` names what must stay on one side of the split: records with one group are never separated.
    """

    id: str
    messages: tuple[Message, ...]
    group: str = ""

    @property
    def reference(self) -> str:
        """The text of the last message."""
        return self.messages[-1].content

    def shortened(self, shorten: Callable[[str], str]) -> Record | None:
        """The same with `shorten` done to the text in it that may lose its end; None if it has no such text."""
        return None


@dataclass(frozen=True)
class SourceInfo:
    """Where the records come from, for run records, reports and cards.

    `notes` are remarks on the data as loaded that belong in the run's summary.
    """

    name: str
    title: str
    licence: str
    citation: str
    version: str
    url: str
    location: str
    sha256: str
    notes: tuple[str, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """For the run record."""
        return asdict(self)


@dataclass(frozen=True)
class Splits:
    """The three sides. No group is on two of them."""

    train: list[Record]
    validation: list[Record]
    test: list[Record]


def with_system(records: Iterable[Record], system: str | None) -> list[Record]:
    """Put the system message before each conversation that has none."""
    if system is None:
        return list(records)
    message = Message("system", system)
    return [
        record if record.messages[0].role == "system" else replace(record, messages=(message, *record.messages))
        for record in records
    ]


def load_records(config: DataConfig) -> tuple[Splits, SourceInfo]:
    """Read, split and limit the records that a data option names; the option's system message is put in.

    Files are fetched if the cache lacks them. Same configuration, same files: same records in the same order.
    """
    # The sources build the types above, so they are imported when one is needed.
    from ftlab.data.splits import limit_splits

    if isinstance(config, LabelledDataConfig):
        from ftlab.data.labelled import load_labelled

        splits, info, _ = load_labelled(config)
        sides = (splits.train, splits.validation, splits.test)
        return Splits(*(with_system(side, config.system) for side in sides)), info
    if isinstance(config, HPODataConfig):
        from ftlab.data.sources.hpo import load_hpo

        splits, info = load_hpo(config)
    elif isinstance(config, FilesDataConfig):
        from ftlab.data.sources.files import load_files

        splits, info = load_files(config)
    else:
        raise ConfigError(f"data {config.name}: there is no source for a {type(config).__name__}")
    limited = limit_splits(splits, config)
    sides = (limited.train, limited.validation, limited.test)
    return Splits(*(with_system(side, config.system) for side in sides)), info


def wording(config: DataConfig, text: str) -> str:
    """The user message that the data option would make of a bare phrase, for asking a trained model."""
    if isinstance(config, HPODataConfig):
        from ftlab.data.sources.hpo import PROMPTS

        return PROMPTS[config.task] + text
    if isinstance(config, LabelledDataConfig) and config.instruction is not None:
        return f"{config.instruction}\n\n{text}"
    return text
