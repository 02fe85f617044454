#!/usr/bin/env python3
"""How long a start takes: to the end of the first training step, and to the first token of an answer.

    python scripts/bench_startup.py --repeats 5 --wait-idle 300 --out docs/results/startup.json
    python scripts/bench_startup.py --tiny              two random layers, no download; its numbers mean nothing

Both commands are run as a user types them, with everything in the cache, each in a new process and from its very start:

- `train`: `python -m ftlab.train +experiment=lora_medical evaluation.baseline=false`, until the line of step 1 stands
  in metrics.jsonl (the time is the line's own). The run is then stopped.
- `generate`: `python -m ftlab.generate run=... max_new_tokens=1 "..."` on a run of one step, until the answer's first
  byte is on standard output.

One run of each comes first and is not counted: it fetches, compiles the CPU kernels and Python's bytecode, and brings
the files into memory. PYTHONDONTWRITEBYTECODE is taken out of the environment, since it forbids that bytecode.

docs/results/README.md explains the record that --out writes.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ftlab.files import atomic_write  # noqa: E402
from scripts.bench_peers import beginning, now, wait_idle  # noqa: E402

__all__ = ["COMMANDS", "LIMITS", "BenchError", "commands", "main", "parse", "summarize", "table"]

COMMANDS = ("train", "generate")
LIMITS = {"train": 8.0, "generate": 4.0}  # seconds that either may take on two cores
DEADLINE_SECONDS = 600.0  # for a run that never gets there
POLL_SECONDS = 0.02
EXPERIMENTS = {False: "lora_medical", True: "full_tiny"}


class BenchError(Exception):
    """A failure that one line explains."""


def commands(tiny: bool) -> dict[str, list[str]]:
    """What is run, by name, without the folders: `train`, `generate`, and `prepare`, which makes a run to ask."""
    python = ["python", "-m"]
    experiment = f"+experiment={EXPERIMENTS[tiny]}"
    return {
        "train": [*python, "ftlab.train", experiment, "evaluation.baseline=false", "tracking.log_every_steps=1"],
        "prepare": [
            *python,
            "ftlab.train",
            experiment,
            "evaluation=none",
            "evaluation.times=0",
            "training.max_steps=1",
        ],
        "generate": [*python, "ftlab.generate", "max_new_tokens=1", "my heart skips beats"],
    }


def environment() -> dict[str, str]:
    """That of the children."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONUNBUFFERED": "1"}


# --- the two times ----------------------------------------------------------------------------------------------------


def start(words: Sequence[str], folder: Path) -> tuple[float, subprocess.Popen[bytes]]:
    """A child in `folder`, and when it was started. What it says goes to out.log and error.log there."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable if word == "python" else word for word in words]
    with (folder / "out.log").open("wb") as output, (folder / "error.log").open("wb") as errors:
        begun = time.time()
        return begun, subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=output, stderr=errors
        )


def failure(folder: Path) -> BenchError:
    """What to say of a child that came to nothing: its last words."""
    said = (folder / "error.log").read_text("utf-8", errors="replace").strip().splitlines()
    return BenchError(f"{folder.name} came to nothing: {said[-1] if said else 'it said nothing'}")


def finish(child: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait for a child that must end well."""
    if child.wait() != 0:
        raise failure(folder)


def wait_for(file: Path, child: subprocess.Popen[bytes], folder: Path) -> float:
    """The time at which `file` has its first byte, to within POLL_SECONDS; BenchError if the child ends without."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        over = child.poll() is not None  # asked before looking, since the byte may be the child's last deed
        if file.exists() and file.stat().st_size:
            return time.time()
        if over or time.monotonic() > deadline:
            child.kill()
            raise failure(folder)
        time.sleep(POLL_SECONDS)


def first_step(words: Sequence[str], folder: Path) -> dict[str, Any]:
    """Train until the first step is logged, then stop; its time and those of the phases before it."""
    run_dir = folder / "run"
    begun, child = start([*words, f"run_dir={run_dir}"], folder)
    try:
        wait_for(run_dir / "metrics.jsonl", child, folder)
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait()
    line = json.loads((run_dir / "metrics.jsonl").read_text("utf-8").splitlines()[0])
    timings = json.loads((run_dir / "run.json").read_text("utf-8"))["timings"]
    phases = {name: timings[name] for name in ("data", "model", "preflight")}
    return {"seconds": line["time"] - begun, "phases": phases}


def first_token(words: Sequence[str], run_dir: Path, folder: Path) -> dict[str, Any]:
    """Ask the run in `run_dir` until the answer begins; its time."""
    begun, child = start([*words, f"run={run_dir}"], folder)
    seconds = wait_for(folder / "out.log", child, folder) - begun
    finish(child, folder)
    return {"seconds": seconds}


def measure(work: Path, tiny: bool, repeats: int, wait: float) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Both times in every repeat, in turn, and run.json of the run that is asked."""
    words = commands(tiny)
    asked = work / "asked" / "run"
    _, child = start([*words["prepare"], f"run_dir={asked}"], work / "asked")
    finish(child, work / "asked")
    runs: list[dict[str, Any]] = []
    for repeat in range(-1, repeats):  # the first round is not counted
        for name in COMMANDS:
            folder = work / (f"{name}-{repeat}" if repeat >= 0 else f"{name}-warm-up")
            waited = round(wait_idle(wait), 1) if repeat >= 0 else 0.0
            load = os.getloadavg()[0]
            found = first_step(words[name], folder) if name == "train" else first_token(words[name], asked, folder)
            if repeat >= 0:
                runs.append({"what": name, "repeat": repeat, "waited": waited, "load_before": load, **found})
            print(f"{folder.name}: {found['seconds']:.2f} s, load before {load:.2f}", file=sys.stderr, flush=True)
    return runs, json.loads((asked / "run.json").read_text("utf-8"))


