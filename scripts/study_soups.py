#!/usr/bin/env python3
"""Weight averaging on real data, model soups and WiSE-FT: docs/results/soups.json and its page.

    python scripts/study_soups.py --run [--jobs 2]    run it, then write record and page
    python scripts/study_soups.py                     write the page of the record anew
    python scripts/study_soups.py --check             exit 1 if the page is not what the record gives

Five runs that differ in their seed learn one task; then nothing is trained any more. WiSE-FT goes a part of the way
from the base to each run, soups are of the four other runs. All are asked for the task that the runs learnt, and for
the loss on texts of another one that none of them saw. What ended is kept in --work, under the commit and the words;
the weights themselves, half a gigabyte each, are not.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import shlex
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from study import command, commit, how, interval, of, spread, wrapped, write_page, write_sentences  # noqa: E402
from study_definitions import PHRASES, SEEDS  # noqa: E402

from ftlab.files import atomic_write  # noqa: E402

__all__ = ["ROWS", "main", "page"]

RECORD, PAGE = ROOT / "docs/results/soups.json", ROOT / "docs/results/soups.md"
EXAMPLES = 200
OTHER_WORDS = (
    *("data=hpo_define", "data.max_length=256", "data.batch_size=1", "data.micro_batch_size=1", "training.max_steps=1"),
    *("evaluation.generate=false", "evaluation.test=false", "evaluation.times=0", "checkpoint.load_best=false"),
)
OTHER_KEYS = {word.partition("=")[0] for word in OTHER_WORDS}
# The run whose data the others are asked about; its one step is not used.
ELSEWHERE = (
    *(word for word in PHRASES if word.partition("=")[0] not in OTHER_KEYS),
    *(*OTHER_WORDS, "training.seed=0"),
)
# Row -> whether it is of the four other runs, and what ftlab.soup is told beside the runs; None: the run as it is.
ROWS: dict[str, tuple[bool, tuple[str, ...] | None]] = {
    "one run": (False, None),
    "WiSE-FT, alpha = 0.75": (False, ("alpha=0.75",)),
    "WiSE-FT, alpha = 0.5": (False, ("alpha=0.5",)),
    "WiSE-FT, alpha = 0.25": (False, ("alpha=0.25",)),
    "uniform soup": (True, ()),
    "greedy soup": (True, ("kind=greedy",)),
}


class Kitchen:
    """The runs and what is made of them, each measured once, in a folder of this commit and these words."""

    def __init__(self, work: Path) -> None:
        words = json.dumps([commit(), PHRASES, ELSEWHERE, ROWS, EXAMPLES])
        self.folder = work / hashlib.sha256(words.encode()).hexdigest()[:16]

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
        return self.train(self.run_dir(seed), [*PHRASES, f"training.seed={seed}"])

    def measure(self, row: str, seed: int) -> dict[str, Any]:
        """Scores of a row's weights for a seed: of the task, and the loss elsewhere."""
        of_others, words = ROWS[row]
        runs = [self.run_dir(other) for other in SEEDS if other != seed] if of_others else [self.run_dir(seed)]
        found = self.cooked(f"{row}-{seed}", seed, runs, words)
        print(f"{row}, seed {seed}:", found, flush=True)
        return {"seed": seed, **found}

    def base(self) -> dict[str, Any]:
        """The same of the pretrained model: none of the way to a run."""
        return self.cooked("base", SEEDS[0], [self.run_dir(SEEDS[0])], ("alpha=0",))

    def cooked(self, name: str, seed: int, runs: Sequence[Path], words: Sequence[str] | None) -> dict[str, Any]:
        """Make whole weights, score them, and delete them. All are scored alike: in fp32, by model=."""
        name = name.replace(" ", "-").replace(",", "")
        weights, scores = self.folder / f"{name}-weights", self.folder / f"{name}.json"
        if not scores.is_file():
            shutil.rmtree(weights, ignore_errors=True)
            if words is None:
                command("ftlab.export", [f"run={runs[0]}", f"out={weights}"])
            else:
                command("ftlab.soup", [f"runs=[{','.join(map(str, runs))}]", f"out={weights}", *words])
            task = self.asked(self.run_dir(seed), weights)
            found = {**task, "loss_elsewhere": self.asked(self.folder / "elsewhere", weights)["loss"]}
            if words == ("kind=greedy",):
                taken = json.loads((weights / "soup.json").read_text("utf-8"))["runs"]
                found["taken"] = [int(Path(run).name.removeprefix("seed-")) for run in taken]
            atomic_write(scores, json.dumps(found))
            shutil.rmtree(weights)
        content: dict[str, Any] = json.loads(scores.read_text("utf-8"))
        return content

    def asked(self, run: Path, weights: Path) -> dict[str, Any]:
        """What ftlab.evaluate says of these weights on a run's test split."""
        out = weights / "scores.json"
        command("ftlab.evaluate", [f"run={run}", f"model={weights}", f"limit={EXAMPLES}", f"out={out}"])
        found = json.loads(out.read_text("utf-8"))["scores"]["after"]
        return {key: found[key]["value"] for key in ("exact_match", "loss") if key in found}


