#!/usr/bin/env python3
"""Three tasks one after the other, and what is left of the first: docs/results/continual.json and its page.

    python scripts/study_continual.py --run [--jobs 2]   run it, then write record and page
    python scripts/study_continual.py                    write the page of the record anew
    python scripts/study_continual.py --check            exit 1 if the page is not what the record gives

SmolLM2-135M-Instruct with LoRA in its upper half learns TASKS in order, each run starting from the adapter of the one
before it. After each run all tasks so far are asked, greedily, on their own test splits. Each of WAYS holds the model
to what it knew. Its strength is the one with the highest mean exact match on the validation splits of the first two
tasks, after the second, on a seed that is used for nothing else; where the best is at the edge of those tried, the
next one beyond is tried too.

This takes a night on two cores. What ended is kept in --work, under the commit, so the same command goes on where it
was stopped. When it stops, strengths and chains that ended go to docs/results too, from where another machine or
commit goes on. The page counts the seeds for which all ways have ended, if there are two or more.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import hashlib
import json
import math
import shlex
import statistics
import sys
import tempfile
import textwrap
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from study import climb, command, commit, how, interval, machine_of, of, spread, wrapped, write_page, write_sentences  # noqa: E402
from study_definitions import SEEDS, TUNING_SEED, UPPER_HALF  # noqa: E402

from ftlab.errors import DivergenceError  # noqa: E402
from ftlab.files import atomic_write  # noqa: E402

__all__ = ["TASKS", "WAYS", "main", "page"]

RECORD, PAGE = ROOT / "docs/results/continual.json", ROOT / "docs/results/continual.md"

COMMON = (
    *("model=smollm2_135m", "method=lora", "method.rank=16", "method.alpha=32", f"method.targets=['{UPPER_HALF}']"),
    *("data.template=chatml", "data.max_length=96", "data.packing=false", "data.share_prefix=true"),
    *("data.limit_validation=100", "data.limit_test=150", "optimizer.lr=2e-3", "schedule=cosine", "precision=bf16"),
    *("training.preflight=false", "parallel.threads=1", "evaluation.times=0", "evaluation.test=false"),
    *("evaluation.baseline=false", "evaluation.max_new_tokens=24", "checkpoint.load_best=false", "tracking=disabled"),
)
LEGAL = "Does the clause of a privacy policy answer the question? Answer True or False."
SPAM = "Is this mail spam or ham?"
TASKS = {
    "medical": (
        *("data=hpo_lay_to_clinical", "data.too_long=drop"),
        *("data.batch_size=16", "data.micro_batch_size=16", "training.max_steps=200"),
    ),
    "legal": (
        *("data=privacy_policy", f"data.instruction={LEGAL}", "data.too_long=drop"),
        *("data.batch_size=8", "data.micro_batch_size=8", "training.max_steps=200"),
    ),
    "spam": (
        *("data=spam_assassin", f"data.instruction={SPAM}", "data.too_long=truncate"),
        *("data.batch_size=8", "data.micro_batch_size=8", "training.max_steps=60"),
    ),
}


@dataclass(frozen=True)
class Way:
    """How the earlier tasks are protected: words with {sources} in them, and the strengths of which one is chosen."""

    words: tuple[str, ...]
    ladder: tuple[str, ...] = ()
    start: int = 0
    measured: bool = False  # whether ftlab.fisher is asked about each run


WAYS = {
    "nothing": Way(()),
    "EWC": Way(
        ("regularizer=ewc", "regularizer.ewc.source={sources}"),
        tuple(f"regularizer.ewc.strength={value}" for value in ("1", "10", "100", "1000", "10000", "100000")),
        1,
        True,
    ),
    "LwF": Way(
        ("regularizer=lwf",), tuple(f"regularizer.lwf.strength={value}" for value in ("0.1", "0.3", "1", "3", "10")), 1
    ),
    "replay": Way(
        ("regularizer=replay", "regularizer.replay.source={sources}"),
        tuple(f"regularizer.replay.share={value}" for value in ("0.05", "0.1", "0.2", "0.4", "0.6")),
        1,
    ),
}


class Chain:
    """The runs of one way, strength and seed, in a folder of their own; the first task's run serves all ways."""

    def __init__(self, work: Path, way: str, setting: str | None, seed: int) -> None:
        self.way, self.setting, self.seed = WAYS[way], setting, seed
        made_by = json.dumps([commit(), COMMON, TASKS, repr(WAYS)])
        self.shared = work / hashlib.sha256(made_by.encode()).hexdigest()[:16] / f"seed-{seed}"
        self.folder = self.shared / (way if setting is None else f"{way}-{setting.rpartition('=')[2]}")

    def run_dir(self, place: int) -> Path:
        """Of the run of a task."""
        return (self.folder if place else self.shared) / [*TASKS][place]

    def words(self, place: int) -> list[str]:
        """All words of the run of a task."""
        words = [*COMMON, *[*TASKS.values()][place], f"training.seed={self.seed}"]
        if place == 0:
            return words
        sources = ",".join(str(self.run_dir(earlier)) for earlier in range(place))
        words += [word.format(sources=f"[{sources}]") for word in self.way.words]
        words += [] if self.setting is None else [self.setting]
        return [*words, f"method.start_from={self.run_dir(place - 1)}/adapter"]

    def learn(self, place: int) -> dict[str, Any]:
        """Train on a task, unless that is done; run.json."""
        folder = self.run_dir(place)
        done = folder / "run.json"
        if not done.is_file() or json.loads(done.read_text("utf-8"))["status"] != "finished":
            if place:
                self.measure(place - 1)
            command("ftlab.train", [*self.words(place), f"run_dir={folder}"])
        record: dict[str, Any] = json.loads(done.read_text("utf-8"))
        return record

    def measure(self, place: int) -> None:
        """Write the Fisher information of a task's run, where the way needs it and it is not there."""
        folder = self.run_dir(place)
        if self.way.measured and not (folder / "fisher.safetensors").is_file():
            command("ftlab.fisher", [f"run={folder}", "examples=100"])

    def score(self, task: int, after: int, split: str) -> dict[str, float]:
        """Scores on a task's split of the model as it was after another one."""
        folder = self.folder if after else self.shared
        out = folder / f"{[*TASKS][task]}-after-{[*TASKS][after]}-{split}.json"
        if not out.is_file():
            out.parent.mkdir(parents=True, exist_ok=True)
            adapter = f"adapter={self.run_dir(after)}/adapter"
            command("ftlab.evaluate", [f"run={self.run_dir(task)}", adapter, f"split={split}", f"out={out}"])
        content = json.loads(out.read_text("utf-8"))
        scores = content["scores"]["after"]
        values = {name: scores[name]["value"] for name in ("exact_match", "loss")}
        return {**values, "examples": len(content["predictions"]["after"])}


