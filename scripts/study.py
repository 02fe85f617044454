#!/usr/bin/env python3
"""Studies on real data with five seeds each: docs/results/NAME.json and the page made of it.

    python scripts/study.py few_shot --run [--jobs 2]    run it, then write its record and page
    python scripts/study.py [few_shot ...]               write the pages of the records anew; without names, all
    python scripts/study.py --check                      exit 1 if a page is not what its record gives

Besides its own page a record gives the sentences between `<!-- study:NAME:ROW -->` and `<!-- /study -->` in others.

What a study compares stands in scripts/study_definitions.py. Each row is tried with its settings on one seed that is
used for nothing else; the setting with the lowest validation loss is taken, and only that one runs with the other seeds
and is quoted. Where the best setting is at the edge of those tried, the next one beyond is tried too. A seed chooses
the labelled examples, the new head and the order, so rows are compared seed by seed.

A run that ended is kept in --work, under the commit and its words: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
RESULTS = DOCS / "results"
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from readme_results import without_bf16  # noqa: E402
from study_definitions import SEEDS, STUDIES, TUNING_SEED, Entry, Study  # noqa: E402

from ftlab.errors import DivergenceError  # noqa: E402
from ftlab.files import atomic_write  # noqa: E402

__all__ = [
    *("Runs", "choose", "climb", "command", "commit", "how", "interval", "machine_of", "main", "of", "page", "spread"),
    "study",
]

BLOCK = re.compile(r"(<!-- study:(?P<name>\w+):(?P<row>[^>]+) -->\n).*?(<!-- /study -->)", re.DOTALL)
# Two-sided 95 % quantile of Student's t by degrees of freedom: few seeds, so the normal one would be too narrow.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


class Runs:
    """Runs of ftlab.train in processes of their own, each made once and kept."""

    def __init__(self, work: Path, jobs: int) -> None:
        self.work, self.jobs = work, jobs
        self.pool = concurrent.futures.ThreadPoolExecutor(jobs)
        self.first: dict[str, Any] = {}
        self.making: dict[str, threading.Lock] = {}  # rows may share a run, which only one of them may make
        work.mkdir(parents=True, exist_ok=True)

    def submit(self, words: Sequence[str], **more: Any) -> concurrent.futures.Future[dict[str, Any]]:
        """One run, in the pool; what of its run.json goes into a record, with `more`. Without `more` it is a trial."""
        return self.pool.submit(self.run, list(words), more)

    def run(self, words: list[str], more: dict[str, Any]) -> dict[str, Any]:
        """As submit, at once."""
        name = hashlib.sha256(json.dumps([commit(), words]).encode()).hexdigest()[:24]
        file, folder = self.work / f"{name}.json", self.work / name
        with self.making.setdefault(name, threading.Lock()):
            if not file.is_file():
                self.make(words, file, folder, may_diverge=not more)
        record = json.loads(file.read_text("utf-8"))
        loss = None if record is None else record["best"]["value"]
        print(f"{'diverged' if loss is None else f'{loss:.4f}'}  {shlex.join(words[-4:])}", flush=True)
        if record is None:
            return {"validation_loss": None}
        self.first = self.first or record
        if machine_of(record) != machine_of(self.first):
            raise SystemExit(f"{file} was made on another kind of machine; remove it, or give another --work")
        return {**kept(record), **more}

    def make(self, words: list[str], file: Path, folder: Path, *, may_diverge: bool) -> None:
        """Train, and keep run.json; null if it diverged and may: a setting that is tried then has no loss and loses."""
        shutil.rmtree(folder, ignore_errors=True)
        try:
            command("ftlab.train", [*words, f"run_dir={folder}"])
            content = (folder / "run.json").read_text("utf-8")
        except DivergenceError as error:
            if not may_diverge:
                raise SystemExit(str(error)) from None
            content = "null"
        atomic_write(file, content)
        shutil.rmtree(folder, ignore_errors=True)


def machine_of(record: dict[str, Any]) -> str:
    """The processor in words, of a run or of a record."""
    return f"{record['device']['name']}{without_bf16(record['device'])}"


def command(module: str, words: Sequence[str]) -> None:
    """A command of ftlab in a process of its own, on one thread.

    Errors: DivergenceError if its training diverged, else SystemExit, both with its words and what it said.
    """
    full = [sys.executable, "-m", module, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(full, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    if done.returncode != 0:
        error = DivergenceError if done.returncode == DivergenceError.exit_code else SystemExit
        raise error(f"{shlex.join(full)}\n{done.stderr}")


def commit() -> str:
    """The commit of this tree."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.strip()