# --- what they come to ------------------------------------------------------------------------------------------------


def summarize(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per command: median, lowest and highest time, and the share of the limit that the median takes."""
    rows: dict[str, dict[str, Any]] = {}
    for name in COMMANDS:
        times = [run["seconds"] for run in runs if run["what"] == name]
        median = statistics.median(times)
        rows[name] = {
            "median": median,
            "low": min(times),
            "high": max(times),
            "limit": LIMITS[name],
            "of_limit": median / LIMITS[name],
        }
    phases = [run["phases"] for run in runs if run["what"] == "train"]
    rows["train"]["phases"] = {key: statistics.median(phase[key] for phase in phases) for key in phases[0]}
    return rows


def table(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """The summary as text, a line a command."""
    lines = [f"{'seconds until':<28}{'median':>8}{'lowest':>8}{'highest':>8}{'limit':>7}"]
    for name, what in zip(COMMANDS, ("the first step is done", "the first token is there"), strict=True):
        row = summary[name]
        lines.append(f"{what:<28}{row['median']:>8.2f}{row['low']:>8.2f}{row['high']:>8.2f}{row['limit']:>7.0f}")
    phases = ", ".join(f"{key} {seconds:.2f}" for key, seconds in summary["train"]["phases"].items())
    return "\n".join([*lines, f"of the first: {phases}"])


def record(
    words: Sequence[str], runs: Sequence[Mapping[str, Any]], asked: Mapping[str, Any], started: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of the JSON record; docs/results/README.md explains it."""
    return {
        "format": 1,
        "name": "bench_startup",
        "command": shlex.join(["python", "scripts/bench_startup.py", *words]),
        **started,
        "finished": now(),
        "packages": asked["packages"],
        "device": asked["device"],
        "model": asked["model"],
        "commands": {name: shlex.join(command) for name, command in commands("--tiny" in words).items()},
        "runs": list(runs),
        "summary": summarize(runs),
    }


def parse(argv: Sequence[str], prog: str = "bench_startup.py", about: str = __doc__ or "") -> argparse.Namespace:
    """The command line, of other benchmarks that repeat small runs too."""
    parser = argparse.ArgumentParser(prog=prog, description=about.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=3, help="counted runs of each command (default %(default)s)")
    parser.add_argument(
        "--wait-idle",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="before each run, wait at most that long for an idle machine (default: do not wait)",
    )
    parser.add_argument("--tiny", action="store_true", help="random models and shipped examples: no download")
    parser.add_argument("--out", type=Path, help="write the JSON record here")
    chosen = parser.parse_args(argv)
    if chosen.repeats < 1 or not chosen.wait_idle >= 0:
        parser.error("--repeats is at least 1, --wait-idle at least 0")
    if chosen.out is not None and not chosen.out.resolve().parent.is_dir():
        parser.error(f"--out {chosen.out}: there is no such folder")
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    """The command; a run that fails is one line and status 1. A time over its limit is no failure: it is printed."""
    words = list(sys.argv[1:] if argv is None else argv)
    chosen = parse(words)
    started = beginning()
    try:
        with tempfile.TemporaryDirectory(prefix="bench-startup-") as folder:
            runs, asked = measure(Path(folder), chosen.tiny, chosen.repeats, chosen.wait_idle)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    content = record(words, runs, asked, started)
    print(f"{asked['device']['name']}, {asked['device']['threads']} threads; medians of {chosen.repeats}")
    print(table(content["summary"]))
    if chosen.out is not None:
        atomic_write(chosen.out, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
