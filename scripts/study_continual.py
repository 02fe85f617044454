#!/usr/bin/env python3
"""Three tasks one after the other, and what is left of the first: docs/results/continual.json and its page.

    python scripts/study_continual.py --run [--jobs 2]   run it, then write record and page
    python scripts/study_continual.py                    write the page of the record anew
    python scripts/study_continual.py --check            exit 1 if the page is not what the record gives

SmolLM2-135M-Instruct with LoRA learns TASKS in order, each run starting from the adapter of the one before it. After
each run all tasks so far are asked, greedily, on their own test splits. Each of WAYS holds the model to what it knew.
Its strength is the one with the highest mean exact match on the validation splits of the first two tasks, after the
second, on a seed that is used for nothing else; where the best is at the edge of those tried, the next one beyond is
tried too. What ended is kept in --work, so the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from study import commit, how, interval, spread  # noqa: E402
from study_definitions import SEEDS, TUNING_SEED  # noqa: E402

from ftlab.files import atomic_write  # noqa: E402

__all__ = ["TASKS", "WAYS", "main", "page"]

RECORD, PAGE = ROOT / "docs/results/continual.json", ROOT / "docs/results/continual.md"

COMMON = (
    *("model=smollm2_135m", "method=lora", "method.rank=16", "method.alpha=32", "data.template=chatml"),
    *("data.max_length=160", "data.row_length=512", "data.packing=true", "data.pad_rows=true", "data.batch_size=1"),
    *("data.micro_batch_size=1", "data.limit_validation=100", "data.limit_test=200", "optimizer.lr=1e-3"),
    *("schedule=cosine", "precision=bf16", "training.max_steps=40", "training.preflight=false", "parallel.threads=1"),
    *("evaluation.times=1", "evaluation.baseline=false", "evaluation.max_new_tokens=24", "checkpoint.metric=loss"),
    "tracking=disabled",
)
LEGAL = "Does the clause of a privacy policy answer the question? Answer True or False."
SPAM = "Is this mail spam or ham?"
TASKS = {
    "medical": ("data=hpo_lay_to_clinical", "data.too_long=drop"),
    "legal": ("data=privacy_policy", f"data.instruction={LEGAL}", "data.too_long=truncate"),
    "spam": ("data=spam_assassin", f"data.instruction={SPAM}", "data.too_long=truncate"),
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
    """The runs of one way, strength and seed, in a folder of their own. The first task's run is shared by all ways."""

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
            command("ftlab.train", [*self.words(place), f"run_dir={folder}"])
        if self.way.measured and place < len(TASKS) - 1 and not (folder / "fisher.safetensors").is_file():
            command("ftlab.fisher", [f"run={folder}", "examples=100"])
        record: dict[str, Any] = json.loads(done.read_text("utf-8"))
        return record

    def score(self, task: int, after: int, split: str) -> dict[str, float]:
        """Scores on a task's split of the model as it was after another one."""
        out = self.folder / f"{[*TASKS][task]}-after-{[*TASKS][after]}-{split}.json"
        if not out.is_file():
            out.parent.mkdir(parents=True, exist_ok=True)
            adapter = f"adapter={self.run_dir(after)}/adapter"
            command("ftlab.evaluate", [f"run={self.run_dir(task)}", adapter, f"split={split}", f"out={out}"])
        scores = json.loads(out.read_text("utf-8"))["scores"]["after"]
        return {name: scores[name]["value"] for name in ("exact_match", "loss")}