def kept(record: dict[str, Any]) -> dict[str, Any]:
    """What of a run goes into a study's record."""
    final = record["scores"].get("final") or {}
    return {
        "validation_loss": record["best"]["value"],
        "scores": {
            name: score["value"] for name, score in final.items() if isinstance(score, dict) and "value" in score
        },
        "trained": sum(row["count"] for row in record["parameters"] if row["trainable"]),
        "total": sum(row["count"] for row in record["parameters"]),
        "peak_rss": record["memory"]["peak_rss"],
    }


def words_of(plan: Study, entry: Entry, more: Sequence[str], seed: int) -> list[str]:
    """All words of one run."""
    seeds = [word.format(seed=seed) for word in plan.seed_words]
    tuning = plan.tuning_words if seed == TUNING_SEED else ()
    return [*plan.common, *plan.words_of_group(entry.group), *entry.words, *tuning, *seeds, *more]


def climb(
    length: int, start: int, measure: Callable[[Sequence[int]], dict[int, float]]
) -> tuple[int, dict[int, float]]:
    """The place of a ladder with the lowest measure, and all measures: from three on, until they enclose the lowest."""
    low, high = start, min(start + 3, length)
    tried: dict[int, float] = {}
    while True:
        tried |= measure([place for place in range(low, high) if place not in tried])
        best = min(tried, key=lambda place: tried[place])
        if best == low and low > 0:
            low -= 1
        elif best == high - 1 and high < length:
            high += 1
        else:
            return best, tried


def choose(plan: Study, entry: Entry, taken: Sequence[str], runs: Runs) -> tuple[list[str], list[dict[str, Any]]]:
    """The setting with the lowest validation loss, and all that were tried, in the ladder's order."""
    if not entry.ladder:
        return [*taken], []
    tried: dict[int, dict[str, Any]] = {}

    def losses(places: Sequence[int]) -> dict[int, float]:
        words = {place: words_of(plan, entry, [*taken, entry.ladder[place]], TUNING_SEED) for place in places}
        new = {place: runs.submit(given) for place, given in words.items()}
        tried.update({place: future.result() | {"setting": entry.ladder[place]} for place, future in new.items()})
        values = {place: tried[place]["validation_loss"] for place in places}
        return {place: math.inf if value is None else float(value) for place, value in values.items()}

    best, _ = climb(len(entry.ladder), entry.start, losses)
    return [*taken, entry.ladder[best]], [tried[place] for place in sorted(tried)]


def study(name: str, runs: Runs) -> dict[str, Any]:
    """Choose settings, run the seeds, and make the record."""
    plan = STUDIES[name]
    chosen: dict[tuple[str, str], list[str]] = {}
    rows = []
    for entry in plan.entries:
        taken = [] if entry.rate_of is None else chosen[entry.group, entry.rate_of]
        words, tried = choose(plan, entry, taken, runs)
        chosen[entry.group, entry.name] = words
        futures = [runs.submit(words_of(plan, entry, words, seed), seed=seed) for seed in SEEDS]
        rows.append((entry, words, tried, futures))
    made = [
        {
            "group": entry.group,
            "name": entry.name,
            "words": [*entry.words, *words],
            "tried": tried,
            "runs": [future.result() for future in futures],
        }
        for entry, words, tried, futures in rows
    ]
    return header(f"python scripts/study.py {name} --run --jobs {runs.jobs}", runs) | {
        "common": list(plan.common),
        "rows": made,
    }


def header(command: str, runs: Runs) -> dict[str, Any]:
    """Where a record comes from."""
    if runs.first["dirty"]:
        print("warning: the tree has uncommitted changes, and the record says so", file=sys.stderr)
    keys = ("commit", "dirty", "device", "packages", "model", "data")
    return {"format": 1, "command": command, **{key: runs.first[key] for key in keys}}


# --- the page --------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def interval(values: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """Mean of the differences, seed by seed, and the ends of its 95 % interval by Student's t."""
    differences = [value - other for value, other in zip(values, others, strict=True)]
    mean = statistics.mean(differences)
    half = T95[len(differences) - 1] * statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, mean - half, mean + half