class Record:
    """The record, written anew as each strength and each chain of runs ends.

    Meanwhile it lies in the work folder: a change to the one in docs/results would make the runs' tree dirty. What
    either of them has counts. Errors: SystemExit if one is of other words, or has another strength.
    """

    def __init__(self, work: Path, command: str) -> None:
        self.lock = threading.Lock()
        self.file = work / RECORD.name
        plan = {
            "common": list(COMMON),
            "tasks": {name: list(words) for name, words in TASKS.items()},
            "ways": {name: [*way.words, *way.ladder] for name, way in WAYS.items()},
        }
        rows: list[dict[str, Any]] = [{"name": way, "setting": None, "tried": {}, "runs": []} for way in WAYS]
        self.content: dict[str, Any] = {"format": 1, "command": command, **plan, "rows": rows}
        for file in (RECORD, self.file):
            if file.is_file():
                self.add(json.loads(file.read_text("utf-8")), plan, file)

    def add(self, other: dict[str, Any], plan: dict[str, Any], file: Path) -> None:
        """Take over what another record has more."""
        if {key: other[key] for key in plan} != plan:
            raise SystemExit(f"{file} is of other words than this script has; move it away to begin anew")
        for row, more in zip(self.content["rows"], other["rows"], strict=True):
            if row["setting"] not in (None, more["setting"]) and more["setting"] is not None:
                raise SystemExit(f"{file} has {more['setting']} where another record has {row['setting']}; keep one")
            if row["setting"] is None:  # what was tried belongs to the choice
                row["setting"], row["tried"] = more["setting"], row["tried"] | more["tried"]
            known = {*map(by_seed, row["runs"])}
            row["runs"] = sorted([*row["runs"], *(r for r in more["runs"] if by_seed(r) not in known)], key=by_seed)

    def row(self, way: str) -> dict[str, Any]:
        """What is known of a way."""
        return next(row for row in self.content["rows"] if row["name"] == way)

    def save(self) -> None:
        """Write it."""
        atomic_write(self.file, self.text())

    def text(self) -> str:
        """As it is written."""
        return json.dumps(self.content, indent=1) + "\n"


