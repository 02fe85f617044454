#!/usr/bin/env python3
"""The tables of results in README.md and pages of docs/ (PAGES), and the measured lines that experiments begin with.

All of them are generated from docs/results/*.json.

    python scripts/readme_results.py                           write the pages' blocks anew
    python scripts/readme_results.py --check                   exit 1 if a block is not what the records give
    python scripts/readme_results.py --record lora_medical RUN...
        first make docs/results/lora_medical.json of finished run folders that differ in their seed alone

A block stands between `<!-- results:NAME -->` and `<!-- /results -->`; the block `experiments` has a row for each
experiment under conf/, whose record has its name. A record holds "command", "commit", "device" and
"runs": what run.json says of each run, without its folders. Several runs of one commit and configuration are what a
spread can be stated for, so `--record` refuses others, and runs of a tree with uncommitted changes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shlex
import statistics
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGES = tuple(
    ROOT / page for page in ("README.md", "docs/performance.md", "docs/experiments.md", "docs/methods/freeze.md")
)
MEASURED = "Measured"
EXPERIMENTS = ROOT / "conf" / "experiment"
sys.path.insert(0, str(ROOT))

from ftlab.files import atomic_write  # noqa: E402

__all__ = ["block", "main", "make_record", "rewrite", "table", "without_bf16"]

BLOCK = re.compile(r"(<!-- results:(?P<name>\w+) -->\n)(?P<body>.*?)(<!-- /results -->)", re.DOTALL)
METRICS = {  # the first that a run has is the one that is quoted alone
    "exact_match": ("exact match, %", 1),
    "accuracy": ("accuracy, %", 1),
    "macro_f1": ("macro F1, %", 1),
    "token_f1": ("token F1, %", 1),
    "bleu": ("BLEU", 1),
    "chrf": ("chrF", 1),
    "rougeL": ("ROUGE-L", 1),
    "perplexity": ("perplexity", 2),
}
KEPT = (
    *("status", "command", "started", "finished", "packages", "device", "seeds", "config_hash", "model", "data"),
    *("parameters", "memory", "timings", "throughput", "preflight", "steps", "skipped_steps", "best", "scores"),
    *("data_digest", "resumed_from", "warnings"),
)


def scores_of(runs: Sequence[dict[str, Any]], who: str, metric: str) -> list[float]:
    """A metric's value in each run that has it."""
    found = [run["scores"].get(who, {}).get(metric) for run in runs]
    return [float(score["value"]) for score in found if score is not None]


def minutes(run: dict[str, Any]) -> float:
    """From the start of the process's work to its report."""
    start, end = (datetime.datetime.fromisoformat(run[key]) for key in ("started", "finished"))
    return (end - start).total_seconds() / 60


def peak_gib(run: dict[str, Any]) -> float:
    """The most memory: of the GPU if there was one, else the process's resident set."""
    memory = run["memory"]
    return float(memory.get("peak_device") or memory["peak_rss"]) / 2**30


