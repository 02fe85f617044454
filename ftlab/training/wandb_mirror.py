"""``python -m ftlab.training.wandb_mirror RUN_DIR``: follow metrics.jsonl and repeat it to Weights & Biases.

A process of its own, started by `Tracker`: whatever happens here (no package, no network, a hang) does not touch
training. It ends when the run says that it has, or when the run's process is gone.

A step of Weights & Biases is one row with the values of all splits at that training step, named `split/value`. A row is
sent when a later step appears, so each step is sent once and steps rise. A value that comes with an earlier step than
the last row's (a test score of the best step, say) goes to the run's summary instead.

Offline, a resumed run writes the whole history anew into a fresh file of the same run and puts the older files into
wandb/superseded, so that `wandb sync` of what remains sends everything once. Online, the server knows the last step it
has, and later ones are sent.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ftlab.training.tracking import MirrorFiles, restore_numbers

__all__ = ["Rows", "follow", "main"]

POLL_SECONDS = 0.25
LOCK_SECONDS = 60.0  # how long to wait for the mirror of an earlier start of this run to end
LINGER_SECONDS = 900.0  # after the run's end; a mirror that still hangs then gives up


class Rows:
    """Merges metric lines into one row a step, in rising order of steps.

    Args:
        send: gets (step, row) of each complete step.
        late: gets the values of a line whose step lies before the row at hand.
        after: rows up to this step have been sent before and are left out.
    """

    def __init__(
        self, send: Callable[[int, dict[str, Any]], None], late: Callable[[dict[str, Any]], None], after: int = -1
    ) -> None:
        self._send, self._late, self._after = send, late, after
        self._step = -1
        self.sent = 0  # rows
        self._row: dict[str, Any] = {}

    def add(self, line: dict[str, Any]) -> None:
        """Take in one line of metrics.jsonl."""
        step = line["step"]
        row = {f"{line['split']}/{key}": value for key, value in line.items() if key not in ("step", "split", "time")}
        if step < self._step:
            self._late(row)
            return
        if step > self._step:
            self.flush()
            self._step = step
        self._row |= row

    def flush(self) -> None:
        """Send the row at hand; nothing may be added to its step afterwards."""
        if self._row and self._step > self._after:
            self._send(self._step, {"step": self._step, **self._row})
            self.sent += 1
        self._row = {}


def follow(path: Path, ended: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """The lines of a growing metrics.jsonl, until `ended` and nothing is left to read. A torn line is never yielded."""
    while not path.exists():
        if ended():
            return
        time.sleep(POLL_SECONDS)
    with path.open("rb") as file:
        rest = b""
        while True:
            over = ended()  # asked before reading, so that the last lines are not missed
            block = file.read()
            *lines, rest = (rest + block).split(b"\n")
            for text in lines:
                yield restore_numbers(json.loads(text))
            if over and not block:
                return
            if not block:
                time.sleep(POLL_SECONDS)


@contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Hold the lock; the mirror of a killed earlier start may still be writing its last rows."""
    with path.open("w") as file:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise SystemExit(f"another mirror has held {path} for {LOCK_SECONDS:.0f} s; giving up") from None
                time.sleep(POLL_SECONDS)
        yield


def _set_aside_older_segments(folder: Path) -> None:
    """Move offline files of earlier starts away: what is written now repeats them in full."""
    aside = folder / "superseded"
    for segment in folder.glob("offline-run-*"):
        aside.mkdir(exist_ok=True)
        segment.rename(aside / segment.name)


def _start_run(run_dir: Path, task: dict[str, Any]) -> Any:
    """A wandb run that records what it is given and nothing about the machine, the code or the console."""
    import wandb

    settings = wandb.Settings(
        console="off",
        silent=True,
        save_code=False,
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
        x_disable_viewer=task["mode"] == "offline",
        use_dot_wandb=False,
    )
    run = wandb.init(
        mode=task["mode"],
        dir=str(run_dir),
        project=task["project"],
        entity=task["entity"],
        tags=task["tags"],
        name=task["name"],
        id=task["id"],
        config=task["config"],
        resume="allow" if task["mode"] == "online" else None,
        settings=settings,
    )
    for split in ("train", "validation", "test"):
        run.define_metric(f"{split}/*", step_metric="step")
    return run


def main(argv: list[str] | None = None) -> int:
    """Mirror one run folder; the exit status is 0, or 3 if wandb cannot be imported.

    The second argument, if any, is the token of the start that this mirror belongs to.
    """
    arguments = sys.argv[1:] if argv is None else argv
    run_dir = Path(arguments[0])
    os.nice(10)  # the few cores belong to training
    os.environ |= {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
    with _only_one(run_dir / MirrorFiles.lock):
        task = json.loads((run_dir / MirrorFiles.task).read_text("utf-8"))
        if arguments[1:] not in ([], [task["start"]]):
            print("the run was started again, with a mirror of its own", flush=True)
            return 0
        return _mirror(run_dir, task)


def _mirror(run_dir: Path, task: dict[str, Any]) -> int:
    """Follow the metrics of one start of the run to its end."""
    finished = run_dir / MirrorFiles.finished

    def ended() -> bool:
        # A killed parent leaves its child to another process, so the id of the parent changes.
        if finished.exists() or os.getppid() != task["parent"]:
            _give_up_after(LINGER_SECONDS)
            return True
        return False

    if task["mode"] == "offline":
        _set_aside_older_segments(run_dir / MirrorFiles.folder)
    try:
        run = _start_run(run_dir, task)
    except ImportError as error:
        print(f"wandb cannot be imported: {error}; pip install wandb, or set tracking.mode=disabled", flush=True)
        return 3
    known = run.step - 1 if task["mode"] == "online" and run.resumed else -1
    rows = Rows(lambda step, row: run.log(row, step=step, commit=True), run.summary.update, after=known)
    for line in follow(run_dir / MirrorFiles.metrics, ended):
        rows.add(line)
    rows.flush()
    status = finished.read_text("utf-8").strip() if finished.exists() else "killed"
    run.finish(exit_code=0 if status == "finished" else 1)
    print(f"run {task['id']}: {status}, {rows.sent} rows mirrored", flush=True)
    return 0


_watchdog: list[threading.Timer] = []


def _give_up_after(seconds: float) -> None:
    """Leave the process by force later, once; a hang in wandb would otherwise outlive the run for ever."""
    if not _watchdog:
        timer = threading.Timer(seconds, os._exit, [4])
        timer.daemon = True
        timer.start()
        _watchdog.append(timer)


if __name__ == "__main__":
    raise SystemExit(main())
