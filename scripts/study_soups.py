#!/usr/bin/env python3
"""Means of weights on real data: docs/results/soups.json and its page.

    python scripts/study_soups.py --run [--jobs 2]    run it, then write record and page
    python scripts/study_soups.py                     write the page of the record anew
    python scripts/study_soups.py --check             exit 1 if the page is not what the record gives

Five runs that differ in their seed learn one task; then nothing is trained any more. WiSE-FT goes a part of the way
from the base to each run, soups are the mean of the four other runs. All are asked for the task that the runs learnt,
and for the loss on texts of another one that none of them saw. What ended is kept in --work, under the commit.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from study import command, commit, how, interval, spread  # noqa: E402
from study_definitions import NOISE, SEEDS  # noqa: E402

from ftlab.files import atomic_write  # noqa: E402

__all__ = ["ROWS", "main", "page"]

RECORD, PAGE = ROOT / "docs/results/soups.json", ROOT / "docs/results/soups.md"
# A run whose data the others are asked about; its one step is not used.
ELSEWHERE = (
    *("data=hpo_define", "data.max_length=256", "data.batch_size=1", "data.micro_batch_size=1", "training.max_steps=1"),
    *("evaluation.generate=false", "evaluation.test=false", "evaluation.times=0", "checkpoint.load_best=false"),
)
# Row -> what ftlab.soup is told beside the runs; None: the run of the seed itself.
ROWS: dict[str, tuple[str, ...] | None] = {
    "one run": None,
    "WiSE-FT, alpha = 0.75": ("alpha=0.75",),
    "WiSE-FT, alpha = 0.5": ("alpha=0.5",),
    "WiSE-FT, alpha = 0.25": ("alpha=0.25",),
    "uniform soup": (),
    "greedy soup": ("kind=greedy",),
}


def words_elsewhere() -> list[str]:
    """Of the run that the other texts belong to."""
    own = {word.partition("=")[0] for word in ELSEWHERE}
    return [*(word for word in NOISE.common if word.partition("=")[0] not in own), *ELSEWHERE, "training.seed=0"]


class Kitchen:
    """The runs and what is made of them, in a folder of this commit, each made once."""

    def __init__(self, work: Path) -> None:
        self.folder = work / commit()[:16]

    def run_dir(self, seed: int) -> Path:
        """Of the run of a seed."""
        return self.folder / f"seed-{seed}"

    def train(self, folder: Path, words: Sequence[str]) -> dict[str, Any]:
        """run.json of a run that ended here."""
        done = folder / "run.json"
        if not done.is_file() or json.loads(done.read_text("utf-8"))["status"] != "finished":
            command("ftlab.train", [*words, f"run_dir={folder}"])
        record: dict[str, Any] = json.loads(done.read_text("utf-8"))
        return record

    def learn(self, seed: int) -> dict[str, Any]:
        """One of the runs that are mixed."""
        return self.train(self.run_dir(seed), [*NOISE.common, f"training.seed={seed}"])

    def elsewhere(self) -> dict[str, Any]:
        """The run of the other texts."""
        return self.train(self.folder / "elsewhere", words_elsewhere())

    def cook(self, row: str, seed: int) -> Path:
        """The folder of a row's weights for a seed."""
        words = ROWS[row]
        if words is None:
            return self.run_dir(seed) / "adapter"
        soup = row.endswith("soup")
        runs = [self.run_dir(other) for other in SEEDS if other != seed] if soup else [self.run_dir(seed)]
        out = self.folder / f"{row.replace(' ', '-').replace(',', '')}-{seed}"
        if not out.is_dir():
            command("ftlab.soup", [f"runs=[{','.join(map(str, runs))}]", f"out={out}", *words])
        return out

    def measure(self, row: str, seed: int) -> dict[str, float]:
        """Scores of a row's weights for a seed: of the task, and the loss elsewhere."""
        weights = self.cook(row, seed)
        word = f"{'adapter' if ROWS[row] is None else 'model'}={weights}"
        task = self.scores(self.run_dir(seed), word, f"{row}-{seed}-task")
        other = self.scores(self.folder / "elsewhere", word, f"{row}-{seed}-elsewhere")
        shown = {"exact_match": task["exact_match"], "loss": task["loss"], "loss_elsewhere": other["loss"]}
        print(f"{row}, seed {seed}:", {name: round(value, 2) for name, value in shown.items()}, flush=True)
        return {"seed": seed, **shown}

    def base(self) -> dict[str, float]:
        """The same of the pretrained model."""
        task = self.scores(self.run_dir(SEEDS[0]), "base=only", "base-task")
        other = self.scores(self.folder / "elsewhere", "base=only", "base-elsewhere")
        return {"exact_match": task["exact_match"], "loss": task["loss"], "loss_elsewhere": other["loss"]}

    def scores(self, run: Path, word: str, name: str) -> dict[str, float]:
        """What ftlab.evaluate says of a run's test split, 200 of it at most."""
        out = self.folder / f"{name.replace(' ', '-').replace(',', '')}.json"
        if not out.is_file():
            command("ftlab.evaluate", [f"run={run}", word, "limit=200", f"out={out}"])
        (found,) = json.loads(out.read_text("utf-8"))["scores"].values()
        return {key: score["value"] for key, score in found.items()}


