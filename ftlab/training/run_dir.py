"""The folder of a run: whose it is, and how an earlier run in it makes room."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ftlab.errors import FtlabError
from ftlab.training.parallel import Ranks
from ftlab.training.record import RunRecord

__all__ = ["differences", "own_folder", "set_aside"]


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
    problem, content = ranks.agree((problem, content))
    if problem is not None:
        raise FtlabError(problem)
    record = RunRecord(run_dir, enabled=ranks.is_main, content=content)
    try:
        yield record
    finally:
        if lock is not None:
            lock.close()


def _has_work(run_dir: Path) -> bool:
    """Whether a run came as far as a measured value or a checkpoint."""
    metrics = run_dir / "metrics.jsonl"
    return (metrics.exists() and metrics.stat().st_size > 0) or any((run_dir / "checkpoints").glob("*"))


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
