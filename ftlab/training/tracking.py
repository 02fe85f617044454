"""metrics.jsonl, the truth about a run, and the process that mirrors it to Weights & Biases.

A line is `{"step", "split", "time", ...values}`. Within a split steps only rise. JSON has no NaN or infinity, so these
are written as the strings "nan", "inf" and "-inf", which `read_metrics` turns back into numbers.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ftlab.config import TrackingConfig
from ftlab.errors import FtlabError
from ftlab.files import atomic_write

__all__ = ["MirrorFiles", "Tracker", "read_metrics", "restore_numbers"]

FINISH_SECONDS = 10.0  # how long the end of a run waits for the mirror
NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class MirrorFiles:
    """The files in a run folder by which the run and its mirror speak to each other."""

    metrics = "metrics.jsonl"
    run_id = "wandb_id"  # of Weights & Biases; the same for every resume
    log = "wandb.log"  # what the mirror and wandb printed
    folder = "wandb"  # wandb's own files, and:
    task = "wandb/mirror.json"  # what to mirror, where to
    finished = "wandb/finished"  # written when the run ends; holds its status
    lock = "wandb/mirror.lock"  # held by the one mirror that writes


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; none if there is no file. A torn line, as a kill leaves at the end, is left out."""
    return [line for _, line in _parsed_lines(path)]


def _parsed_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each whole line, as text and as an object with its non-finite numbers restored."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_bytes().decode("utf-8", errors="replace").split("\n"):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int) and isinstance(line.get("split"), str):
            lines.append((text, restore_numbers(line)))
    return lines