def command(module: str, words: Sequence[str]) -> None:
    """A command of ftlab in a process of its own."""
    full = [sys.executable, "-m", module, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(full, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    if done.returncode != 0:
        raise SystemExit(f"{shlex.join(full)}\n{done.stderr}")


def validated(work: Path, way: str, setting: str) -> float:
    """Mean validation exact match on the first two tasks after the second."""
    chain = Chain(work, way, setting, TUNING_SEED)
    chain.learn(0)
    chain.learn(1)
    return statistics.mean(chain.score(task, 1, "validation")["exact_match"] for task in (0, 1))


def choose(work: Path, way: str, pool: concurrent.futures.Executor) -> tuple[str | None, dict[str, float]]:
    """The strength of a way, and what was tried."""
    ladder = WAYS[way].ladder
    if not ladder:
        return None, {}
    low, high = WAYS[way].start, WAYS[way].start + 3
    tried: dict[int, float] = {}
    while True:
        new = {p: pool.submit(validated, work, way, ladder[p]) for p in range(low, high) if p not in tried}
        tried |= {place: future.result() for place, future in new.items()}
        best = max(tried, key=lambda place: tried[place])
        if best == low and low > 0:
            low -= 1
        elif best == high - 1 and high < len(ladder):
            high += 1
        else:
            return ladder[best], {ladder[place]: tried[place] for place in sorted(tried)}


def run_chain(work: Path, way: str, setting: str | None, seed: int) -> dict[str, Any]:
    """Learn all tasks; exact match on each after each."""
    chain = Chain(work, way, setting, seed)
    after = {}
    for place, name in enumerate(TASKS):
        chain.learn(place)
        after[name] = {other: chain.score(task, place, "test") for task, other in enumerate([*TASKS][: place + 1])}
    peak = max(chain.learn(place)["memory"]["peak_rss"] for place in (1, 2))
    print(
        way, setting, seed, {k: [round(s["exact_match"], 1) for s in v.values()] for k, v in after.items()}, flush=True
    )
    return {"seed": seed, "after": after, "peak_rss": peak}


def study(work: Path, jobs: int) -> dict[str, Any]:
    """Choose strengths, run the seeds, and make the record."""
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        # The first task first: its run is shared, so no two chains may make it at once.
        firsts = [pool.submit(Chain(work, "EWC", None, seed).learn, 0) for seed in (TUNING_SEED, *SEEDS)]
        first, *_ = [future.result() for future in firsts]
        rows = []
        for way in WAYS:
            setting, tried = choose(work, way, pool)
            print(f"{way}: {setting} {tried}", flush=True)
            futures = [pool.submit(run_chain, work, way, setting, seed) for seed in SEEDS]
            rows.append((way, setting, tried, futures))
        made = [
            {"name": way, "setting": setting, "tried": tried, "runs": [future.result() for future in futures]}
            for way, setting, tried, futures in rows
        ]
    keys = ("commit", "dirty", "device", "packages", "model")
    return {
        "format": 1,
        "command": f"python scripts/study_continual.py --run --jobs {jobs}",
        **{key: first[key] for key in keys},
        "common": list(COMMON),
        "tasks": {name: list(words) for name, words in TASKS.items()},
        "rows": made,
    }


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
        values = ", ".join(setting.rpartition("=")[2] for setting in row["tried"])
        cells = [spread([end[task] for end in ends]) for task in tasks]
        cells += [spread(means), against, *map(spread, lost)]
        cells += [f"{statistics.median(run['peak_rss'] for run in runs) / 2**30:.2f}"]
        cells += [f"`{row['setting']}` [{values}]" if row["tried"] else ""]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return lines


def page(record: dict[str, Any]) -> str:
    """The page: the table, and how it came about."""
    first = record["rows"][0]["runs"]
    learnt = spread([run["after"]["medical"]["medical"]["exact_match"] for run in first])
    lines = [
        "# Medical, then legal, then spam",
        "",
        "<!-- Written by scripts/study_continual.py from continual.json. -->",
        "",
        *textwrap.wrap(
            "SmolLM2-135M-Instruct with LoRA of rank 16 learns three tasks, one after the other, 40 steps of 512 "
            "tokens each: the clinical term of a layperson's phrase (HPO), whether a clause of a privacy policy "
            "answers a question (True or False), and whether a mail is spam. Each run starts from the adapter of the "
            "one before. Exact match of greedy answers to held-out examples of each task, in percent, mean ± standard "
            f"deviation over seeds {', '.join(map(str, SEEDS))}. After the first task alone medical is at {learnt}, "
            "for all rows. Lost: how much lower a task is at the end than right after it was learnt. Differences are "
            "taken seed by seed, with their 95 % interval (Student's t).",
            118,
        ),
        "",
        *table(record),
        "",
        *textwrap.wrap(
            "A strength had the highest mean exact match on the validation splits of the first two tasks, after the "
            f"second, of those in brackets, on seed {TUNING_SEED}, which is in no row. EWC's Fisher information is of "
            "100 examples, labels drawn from the model. With replay a part of the 40 steps goes to old examples.",
            118,
        ),
        *how(record),
        "",
    ]
    lines += [f"- {name}: `{shlex.join(words)}`" for name, words in record["tasks"].items()]
    return "\n".join([*lines, "", "Record: [continual.json](continual.json)."]) + "\n"


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
            record = study((arguments.work or Path(temporary)).resolve(), arguments.jobs)
        atomic_write(RECORD, json.dumps(record, indent=1) + "\n")
    if not RECORD.is_file():
        return 0
    text = page(json.loads(RECORD.read_text("utf-8")))
    if arguments.check:
        return 0 if PAGE.is_file() and PAGE.read_text("utf-8") == text else 1
    atomic_write(PAGE, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