def table(rows: Sequence[dict[str, Any]], scores: Sequence[str]) -> list[str]:
    """One group's lines; the first row is what the others are held against."""
    main_score, second, loss = scores
    label = {"accuracy": "accuracy, %", "ece": "ECE, %", "exact_match": "exact match, %"}
    label |= {"token_f1": "token F1, %"}
    reference = [run["scores"][main_score] for run in rows[0]["runs"]]
    against_first = f"{label[main_score]} | against `{rows[0]['name']}`"
    choice = any(row["tried"] for row in rows)
    lines = [
        f"| | trained weights | {against_first} | {label[second]} | test loss | GiB |{' chosen |' if choice else ''}",
        f"|---|---:|---:|---:|---:|---:|---:|{'---|' if choice else ''}",
    ]
    for row in rows:
        runs = row["runs"]
        by = {name: [run["scores"][name] for run in runs] for name in scores}
        mean, low, high = interval(by[main_score], reference)
        against = "" if row is rows[0] else f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
        memory = statistics.median(run["peak_rss"] for run in runs) / 2**30
        chosen = " ".join(f"`{word}`" for word in row["words"][-1:]) if row["tried"] else ""
        values = [
            run["setting"].partition("=")[2] + (" (diverged)" if run["validation_loss"] is None else "")
            for run in row["tried"]
        ]
        tried = f" [{', '.join(values)}]" if values else ""
        share = f"{100 * runs[0]['trained'] / runs[0]['total']:.2f} %"
        lines.append(
            f"| {row['name']} | {share} | {spread(by[main_score])} | {against} "
            f"| {spread(by[second])} | {spread(by[loss], 2)} | {memory:.2f} |{f' {chosen}{tried} |' if choice else ''}"
        )
    return lines


def verdict(rows: Sequence[dict[str, Any]], score: str) -> list[str]:
    """Which rows these seeds cannot tell from the first, and which are worse: negative results have a sentence too."""
    reference = [run["scores"][score] for run in rows[0]["runs"]]
    found: dict[str, list[str]] = {"better": [], "worse": [], "no different as far as these seeds can tell": []}
    for row in rows[1:]:
        _, low, high = interval([run["scores"][score] for run in row["runs"]], reference)
        up = low > 0 if score != "loss" else high < 0
        down = high < 0 if score != "loss" else low > 0
        found[[*found][0 if up else 1 if down else 2]].append(row["name"])
    parts = [f"{word}: {'; '.join(names)}" for word, names in found.items() if names]
    what = "test loss" if score == "loss" else score.replace("_", " ")
    return textwrap.wrap(f"Against {rows[0]['name']}, by the 95 % interval of {what}: {'. '.join(parts)}.", 118)


def page(name: str, record: dict[str, Any]) -> str:
    """The page: a table a group, and how it came about."""
    plan = STUDIES[name]
    lines = [f"# {plan.title}", "", f"<!-- Written by scripts/study.py from {name}.json. -->", "", *plan.text]
    lines += [
        f"Mean ± standard deviation over seeds {', '.join(map(str, SEEDS))}; differences seed by seed with their 95 %",
    ]
    if any(row["tried"] for row in record["rows"]):
        lines += [
            "interval (Student's t). A setting in the last column had the lowest validation loss of those in brackets, "
            "on",
            f"seed {TUNING_SEED}, which is in no row. Where it is the first or last of them, the best may lie beyond.",
        ]
    else:
        lines += ["interval (Student's t)."]
    for group, words in plan.groups:
        rows = [row for row in record["rows"] if row["group"] == group]
        lines += [
            "",
            f"## {group[0].upper()}{group[1:]}",
            "",
            *table(rows, plan.scores),
            "",
            *verdict(rows, plan.scores[0]),
            "",
            *verdict(rows, plan.scores[2]),
        ]
        lines += ["", f"All of this table: `{shlex.join(words)}`."] if words else []
    lines += [
        "",
        "What a step takes in time, by what trains: [what freezing saves](../methods/freeze.md#what-it-saves).",
    ]
    lines += [*how(record), "", f"with the words in the record: [{name}.json]({name}.json)."]
    return "\n".join(lines) + "\n"


def of(words: Sequence[str], key: str) -> str:
    """The value of a key among words."""
    return next(word.partition("=")[2] for word in words if word.startswith(f"{key}="))


def how(record: dict[str, Any], *, memory: bool = True) -> list[str]:
    """The section that says where a page's figures come from. memory: the page has a column of GiB."""
    gib = "; GiB: peak memory of the process" if memory else ""
    dirty = ", with uncommitted changes" if record["dirty"] else ""
    where = f"on {machine_of(record)}, torch {record['packages']['torch']}, one thread a run"
    return [
        "",
        "## How",
        "",
        f"`{record['command']}`, commit {record['commit'][:10]}{dirty}, {where}{gib}. All runs:",
        "",
        f"`python -m ftlab.train {shlex.join(record['common'])}`",
    ]