def spread(values: Sequence[float], digits: int) -> list[str]:
    """Mean, standard deviation and range as three cells; a single value has no spread."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) < 2:
        return [mean, "", ""]
    return [mean, f"{statistics.stdev(values):.{digits}f}", f"{min(values):.{digits}f} to {max(values):.{digits}f}"]


def machine(device: Any) -> str:
    """The machine in words."""
    if not isinstance(device, dict):
        return str(device)
    ranks = f", {device['world_size']} processes" if device.get("world_size", 1) > 1 else ""
    if device.get("kind") == "cuda":
        return f"{device['name']}{ranks}"
    threads = f"{device['threads']} thread{'s' if device['threads'] > 1 else ''}"
    return f"{device['name']}{without_bf16(device)}, {threads}, {device['memory_bytes'] / 2**30:.0f} GiB{ranks}"


def without_bf16(device: dict[str, Any]) -> str:
    """That precision=bf16 is carried out in fp32 there. What noted nothing yet computed in bf16."""
    return "" if device.get("bf16", True) else " without bf16"


def table(record: dict[str, Any]) -> str:
    """A record as Markdown: scores before and after, minutes, memory, and where they come from."""
    runs = record["runs"]
    seeds = ", ".join(str(run["seeds"]["training"]) for run in runs)
    count = len(runs)
    lines = [
        f"| | before | after, mean of {count} seed{'s' if count > 1 else ''} | sd | lowest to highest |",
        "|---|---:|---:|---:|---:|",
    ]
    for metric, (label, digits) in METRICS.items():
        after = scores_of(runs, "final", metric)
        if not after:
            continue
        before = scores_of(runs, "base", metric)
        first = f"{statistics.fmean(before):.{digits}f}" if before else ""
        lines.append(f"| {label} | {' | '.join([first, *spread(after, digits)])} |")
    lines.append(f"| minutes | | {' | '.join(spread([minutes(run) for run in runs], 1))} |")
    lines.append(f"| peak memory, GiB | | {' | '.join(spread([peak_gib(run) for run in runs], 2))} |")
    lines += ["", sentence(record, seeds)]
    return "\n".join(lines) + "\n"


def sentence(record: dict[str, Any], seeds: str) -> str:
    """What the table's numbers were measured on, with the interval of each run's exact match."""
    runs = record["runs"]
    command = f"`{record['command']}`" if len(runs) == 1 else f"`{record['command']}`, training.seed={seeds}"
    parts = [f"{runs[0]['data']['test']} held-out examples. {command}", f"commit {record['commit'][:10]}"]
    text = f"{', '.join(parts)}, on {machine(record['device'])}."
    exact = [(run["seeds"]["training"], run["scores"]["final"].get("exact_match")) for run in runs]
    intervals = [
        f"{score['value']:.1f} ({score['low']:.1f} to {score['high']:.1f}) with seed {seed}"
        for seed, score in exact
        if score is not None and score.get("low") is not None
    ]
    return f"{text} Exact match with its 95 % interval: {', '.join(intervals)}." if intervals else text


def block(name: str, results: Path, folder: str = "docs/results") -> str:
    """What belongs between the marks of a block. folder: that of the records, as the page names it in links."""
    if name == "experiments":
        return f"\n{experiments_table(results, folder)}\n"
    path = results / f"{name}.json"
    if not path.exists():
        return f"Not measured yet: there is no record `docs/results/{name}.json`.\n"
    record = json.loads(path.read_text("utf-8"))
    made = TABLES.get(record["name"], table)(record)
    return f"\n{made}\nRecord: [{name}.json]({folder}/{name}.json)\n\n"


# --- experiments -----------------------------------------------------------------------------------------------------


class Headline(NamedTuple):
    """The one metric that is quoted of a record: how METRICS calls it, before, after, and how the latter spreads."""

    label: str  # its name, and behind a comma its unit if it has one
    before: str
    after: str
    sd: str
    between: str


def headline(record: dict[str, Any]) -> Headline:
    """What is quoted of a record. Errors: ValueError if its runs have no metric of METRICS."""
    runs = record["runs"]
    metric = next((name for name in METRICS if scores_of(runs, "final", name)), None)
    if metric is None:
        raise ValueError(f"the runs of {record['name']} have none of {', '.join(METRICS)}")
    label, digits = METRICS[metric]
    before = scores_of(runs, "base", metric)
    first = f"{statistics.fmean(before):.{digits}f}" if before else ""
    after, sd, between = spread(scores_of(runs, "final", metric), digits)
    return Headline(label, first, after, sd, between)


def measured(record: dict[str, Any], name: str) -> list[str]:
    """The comment lines of an experiment that say what came of it."""
    runs = record["runs"]
    found, time = headline(record), spread([minutes(run) for run in runs], 1)
    name_of_score, _, unit = found.label.partition(",")
    first = f"{found.before}{unit} before, " if found.before else ""
    seeds = [str(run["seeds"]["training"]) for run in runs]
    parts = [
        f"{MEASURED} with seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)} at commit {record['commit'][:10]} on",
        f"{machine(record['device'])}:",
        f"{name_of_score} on {runs[0]['data']['test']} held-out examples {first}{found.after}{unit} after"
        + (f" (sd {found.sd}, {found.between});" if found.sd else ";"),
        f"{time[0]} minutes{f' ({time[2]})' if time[2] else ''}, {max(map(peak_gib, runs)):.1f} GiB at the peak.",
        f"Record: docs/results/{name}.json.",
    ]
    text = " ".join(parts)
    return textwrap.wrap(text, 118, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


def with_header(text: str, lines: Sequence[str]) -> str:
    """An experiment's file with these lines before its defaults, in place of the ones that said so before.

    Errors: ValueError for a file without a list of defaults.
    """
    comment, mark, settings = text.partition("\ndefaults:")
    if not mark:
        raise ValueError("it has no defaults")
    said = re.sub(rf"\n# {MEASURED} with .*?docs/results/\w+\.json\.(?=\n|$)", "", comment, flags=re.DOTALL)
    return "\n".join([said, *lines]) + mark + settings


def experiments_table(results: Path, folder: str) -> str:
    """A row for each experiment: what it is, and what came of it."""
    lines = [
        "| experiment | | score | before | after | minutes | GiB | seeds |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for file in sorted(EXPERIMENTS.glob("*.yaml")):
        about = next(line for line in file.read_text("utf-8").splitlines() if not line.startswith("# @package"))
        row = f"| `{file.stem}` | {about.removeprefix('# ').rstrip('.')} |"
        path = results / f"{file.stem}.json"
        if not path.exists():
            lines.append(f"{row} not measured yet | | | | | |")
            continue
        record = json.loads(path.read_text("utf-8"))
        found = headline(record)
        cells = [f"[{found.label}]({folder}/{path.name})", found.before]
        cells += [f"{found.after} ± {found.sd}" if found.sd else found.after]
        cells += [spread([minutes(run) for run in record["runs"]], 1)[0]]
        cells += [f"{max(map(peak_gib, record['runs'])):.1f}", str(len(record["runs"]))]
        lines.append(f"{row} {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# --- benchmarks ------------------------------------------------------------------------------------------------------


def cpu_table(record: dict[str, Any]) -> str:
    """A record of scripts/bench_cpu.py as Markdown: how many times as fast as plain torch, in one process."""
    lines = ["| | x plain torch | lowest to highest |", "|---|---:|---:|"]
    groups = [*record["operations"].items(), ("a training step", record["steps"])]
    for name, rows in groups:
        for who, row in rows.items():
            if who != "torch":
                label = name if len(rows) == 2 else f"{name}, {who}"
                lines.append(f"| {label} | {row['ratio']:.2f} | {row['ratio_low']:.2f} to {row['ratio_high']:.2f} |")
    return "\n".join([*lines, "", source(record)]) + "\n"


def source(record: dict[str, Any]) -> str:
    """Where a benchmark's figures come from."""
    return f"`{record['command']}`, commit {str(record['commit'])[:10]}, on {machine(record['device'])}."