def study(work: Path, jobs: int) -> dict[str, Any]:
    """Train, mix and measure; the record."""
    work.mkdir(parents=True, exist_ok=True)
    kitchen = Kitchen(work)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        try:
            elsewhere = pool.submit(kitchen.elsewhere)
            records = [*pool.map(kitchen.learn, SEEDS)]
            elsewhere.result()
            base = pool.submit(kitchen.base)
            futures = {row: [pool.submit(kitchen.measure, row, seed) for seed in SEEDS] for row in ROWS}
            rows = [{"name": row, "runs": [future.result() for future in made]} for row, made in futures.items()]
        finally:
            pool.shutdown(cancel_futures=True)
    keys = ("commit", "dirty", "device", "packages", "model", "data")
    return {
        "format": 1,
        "command": f"python scripts/study_soups.py --run --jobs {jobs}",
        **{key: records[0][key] for key in keys},
        "common": list(NOISE.common),
        "elsewhere": words_elsewhere(),
        "base": base.result(),
        "rows": rows,
    }


def page(record: dict[str, Any]) -> str:
    """The page: a table, and how it came about."""
    first = record["rows"][0]["runs"]
    names = ("exact_match", "loss", "loss_elsewhere")
    lines = [
        "# Means of weights",
        "",
        "<!-- Written by scripts/study_soups.py from soups.json. -->",
        "",
        *textwrap.wrap(
            "SmolLM2-135M-Instruct with LoRA of rank 16 in the upper 15 of its 30 layers learns to give the clinical "
            f"term of a layperson's phrase: 60 steps of 16 phrases, with seeds {', '.join(map(str, SEEDS))}. WiSE-FT "
            "is alpha of the way from the base to each run; a soup is the mean of the four runs of the other seeds, so "
            "soups share runs, and their spread says less than that of the runs. 200 held-out phrases; elsewhere: 200 "
            "terms with their definitions, which no run was trained on. Mean ± standard deviation; differences seed by "
            "seed with their 95 % interval (Student's t).",
            118,
        ),
        "",
        "| | exact match, % | against `one run` | test loss | loss elsewhere | against `one run` |",
        "|---|---:|---:|---:|---:|---:|",
        "| the base | {exact_match:.1f} | | {loss:.2f} | {loss_elsewhere:.3f} | |".format(**record["base"]),
    ]
    for row in record["rows"]:
        by = {name: [run[name] for run in row["runs"]] for name in names}
        against = {
            name: ""
            if row is record["rows"][0]
            else "{:+.{d}f} [{:+.{d}f}, {:+.{d}f}]".format(*interval(by[name], [run[name] for run in first]), d=digits)
            for name, digits in (("exact_match", 1), ("loss_elsewhere", 3))
        }
        lines.append(
            f"| {row['name']} | {spread(by['exact_match'])} | {against['exact_match']} | {spread(by['loss'], 2)} "
            f"| {spread(by['loss_elsewhere'], 3)} | {against['loss_elsewhere']} |"
        )
    return "\n".join([*lines, *how(record), "", "Record: [soups.json](soups.json)."]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study, or write or check its page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="run the study first")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--work", type=Path, help="folder that keeps the runs (default: a temporary one)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is out of date")
    arguments = parser.parse_args(argv)
    if arguments.run:
        with tempfile.TemporaryDirectory() as temporary:
            made = study((arguments.work or Path(temporary)).resolve(), arguments.jobs)
        atomic_write(RECORD, json.dumps(made, indent=1) + "\n")
    if not RECORD.is_file():
        return 0
    text = page(json.loads(RECORD.read_text("utf-8")))
    if arguments.check:
        return 0 if PAGE.is_file() and PAGE.read_text("utf-8") == text else 1
    atomic_write(PAGE, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