class Plan:
    """What is still to be run, and where it goes."""

    def __init__(self, work: Path, jobs: int, record: Record) -> None:
        self.work, self.record = work, record
        self.pool = concurrent.futures.ThreadPoolExecutor(jobs)
        # What belongs to the first task's run is shared, so no two chains may make it at once.
        self.firsts = {seed: threading.Lock() for seed in (TUNING_SEED, *SEEDS)}

    def first(self, seed: int) -> None:
        """Learn the first task."""
        self.chain("nothing", None, seed)

    def chain(self, way: str, setting: str | None, seed: int) -> Chain:
        """A chain whose first task is learnt."""
        chain = Chain(self.work, way, setting, seed)
        with self.firsts[seed]:
            chain.learn(0)
            chain.measure(0)
        return chain

    def validated(self, way: str, setting: str) -> float | None:
        """Mean validation exact match on the first two tasks after the second; None if the second diverged."""
        row = self.record.row(way)
        if setting not in row["tried"]:
            value = None
            chain = self.chain(way, setting, TUNING_SEED)
            with contextlib.suppress(DivergenceError):  # such a strength loses
                chain.learn(1)
                value = statistics.mean(chain.score(task, 1, "validation")["exact_match"] for task in (0, 1))
            print(f"{setting}: {'diverged' if value is None else f'{value:.1f}'}", flush=True)
            with self.record.lock:
                row["tried"][setting] = value
                self.record.save()
        found: float | None = row["tried"][setting]
        return found

    def choose(self, way: str) -> None:
        """Put a way's strength into the record."""
        ladder, row = WAYS[way].ladder, self.record.row(way)
        if row["setting"] is not None or not ladder:
            return

        def least(places: Sequence[int]) -> dict[int, float]:
            new = {place: self.pool.submit(self.validated, way, ladder[place]) for place in places}
            values = {place: future.result() for place, future in new.items()}
            return {place: math.inf if value is None else -value for place, value in values.items()}

        best, tried = climb(len(ladder), WAYS[way].start, least)
        with self.record.lock:
            row["tried"] = {ladder[place]: row["tried"][ladder[place]] for place in sorted(tried)}
            row["setting"] = ladder[best]
            self.record.save()

    def run_chain(self, way: str, seed: int) -> None:
        """Learn all tasks; exact match and loss on each after each."""
        row = self.record.row(way)
        chain = self.chain(way, row["setting"], seed)
        first, *others = TASKS
        with self.firsts[seed]:
            after = {first: {first: chain.score(0, 0, "test")}}
        for place, name in enumerate(others, 1):
            chain.learn(place)
            after[name] = {other: chain.score(task, place, "test") for task, other in enumerate([*TASKS][: place + 1])}
        records = [chain.learn(place) for place in range(len(TASKS))]
        sides = {key: records[-1][key] for key in ("commit", "device", "packages")}
        sides["dirty"] = any(record["dirty"] for record in records)
        peak = max(record["memory"]["peak_rss"] for record in records[1:])
        shown = {k: [round(s["exact_match"], 1) for s in v.values()] for k, v in after.items()}
        print(way, row["setting"], f"seed {seed}:", shown, flush=True)
        with self.record.lock:
            row["runs"] = sorted([*row["runs"], {"seed": seed, "after": after, "peak_rss": peak, **sides}], key=by_seed)
            self.record.save()