def peers_table(record: dict[str, Any]) -> str:
    """A record of scripts/bench_peers.py as Markdown: ratios to the best Hugging Face setting, measured in one run."""
    rounds = 1 + max(run["repeat"] for run in record["runs"])
    spread = " lowest to highest |" if rounds > 1 else ""  # a single run has none
    lines = [
        f"| | real tokens/s, x the fastest |{spread} peak memory, x the lowest | held-out loss |",
        f"|---|---:|{'---:|' if spread else ''}---:|---:|",
    ]
    for name, row in record["summary"].items():
        fastest = row["tokens_per_second"] / row["speed_ratio"]
        ratios = [run["tokens_per_second"] / fastest for run in record["runs"] if run["contestant"] == name]
        between = f"{min(ratios):.2f} to {max(ratios):.2f} | " if spread else ""
        cells = f"{row['speed_ratio']:.2f} | {between}{row['memory_ratio']:.2f} | {row['held_out_loss']:.3f}"
        lines.append(f"| {name} | {cells} |")
    guests = "".join(f", {name} {packages[name]}" for name, packages in record.get("guest_packages", {}).items())
    where = f"on {machine(record['device'])}{guests}; {rounds} round{'s' if rounds > 1 else ''}"
    lines += ["", f"`{record['command']}`, commit {record['commit'][:10]}, {where}."]
    return "\n".join(lines) + "\n"