def page_file(name: str) -> Path:
    """Where the page of a study stands."""
    return RESULTS / f"{name.replace('_', '-')}.md"


def sentence(name: str, row_name: str, folder: str) -> str:
    """What a study measured of one row, for that technique's page. folder: of the results, as the page names it."""
    file = RESULTS / f"{name}.json"
    if not file.is_file():
        return f"Not measured yet ({row_name}): there is no record of `scripts/study.py {name}`.\n"
    record, plan = json.loads(file.read_text("utf-8")), STUDIES[name]
    main_score, _, loss = plan.scores
    parts = []
    for group, _ in plan.groups:
        rows = [row for row in record["rows"] if row["group"] == group]
        row = next((row for row in rows if row["name"] == row_name), None)
        if row is None:  # it stands in another table
            continue
        own, first = ([[run["scores"][key] for run in r["runs"]] for key in (main_score, loss)] for r in (row, rows[0]))
        against = f" ({rows[0]['name']}: {spread(first[0])} and {spread(first[1], 2)})" if row is not rows[0] else ""
        words = f"{main_score.replace('_', ' ')} {spread(own[0])} %, test loss {spread(own[1], 2)}"
        parts.append(f"{group}: {words}{against}")
    text = (
        f"Measured ({row_name}), mean ± standard deviation of {len(SEEDS)} seeds. {'; '.join(parts)}. {plan.subject}: "
    )
    return wrapped(f"{text}[all rows]({folder}/{page_file(name).name}).")


def wrapped(text: str) -> str:
    """As a paragraph of a page."""
    return "\n".join(textwrap.wrap(text, 118, break_long_words=False, break_on_hyphens=False)) + "\n"


# (study, row, folder of the results as a page names it) -> what stands between the markers; None: as it is.
SentenceOf = Callable[[str, str, str], str | None]


def own_sentence(name: str, row: str, folder: str) -> str | None:
    """Of the studies of this script."""
    return sentence(name, row, folder) if name in STUDIES else None


def rewrite(text: str, folder: str, sentence_of: SentenceOf = own_sentence) -> str:
    """A page with the sentences between its markers made anew."""

    def anew(found: re.Match[str]) -> str:
        made = sentence_of(found["name"], found["row"], folder)
        return found[0] if made is None else f"{found[1]}{made}{found[4]}"

    return BLOCK.sub(anew, text)


def write_sentences(sentence_of: SentenceOf, check: bool) -> bool:
    """Rewrite all pages; with `check` only compare. Says whether they are current now."""
    current = True
    for target in sorted(DOCS.rglob("*.md")):
        old = target.read_text("utf-8")
        text = rewrite(old, os.path.relpath(RESULTS, target.parent), sentence_of)
        current &= not check or text == old
        if text != old and not check:
            atomic_write(target, text)
    return current


def write_page(target: Path, text: str, check: bool) -> bool:
    """Write a page; with `check` only compare. Says whether it is current now."""
    if not check:
        atomic_write(target, text)
        return True
    return target.is_file() and target.read_text("utf-8") == text


def write_pages(names: Sequence[str], check: bool) -> bool:
    """Write the pages of the records that exist; with `check` only compare. Says whether all are current."""
    current = write_sentences(own_sentence, check)
    for name in names:
        file = RESULTS / f"{name}.json"
        if not file.is_file():
            continue
        current &= write_page(page_file(name), page(name, json.loads(file.read_text("utf-8"))), check)
    return current


def main(argv: Sequence[str] | None = None) -> int:
    """Run studies, or write or check their pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(STUDIES)}")
    parser.add_argument("--run", action="store_true", help="run the named studies first")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--work", type=Path, help="folder that keeps the runs that ended (default: a temporary one)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is out of date")
    arguments = parser.parse_args(argv)
    for name in arguments.names:
        if name not in STUDIES:
            parser.error(f"{name}: no such study; there are {', '.join(STUDIES)}")
    if arguments.run and not arguments.names:
        parser.error("--run: name the studies to run")
    if arguments.run:
        with tempfile.TemporaryDirectory() as temporary:
            runs = Runs((arguments.work or Path(temporary)).resolve(), arguments.jobs)
            for name in arguments.names:
                atomic_write(RESULTS / f"{name}.json", json.dumps(study(name, runs), indent=1) + "\n")
    return 0 if write_pages(arguments.names or [*STUDIES], arguments.check) else 1


if __name__ == "__main__":
    raise SystemExit(main())
