"""Reading a run folder, also one that is incomplete."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlab.errors import FtlabError
from ftlab.training.tracking import read_metrics, restore_numbers

__all__ = ["Answer", "RunFolder", "read_run", "run_folders"]

MARKS = ("run.json", "config.yaml", "metrics.jsonl")  # any of them makes a folder a run folder


@dataclass(frozen=True)
class Answer:
    """A line of predictions/*.jsonl."""

    id: str
    prompt: str
    reference: str
    prediction: str


@dataclass(frozen=True)
class RunFolder:
    """Everything that a report needs of a run.

    record: run.json, empty if it is missing. metrics: the lines of metrics.jsonl. predictions: the answers on the test
    split by `base` and `final`, those that exist. problems: what is missing or unreadable, one sentence each.
    """

    path: Path
    record: dict[str, Any]
    metrics: list[dict[str, Any]]
    predictions: dict[str, list[Answer]]
    config_text: str
    problems: tuple[str, ...]

    def series(self, split: str, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric of a split, without what is not a finite number."""
        points = [(line["step"], line[key]) for line in self.metrics if line["split"] == split and key in line]
        finite = [(step, value) for step, value in points if isinstance(value, int | float) and math.isfinite(value)]
        return [step for step, _ in finite], [float(value) for _, value in finite]

    def keys(self, split: str) -> list[str]:
        """Names of the metrics of a split, in order of appearance."""
        return list(dict.fromkeys(key for line in self.metrics if line["split"] == split for key in line))


def run_folders(parent: Path) -> list[str]:
    """Names of the run folders directly in `parent`, in alphabetical order."""
    if not parent.is_dir():
        return []
    return sorted(entry.name for entry in parent.iterdir() if any((entry / mark).is_file() for mark in MARKS))


def read_run(path: str | Path) -> RunFolder:
    """Read a run folder; parts that are missing or damaged are named in `problems`.

    Raises:
        FtlabError: this is not a run folder; the message names the nearest one.
    """
    folder = Path(path)
    if not any((folder / mark).is_file() for mark in MARKS):
        raise FtlabError(_not_a_run(folder))
    problems: list[str] = []
    record = _read_record(folder / "run.json", problems)
    metrics = read_metrics(folder / "metrics.jsonl")
    if not metrics:
        problems.append("There are no metrics: training had not begun.")
    answers = {who: _read_answers(folder / "predictions" / f"{who}.jsonl", problems) for who in ("base", "final")}
    predictions = {who: lines for who, lines in answers.items() if lines}
    config = folder / "config.yaml"
    text = config.read_text("utf-8", errors="replace") if config.is_file() else ""
    return RunFolder(folder, record, metrics, predictions, text, tuple(problems))


def _not_a_run(folder: Path) -> str:
    if folder.is_file():
        return f"{folder} is a file, not a run folder; give the folder that holds run.json"
    if inside := run_folders(folder):
        return f"{folder} holds run folders but is none itself; give one of them: {_names(folder, inside)}"
    state = "holds neither run.json nor metrics.jsonl" if folder.is_dir() else "does not exist"
    siblings = run_folders(folder.parent)
    near = difflib.get_close_matches(folder.name, siblings, n=3, cutoff=0.3)
    if near:
        return f"{folder} {state}; the nearest run folders are {_names(folder.parent, near)}"
    return f"{folder} {state}, and no run folder in {folder.parent} has a similar name; give a folder with a run.json"


def _names(parent: Path, names: Sequence[str]) -> str:
    shown = [str(parent / name) for name in names[:5]]
    return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _read_record(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.is_file():
        problems.append("There is no run.json: the run ended before it could write its record.")
        return {}
    try:
        record = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        problems.append(f"run.json is damaged ({error}).")
        return {}
    if not isinstance(record, dict):
        return {}
    for scores in (record.get("scores") or {}).values():  # as metrics.jsonl, it has what is not finite as text
        scores.update({name: restore_numbers(score) for name, score in scores.items()})
    return record


def _read_answers(path: Path, problems: list[str]) -> list[Answer]:
    if not path.is_file():
        return []
    answers = []
    for number, text in enumerate(path.read_text("utf-8", errors="replace").split("\n"), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            answers.append(Answer(*(str(line[key]) for key in ("id", "prompt", "reference", "prediction"))))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            problems.append(f"{path.parent.name}/{path.name} line {number} is damaged ({error!r}) and was left out.")
    return answers