def frozen_table(record: dict[str, Any]) -> str:
    """A record of scripts/bench_frozen.py as Markdown: time and memory of a step over those of full fine-tuning."""
    lines = []
    for model, rows in record["summary"].items():
        lines += [
            f"| {model} | trains | time of a step | lowest to highest | memory of a step | activations | peak memory |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for name, row in rows.items():
            between = f"{row['time_low']:.2f} to {row['time_high']:.2f}"
            cells = f"{100 * row['trained']:.2f} % | {row['time']:.2f} | {between} | {row['step_memory']:.3f}"
            lines.append(f"| {name} | {cells} | {row['activations']:.3f} | {row['peak']:.2f} |")
        lines.append("")
    rounds = 1 + max(run["repeat"] for run in record["runs"])
    lines += [
        "Relative to full in the same round, medians; memory of a step: gradients, optimizer state and activations. "
        f"{source(record)[:-1]}; {rounds} rounds.",
    ]
    return "\n".join(lines) + "\n"


TABLES = {"bench_frozen": frozen_table, "bench_peers": peers_table, "bench_cpu": cpu_table}


def rewrite(text: str, results: Path, folder: str = "docs/results") -> str:
    """The page with every block made anew. Raises ValueError if it has none."""
    changed, count = BLOCK.subn(lambda found: found[1] + block(found["name"], results, folder) + found[4], text)
    if count == 0:
        raise ValueError("the page has no block <!-- results:NAME --> ... <!-- /results -->")
    return changed


def without_folders(command: str) -> str:
    """The command without where its output went and without the seed, which a record's runs do not share."""
    words = [w for w in shlex.split(command) if not w.startswith(("output_dir=", "run_dir=", "training.seed="))]
    return shlex.join(words)


def make_record(runs: Sequence[Path]) -> dict[str, Any]:
    """One record of finished runs. Raises ValueError if they are not repetitions of one thing."""
    contents = [json.loads((run / "run.json").read_text("utf-8")) for run in runs]
    for run, content in zip(runs, contents, strict=True):
        if content["status"] != "finished" or content.get("dirty"):
            state = "made with uncommitted changes" if content.get("dirty") else content["status"]
            raise ValueError(f"{run} is {state}; a record holds finished runs of a commit")
    for what, values in {
        "commit": {str(content["commit"]) for content in contents},
        "configuration": {json.dumps(settings(content), sort_keys=True) for content in contents},
    }.items():
        if len(values) > 1:
            raise ValueError(f"the runs have more than one {what}; a record holds repetitions that differ in the seed")
    contents.sort(key=lambda content: int(content["seeds"]["training"]))
    kept = [{key: content[key] for key in KEPT if key in content} for content in contents]
    for run in kept:
        run["command"] = without_folders(run["command"])
    first = contents[0]
    return {
        "format": 1,
        "name": first["name"],
        "command": without_folders(first["command"]),
        "commit": first["commit"],
        "device": first["device"],
        "runs": kept,
    }


def settings(content: dict[str, Any]) -> dict[str, Any]:
    """A run's configuration without its folders and its seed."""
    config = dict(content["config"])
    for key in ("output_dir", "run_dir", "resume", "tracking"):
        config.pop(key, None)
    config["training"] = {key: value for key, value in config["training"].items() if key != "seed"}
    return config


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The tables of results in the pages, from docs/results/*.json.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is not up to date")
    parser.add_argument("--record", metavar="NAME", help="first write docs/results/NAME.json of the given run folders")
    parser.add_argument("--readme", type=Path, help="this page alone (default: all that have tables)")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results", help="another folder of records")
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders for --record")
    options = parser.parse_args(argv)
    if (options.record is None) != (not options.runs):
        parser.error("--record NAME and run folders go together")
    try:
        if options.record is not None:
            content = json.dumps(make_record(options.runs), indent=1, ensure_ascii=False) + "\n"
            atomic_write(options.results / f"{options.record}.json", content)
        stale = [page for page in ([options.readme] if options.readme else PAGES) if update(page, options)]
        files = [] if options.readme else sorted(EXPERIMENTS.glob("*.yaml"))
        stale += [file for file in files if update_header(file, options)]
    except (ValueError, OSError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for page in stale if options.check else []:
        print(f"error: {page} is not what the records give; run {Path(__file__).name}", file=sys.stderr)
    return int(options.check and bool(stale))


def update(page: Path, options: argparse.Namespace) -> bool:
    """Whether a page is not what the records give; without --check it is written anew."""
    folder = {"docs": "results", "methods": "../results"}.get(page.parent.name, "docs/results")
    text = page.read_text("utf-8")
    changed = rewrite(text, options.results, folder)
    if changed != text and not options.check:
        atomic_write(page, changed)
    return changed != text


def update_header(file: Path, options: argparse.Namespace) -> bool:
    """The same of the measured lines of an experiment."""
    path = options.results / f"{file.stem}.json"
    lines = measured(json.loads(path.read_text("utf-8")), file.stem) if path.exists() else []
    text = file.read_text("utf-8")
    try:
        changed = with_header(text, lines)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    if changed != text and not options.check:
        atomic_write(file, changed)
    return changed != text


if __name__ == "__main__":
    raise SystemExit(main())