def restore_numbers(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line as it was logged: the strings that stand for non-finite numbers are numbers again."""
    return {key: NOT_FINITE.get(value, value) if isinstance(value, str) else value for key, value in line.items()}


def logged(run_dir: Path, step: int, split: str) -> dict[str, float]:
    """The numbers that metrics.jsonl has of a step; none if it has no such line."""
    lines = [line for _, line in _parsed_lines(run_dir / MirrorFiles.metrics)]
    none: dict[str, Any] = {}
    found = next((line for line in reversed(lines) if (line["step"], line["split"]) == (step, split)), none)
    return {key: float(value) for key, value in found.items() if isinstance(value, int | float)}


def _writable(value: Any) -> Any:
    """A value as JSON can hold it."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value


class Tracker:
    """Appends to metrics.jsonl and starts the mirror; only rank 0's is enabled, the others' do nothing.

    Args:
        run_dir: the run folder; must exist.
        config: whether and how Weights & Biases mirrors the file.
        resolved: the resolved configuration, shown there.
        run_name: the run's name there.
        resume_step: lines of later steps are removed, because they will be written again; None: a fresh run, all go.
        enabled: whether this rank writes.
        mirror_command: the mirror to start instead of `python -m ftlab.training.wandb_mirror`; gets the run folder and
            this start's token as its last arguments.

    Raises:
        FtlabError: metrics.jsonl cannot be opened; later an OSError, if it cannot be written. Trouble with the mirror
            never raises; see `mirror_status`.
    """

    def __init__(
        self,
        run_dir: Path,
        config: TrackingConfig,
        resolved: Mapping[str, Any],
        run_name: str,
        resume_step: int | None,
        enabled: bool,
        mirror_command: Sequence[str] | None = None,
    ) -> None:
        self._run_dir = run_dir
        self._resume_step = -1 if resume_step is None else resume_step
        self._last: dict[str, int] = {}
        self._file: IO[str] | None = None
        self._mirror: subprocess.Popen[bytes] | None = None
        self._trouble: str | None = None
        self._left_running = False
        if not enabled:
            return
        self._open_metrics()
        if config.mode == "disabled":
            return
        try:
            self._start_mirror(config, resolved, run_name, mirror_command)
        except OSError as error:
            self._trouble = f"could not be started ({error})"

    def _open_metrics(self) -> None:
        path = self._run_dir / MirrorFiles.metrics
        lines = [(text, line) for text, line in _parsed_lines(path) if line["step"] <= self._resume_step]
        for _, line in lines:
            self._last[line["split"]] = max(line["step"], self._last.get(line["split"], -1))
        try:
            if path.exists():
                atomic_write(path, "".join(text + "\n" for text, _ in lines))
            self._file = path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise FtlabError(
                f"{path} cannot be written: {error.strerror}; free the disk or change output_dir"
            ) from None

    def _start_mirror(
        self, config: TrackingConfig, resolved: Mapping[str, Any], run_name: str, command: Sequence[str] | None
    ) -> None:
        folder, id_file = self._run_dir / MirrorFiles.folder, self._run_dir / MirrorFiles.run_id
        folder.mkdir(exist_ok=True)
        (self._run_dir / MirrorFiles.finished).unlink(missing_ok=True)
        if self._resume_step < 0 or not id_file.exists():
            atomic_write(id_file, secrets.token_hex(4) + "\n")
        task = {
            "mode": config.mode,
            "project": config.project,
            "entity": config.entity,
            "tags": list(config.tags),
            "name": run_name,
            "id": id_file.read_text("utf-8").strip(),
            "parent": os.getpid(),
            "start": secrets.token_hex(8),
            "config": dict(resolved),
        }
        atomic_write(self._run_dir / MirrorFiles.task, json.dumps(task, indent=1, default=str) + "\n")
        command = command or [sys.executable, "-m", "ftlab.training.wandb_mirror"]
        with (self._run_dir / MirrorFiles.log).open("ab") as log:
            # A session of its own: Ctrl-C in the terminal reaches the run, which then ends the mirror in good order.
            self._mirror = subprocess.Popen(
                [*command, str(self._run_dir.resolve()), str(task["start"])],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def log(self, step: int, split: str, values: Mapping[str, float | str]) -> None:
        """Append a line; whole once this returns, also if the process is killed next.

        A step up to the one resumed from that the split already has is not written again: it is the same line.

        Raises:
            ValueError: the split already has this step or a later one.
            FtlabError: the file cannot be written.
        """
        if self._file is None:
            return
        if step <= self._last.get(split, -1):
            if step <= self._resume_step:
                return
            raise ValueError(f"{split} metrics of step {step} after those of step {self._last[split]}")
        line = {"step": step, "split": split, "time": round(time.time(), 3)}
        line |= {key: _writable(value) for key, value in values.items()}
        self._write(json.dumps(line, allow_nan=False) + "\n")
        self._last[split] = step

    def _write(self, text: str) -> None:
        assert self._file is not None
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            raise self._named(error) from None

    def _named(self, error: OSError) -> OSError:
        """The error with the file's name, which one of writing or flushing does not have."""
        return OSError(error.errno, error.strerror, str(self._run_dir / MirrorFiles.metrics))

    def sync(self) -> None:
        """Bring the lines so far to the disk, so that they are there if a checkpoint of this step is."""
        if self._file is None:
            return
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._named(error) from None

    def finish(self, status: str) -> None:
        """Close the file, tell the mirror, and wait for it, but never longer than `FINISH_SECONDS`."""
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:
                self._trouble = self._trouble or f"metrics.jsonl was not closed ({error.strerror})"
            self._file = None
        if self._mirror is None or self._left_running:
            return
        try:
            atomic_write(self._run_dir / MirrorFiles.finished, status + "\n")
            self._mirror.wait(FINISH_SECONDS)
        except OSError as error:
            self._trouble = f"could not be told that the run ended ({error})"
        except subprocess.TimeoutExpired:
            self._left_running = True

    def mirror_status(self) -> str:
        """What is wrong with the mirror, in one line for the summary and the report; empty if nothing is."""
        log = self._run_dir / MirrorFiles.log
        if self._trouble is not None:
            return f"Weights & Biases: {self._trouble}; metrics.jsonl has everything"
        if self._left_running:
            return f"Weights & Biases: still busy {FINISH_SECONDS:.0f} s after the end, goes on by itself; see {log}"
        code = None if self._mirror is None else self._mirror.poll()
        if code:
            return f"Weights & Biases: the mirror failed (exit status {code}), see {log}; metrics.jsonl has everything"
        return ""