def by_seed(run: dict[str, Any]) -> int:
    """To sort by."""
    return int(run["seed"])


def study(work: Path, jobs: int) -> dict[str, Any]:
    """Choose strengths and run the seeds, as far as the record does not have them yet; the record."""
    work.mkdir(parents=True, exist_ok=True)
    record = Record(work, f"python scripts/study_continual.py --run --jobs {jobs}")
    before = record.text()
    plan = Plan(work, jobs, record)
    waiting = concurrent.futures.ThreadPoolExecutor(len(WAYS))
    try:
        together([waiting.submit(plan.choose, way) for way in WAYS])
        missing = {seed: [way for way in WAYS if seed not in map(by_seed, record.row(way)["runs"])] for seed in SEEDS}
        seeds = [seed for seed in SEEDS if missing[seed]]
        chains = []
        for place, seed in enumerate(seeds):
            # One seed ahead, so that no chain waits for a first task that another has just begun.
            chains += [plan.pool.submit(plan.first, other) for other in seeds[place : place + 2]]
            chains += [plan.pool.submit(plan.run_chain, way, seed) for way in missing[seed]]
        together(chains)
    finally:
        plan.pool.shutdown(cancel_futures=True)  # what has begun ends, and who waits for the rest is told
        waiting.shutdown()
        if record.text() != before:
            atomic_write(RECORD, record.text())
    return record.content


def together(futures: Sequence[concurrent.futures.Future[None]]) -> None:
    """Wait for all of them. Errors: that of the first that fails, at once."""
    ended, _ = concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_EXCEPTION)
    for future in ended:
        future.result()


# --- the page --------------------------------------------------------------------------------------------------------


def at_end(run: dict[str, Any]) -> dict[str, float]:
    """Exact match on each task after the last."""
    return {task: scores["exact_match"] for task, scores in run["after"][[*TASKS][-1]].items()}


def table(record: dict[str, Any]) -> list[str]:
    """A row a way: what is left of each task at the end, and their mean against doing nothing."""
    tasks = [*TASKS]
    lines = [
        "| | " + " | ".join(f"{task}, at the end" for task in tasks) + " | mean of the three | against nothing "
        "| medical lost | legal lost | GiB | chosen |",
        "|---|" + "---:|" * (len(tasks) + 5) + "---|",
    ]
    reference = [statistics.mean(at_end(run).values()) for run in record["rows"][0]["runs"]]
    for row in record["rows"]:
        runs = row["runs"]
        ends = [at_end(run) for run in runs]
        means = [statistics.mean(end.values()) for end in ends]
        lost = [[run["after"][task][task]["exact_match"] - at_end(run)[task] for run in runs] for task in tasks[:-1]]
        mean, low, high = interval(means, reference)
        against = f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]" if row["tried"] else ""
        values = ", ".join(
            setting.rpartition("=")[2] + (" (diverged)" if value is None else "")
            for setting, value in row["tried"].items()
        )
        cells = [spread([end[task] for end in ends]) for task in tasks]
        cells += [spread(means), against, *map(spread, lost)]
        cells += [f"{statistics.median(run['peak_rss'] for run in runs) / 2**30:.2f}"]
        cells += [f"`{row['setting']}` [{values}]" if row["tried"] else ""]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return lines


def whole(record: dict[str, Any]) -> dict[str, Any] | None:
    """The record of the seeds for which all ways have ended; None with fewer than two."""
    seeds = set.intersection(*({run["seed"] for run in row["runs"]} for row in record["rows"]))
    if len(seeds) < 2:
        return None
    rows = [row | {"runs": [run for run in row["runs"] if run["seed"] in seeds]} for row in record["rows"]]
    return record | {"rows": rows}