def study(work: Path, jobs: int) -> dict[str, Any]:
    """Train, mix and measure; the record."""
    work.mkdir(parents=True, exist_ok=True)
    kitchen = Kitchen(work)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        try:
            elsewhere = pool.submit(kitchen.train, kitchen.folder / "elsewhere", ELSEWHERE)
            records = [*pool.map(kitchen.learn, SEEDS), elsewhere.result()]
            base = pool.submit(kitchen.base)
            futures = {row: [pool.submit(kitchen.measure, row, seed) for seed in SEEDS] for row in ROWS}
            rows = [{"name": row, "runs": [future.result() for future in made]} for row, made in futures.items()]
        finally:
            pool.shutdown(cancel_futures=True)
    keys = ("commit", "device", "packages", "model", "data")
    return {
        "format": 1,
        "command": f"python scripts/study_soups.py --run --jobs {jobs}",
        **{key: records[0][key] for key in keys},
        "dirty": any(record["dirty"] for record in records),
        "common": list(PHRASES),
        "elsewhere": list(ELSEWHERE),
        "examples": EXAMPLES,
        "base": base.result(),
        "rows": rows,
    }


def against(row: dict[str, Any], first: dict[str, Any], name: str, digits: int) -> str:
    """The difference to the runs themselves; its interval where the values share no run."""
    mean, low, high = interval(*([run[name] for run in r["runs"]] for r in (row, first)))
    shared = ROWS[row["name"]][0]
    return (
        "" if row is first else f"{mean:+.{digits}f}" + ("" if shared else f" [{low:+.{digits}f}, {high:+.{digits}f}]")
    )


def page(record: dict[str, Any]) -> str:
    """The page: a table, and how it came about."""
    first, words, examples = record["rows"][0], record["common"], record["examples"]
    steps, size, rank = (of(words, key) for key in ("training.max_steps", "data.batch_size", "method.rank"))
    lines = [
        "# Weight averaging: WiSE-FT and model soups",
        "",
        "<!-- Written by scripts/study_soups.py from soups.json. -->",
        "",
        *textwrap.wrap(
            f"SmolLM2-135M-Instruct with LoRA of rank {rank} in the upper 15 of its 30 layers learns to give the "
            f"clinical term of a layperson's phrase: {steps} steps of {size} phrases, with seeds "
            f"{', '.join(map(str, SEEDS))}. WiSE-FT is alpha of the way from the base to each run. A uniform soup is "
            "the mean of the four runs of the other seeds; a greedy one takes of them what lowers the validation loss. "
            f"Scored on {examples} held-out phrases; elsewhere: {examples} terms with their definitions, which no run "
            "was trained on. Mean ± standard deviation over seeds; differences seed by seed, with their 95 % interval "
            "(Student's t) where the values are of different runs: soups share theirs, so their spread says little.",
            118,
        ),
        "",
        "| | exact match, % | against `one run` | test loss | loss elsewhere | against `one run` |",
        "|---|---:|---:|---:|---:|---:|",
        "| the base | {exact_match:.1f} | | {loss:.2f} | {loss_elsewhere:.3f} | |".format(**record["base"]),
    ]
    for row in record["rows"]:
        match, loss, other = ([run[name] for run in row["runs"]] for name in ("exact_match", "loss", "loss_elsewhere"))
        lines.append(
            f"| {row['name']} | {spread(match)} | {against(row, first, 'exact_match', 1)} | {spread(loss, 2)} "
            f"| {spread(other, 3)} | {against(row, first, 'loss_elsewhere', 3)} |"
        )
    taken = [
        f"{', '.join(map(str, run['taken']))} without {run['seed']}"
        for row in record["rows"]
        for run in row["runs"]
        if "taken" in run
    ]
    lines += ["", *textwrap.wrap(f"Seeds that the greedy soups took: {'; '.join(taken)}.", 118)]
    lines += [*how(record, memory=False), "", "The texts elsewhere are those of:", ""]
    lines += [f"`python -m ftlab.train {shlex.join(record['elsewhere'])}`"]
    return "\n".join([*lines, "", "Record: [soups.json](soups.json)."]) + "\n"


def sentence(name: str, row_name: str, folder: str) -> str | None:
    """What was measured of one row, for its page; None for another study's."""
    if name != "soups":
        return None
    if not RECORD.is_file():
        return f"Not measured yet ({row_name}): there is no record of `scripts/study_soups.py`.\n"
    record = json.loads(RECORD.read_text("utf-8"))
    own, one = (next(row for row in record["rows"] if row["name"] == name)["runs"] for name in (row_name, "one run"))
    parts = [
        f"{label} {spread([run[key] for run in own], digits)} (one run: {spread([run[key] for run in one], digits)})"
        for key, label, digits in (
            ("exact_match", "exact match in percent", 1),
            ("loss_elsewhere", "loss elsewhere", 3),
        )
    ]
    return wrapped(
        f"Measured ({row_name}), mean ± standard deviation of {len(own)} seeds: {', '.join(parts)}. SmolLM2 with LoRA, "
        f"lay phrase to clinical term: [all rows]({folder}/{PAGE.name})."
    )


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
    current = write_sentences(sentence, arguments.check)
    if RECORD.is_file():
        current &= write_page(PAGE, page(json.loads(RECORD.read_text("utf-8"))), arguments.check)
    return 0 if current else 1


if __name__ == "__main__":
    raise SystemExit(main())
