#!/usr/bin/env python3
"""Did a change of the code change the numbers? The same ten steps at two revisions, compared bit for bit.

    python scripts/loss_compare.py main HEAD

Each revision is checked out into a temporary folder and runs the experiment full_tiny from there: fp32, one thread of
the CPU, no download. A refactor must leave every loss as it was; a change of the computation shows at which step it
first acts. Both run in the present environment, so a difference is the code's and not a package's.

Exit status: 0 all losses are equal, 1 one differs, 2 a revision could not be run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = ["first_difference", "losses_of", "main"]

ROOT = Path(__file__).resolve().parents[1]
STEPS = 10
OVERRIDES = (
    "+experiment=full_tiny",
    "precision=fp32",
    "parallel.device=cpu",
    "parallel.threads=1",
    "tracking=disabled",
    "tracking.log_every_steps=1",
    "evaluation=none",
    "evaluation.times=0",
    f"training.max_steps={STEPS}",
)


class CompareError(Exception):
    """A mistake or failure that one line explains."""


def first_difference(base: Sequence[float], head: Sequence[float]) -> int | None:
    """Index of the first pair that is not the same number (NaN is the same as NaN); None if all are.

    A sequence that ends early differs where it ends.
    """
    for index, (one, other) in enumerate(zip(base, head, strict=False)):
        if one != other and not (one != one and other != other):
            return index
    return None if len(base) == len(head) else min(len(base), len(head))


def losses_of(metrics: Path) -> list[float]:
    """The training loss of every step, exactly: JSON keeps a double's shortest spelling that reads back the same."""
    lines = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]
    return [float(line["loss"]) for line in lines if line["split"] == "train"]


def call(command: Sequence[str], cwd: Path, what: str, environment: dict[str, str] | None = None) -> str:
    """Run a command to its end and return what it printed; CompareError with its last line if it fails."""
    try:
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CompareError(f"{what}: {command[0]} cannot be started: {error.strerror}") from None
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise CompareError(f"{what}: {said}")
    return done.stdout.strip()


@contextmanager
def checkout(commit: str, folder: Path) -> Iterator[Path]:
    """The files of a commit in a new folder, gone at the end."""
    call(["git", "worktree", "add", "--detach", str(folder), commit], ROOT, f"checking out {commit}")
    try:
        yield folder
    finally:
        call(["git", "worktree", "remove", "--force", str(folder)], ROOT, "removing the checkout")


def run(commit: str, work: Path, name: str) -> list[float]:
    """The losses of the ten steps at a commit."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FTLAB_OFFLINE": "1"}
    run_dir = work / f"run-{name}"
    with checkout(commit, work / name) as folder:
        command = [sys.executable, "-m", "ftlab.train", *OVERRIDES, f"run_dir={run_dir}"]
        call(command, folder, f"running {commit[:12]}", {**environment, "PYTHONPATH": str(folder)})
    losses = losses_of(run_dir / "metrics.jsonl")
    if len(losses) != STEPS:
        raise CompareError(f"{commit[:12]} logged {len(losses)} steps instead of {STEPS}")
    return losses


def compare(base: str, head: str) -> int:
    """Run both revisions and print the verdict."""
    commits = [
        call(["git", "rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}"], ROOT, revision)
        for revision in (base, head)
    ]
    with tempfile.TemporaryDirectory(prefix="loss-compare-") as folder:
        ours, theirs = (run(commit, Path(folder), name) for commit, name in zip(commits, ("base", "head"), strict=True))
    shown = f"{base} ({commits[0][:12]}) and {head} ({commits[1][:12]})"
    index = first_difference(ours, theirs)
    if index is None:
        print(f"{shown}: the losses of all {STEPS} steps are equal bit for bit; the last is {ours[-1]!r}")
        return 0
    print(f"{shown}: the first loss that differs is that of step {index + 1}: {ours[index]!r} and {theirs[index]!r}")
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="loss_compare.py", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("base", help="a git revision")
    parser.add_argument("head", help="another git revision")
    chosen = parser.parse_args(argv)
    try:
        return compare(chosen.base, chosen.head)
    except CompareError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