def page(record: dict[str, Any]) -> str:
    """The page: the table, and how it came about."""
    first = record["rows"][0]["runs"]
    learnt = spread([run["after"]["medical"]["medical"]["exact_match"] for run in first])
    seeds = ", ".join(str(run["seed"]) for run in first)
    dirty = any(run["dirty"] for row in record["rows"] for run in row["runs"])
    missing = ", ".join(str(seed) for seed in SEEDS if seed not in map(by_seed, first))
    keys = ("training.max_steps", "data.batch_size")
    steps, sizes = (", ".join(of(words, key) for words in record["tasks"].values()) for key in keys)
    last = first[0]["after"][[*TASKS][-1]]
    counts = ", ".join(f"{last[task]['examples']}" for task in TASKS)
    longest = of(record["common"], "data.max_length")
    lines = [
        "# Medical, then legal, then spam",
        "",
        "<!-- Written by scripts/study_continual.py from continual.json. -->",
        "",
        *textwrap.wrap(
            "SmolLM2-135M-Instruct with LoRA of rank 16 in the upper 15 of its 30 layers learns three tasks, one after "
            "the other: the clinical term of a layperson's phrase (HPO), whether a clause of a privacy policy answers "
            "a question (True or False; half are right by chance), and whether a mail is spam. A conversation has at "
            f"most {longest} tokens: longer clauses are left out, mails lose their end. The tasks take {steps} steps "
            f"of {sizes} examples. Each run starts from the adapter of the one before. Exact match of greedy answers "
            "to held-out examples "
            f"({counts} of the three), in percent, mean ± standard deviation over seeds "
            f"{seeds}{f' (of seeds {missing} not all is run yet)' if missing else ''}. After the first task alone "
            f"medical is at {learnt}, for all rows. Lost: how much lower a task is at the end than right after it was "
            "learnt. Differences are taken seed by seed, with their 95 % interval (Student's t).",
            118,
        ),
        "",
        *table(record),
        "",
        *textwrap.wrap(
            "A strength had the highest mean exact match on the validation splits of the first two tasks, after the "
            f"second, of those in brackets, on seed {TUNING_SEED}, which is in no row. EWC's Fisher information is of "
            "100 examples, labels drawn from the model. With replay a share of the examples is old, so fewer are new. "
            + " ".join(record.get("notes", ())),
            118,
        ),
        *how({**first[0], "dirty": dirty, "command": record["command"], "common": record["common"]}),
        "",
    ]
    made = {(run["commit"][:10], machine_of(run)) for row in record["rows"] for run in row["runs"]}
    if len(made) > 1:
        lines += [f"Commits and machines of the runs: {'; '.join(' on '.join(pair) for pair in sorted(made))}.", ""]
    lines += [f"- {name}: `{shlex.join(words)}`" for name, words in record["tasks"].items()]
    return "\n".join([*lines, "", "Record: [continual.json](continual.json)."]) + "\n"


def sentence(name: str, row_name: str, folder: str) -> str | None:
    """What was measured of one way, for its page; None for another study's."""
    if name != "continual":
        return None
    record = whole(json.loads(RECORD.read_text("utf-8"))) if RECORD.is_file() else None
    if record is None:
        return f"Not measured yet ({row_name}): there is no record of `scripts/study_continual.py`.\n"
    rows = [next(row for row in record["rows"] if row["name"] == wanted) for wanted in (row_name, "nothing")]
    own, nothing = ([at_end(run) for run in row["runs"]] for row in rows)
    parts = [
        f"{task} {spread([end[task] for end in own])} (nothing: {spread([end[task] for end in nothing])})"
        for task in TASKS
    ]
    setting = (rows[0]["setting"] or row_name).removeprefix("regularizer.")
    return wrapped(
        f"Measured ({setting}), mean ± standard deviation of {len(own)} seeds, exact match in percent "
        f"after the last of three tasks: {', '.join(parts)}. SmolLM2 with LoRA: [all ways]({folder}/{PAGE.name})."
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
            study((arguments.work or Path(temporary)).resolve(), arguments.jobs)
    current = write_sentences(sentence, arguments.check)
    record = whole(json.loads(RECORD.read_text("utf-8"))) if RECORD.is_file() else None
    if record is not None:
        current &= write_page(PAGE, page(record), arguments.check)
    return 0 if current else 1


if __name__ == "__main__":
    raise SystemExit(main())
