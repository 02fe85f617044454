"""The folder of a run: whose it is, and how an earlier run in it makes room."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ftlab.assets import parse_location
from ftlab.errors import FtlabError
from ftlab.files import clean_leftovers
from ftlab.training.parallel import Ranks
from ftlab.training.record import RunRecord

__all__ = ["differences", "needed_within", "own_folder", "set_aside"]

# What a run writes under its lock, and nothing else writes.
_WRITTEN = ("model", "adapter", "run.json", "config.yaml", "metrics.jsonl")
_PREDICTIONS = ("base.jsonl", "final.jsonl")


@contextlib.contextmanager
def own_folder(run_dir: Path, ranks: Ranks) -> Iterator[RunRecord]:
    """The run folder, made if missing, and locked against a second process that would write into it.

    Only the main rank looks at the disk; the others are told, so that all of them decide alike.
    """
    problem: str | None = None
    content: dict[str, Any] = {}
    lock: IO[str] | None = None
    if ranks.is_main:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            lock = (run_dir / ".lock").open("w")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            clean_leftovers(run_dir, _WRITTEN)
            clean_leftovers(run_dir / "predictions", _PREDICTIONS)
            content = RunRecord(run_dir).content
            if content.get("status") == "failed" and not _has_work(run_dir):
                content = {}  # settings that did not work hold no folder
        except BlockingIOError:
            problem = f"another process is running in {run_dir}; wait for it, or give another run_dir"
        except OSError as error:
            problem = (
                f"the run folder {run_dir} cannot be written ({error.strerror}); give another output_dir or run_dir"
            )
        except FtlabError as error:
            problem = str(error)
    try:
        problem, content = ranks.agree((problem, content))
        if problem is not None:
            raise FtlabError(problem)
        yield RunRecord(run_dir, enabled=ranks.is_main, content=content)
    finally:
        if lock is not None:
            lock.close()


def _has_work(run_dir: Path) -> bool:
    """Whether a run came as far as a measured value or a checkpoint."""
    metrics = run_dir / "metrics.jsonl"
    return (metrics.exists() and metrics.stat().st_size > 0) or any((run_dir / "checkpoints").glob("*"))


def needed_within(run_dir: Path, settled: Mapping[str, Any]) -> str | None:
    """``key=value`` of the first setting that reads something in `run_dir`; None: the folder can be moved.

    settled: the plain configuration, its paths absolute. Sources of a penalty or of replay that is off are not read.
    """
    named: dict[str, Any] = {"method.start_from": settled["method"].get("start_from")}
    named |= {f"model.{key}": settled["model"].get(key) for key in ("location", "tokenizer")}
    files = ("train", "validation", "test", "location", "template")
    named |= {f"data.{key}": settled["data"].get(key) for key in files}
    for name, strength in (("ewc", "strength"), ("replay", "share")):
        group = settled["regularizer"][name]
        named[f"regularizer.{name}.source"] = group["source"] if group[strength] > 0 else None
    folder = run_dir.resolve()
    for key, value in named.items():
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, str) and (place := _place(path)) is not None and place.is_relative_to(folder):
                return f"{key}={path}"
    return None


def _place(location: str) -> Path | None:
    """Where a setting's file or folder lies; None for what is no path. One that is no pinned file is absolute here."""
    if not Path(location).is_absolute() and "#sha256=" not in location:
        return None
    parsed = parse_location(location)
    return Path(parsed.member).expanduser().resolve() if parsed.kind == "file" else None


def set_aside(run_dir: Path) -> Path:
    """Move what a folder holds to a new one beside it, which is returned; the lock stays, since its owner holds it."""
    number = 1
    while (aside := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
        number += 1
    aside.mkdir()
    for entry in run_dir.iterdir():
        if entry.name != ".lock":
            entry.rename(aside / entry.name)
    return aside


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """``key: old -> new`` for each leaf that differs."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, now = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            lines += differences(before, now, f"{prefix}{key}.")
        elif before != now:
            lines.append(f"{prefix}{key}: {before} -> {now}")
    return lines
