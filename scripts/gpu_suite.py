#!/usr/bin/env python3
"""Measure the kernels and whole training steps on one GPU: at most 9 minutes for all sections, a record for each.

    bash scripts/gpu_suite.sh                               everything, into $OUT or ./gpu-results
    bash scripts/gpu_suite.sh --only lora adamw             some sections
    bash scripts/gpu_suite.sh --only lora --limit lora=300  with more time
    bash scripts/gpu_suite.sh --smoke --out FOLDER          on a CPU, in Triton's interpreter; its figures mean nothing

Every section runs in a process of its own with a time of its own, so that one that fails, hangs or fills the memory
costs itself alone; its record, FOLDER/SECTION.json, is written anew after each of its measurements. A section whose
record says "finished" is left out (--again measures it once more), so a second call goes on where the first stopped.
The table comes last, also as FOLDER/table.md. Exit status: 1 if correctness failed or did not finish, 3 if another
section did not finish, else 0.

Needs torch and triton; compares with peft, transformers, liger-kernel and bitsandbytes where they are installed.
docs/results/README.md explains the records.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

# This process imports neither torch nor the kernels: it has to outlive whatever they do.
SCRIPTS = Path(__file__).resolve().parent
sys.path.insert(0, str(SCRIPTS))

import gpu_table  # noqa: E402
from gpu import records  # noqa: E402

__all__ = ["LIMITS", "TOTAL", "exit_status", "main", "run_section"]

LIMITS = {  # seconds, in the order in which they run
    "device": 45,
    "correctness": 125,
    "lora": 105,
    "adamw": 50,
    "head": 50,
    "pointwise": 40,
    "end_to_end": 120,
}
TOTAL = 540
SMOKE_LIMIT = 900  # of each section
BEGAN = "FTLAB_SECTION_BEGAN"  # when its process was started: importing torch takes of a section's time too
TAIL = 40  # lines of a section's output that a record of its failure keeps


def child_environment(name: str, smoke: bool) -> dict[str, str]:
    environment = dict(os.environ)
    paths = [str(records.ROOT), str(records.ROOT / "kernels"), str(SCRIPTS), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    environment["PYTHONUNBUFFERED"] = "1"
    environment[BEGAN] = str(time.time())
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    environment.setdefault("HF_HUB_OFFLINE", "1")
    if name == "end_to_end":  # some of its contestants nearly fill the memory
        environment.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if name == "correctness":  # without it cuBLAS promises no equal bits
        environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    environment.pop("TRITON_INTERPRET", None)
    if smoke:
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", "1")}
    return environment


def run_section(name: str, out: Path, limit: float, *, smoke: bool = False, command: str = "") -> dict[str, Any]:
    """A section in its own process; its record, with what went wrong if it did not finish."""
    path = out / f"{name}.json"
    words = [sys.executable, str(SCRIPTS / "gpu_suite.py"), "--section", name, "--out", str(out)]
    words += [f"--limit={name}={limit:g}", "--command", command, *(["--smoke"] if smoke else [])]
    path.unlink(missing_ok=True)
    tail: collections.deque[str] = collections.deque(maxlen=TAIL)
    # A session of its own: what it starts (compilers, test workers) ends with it.
    process = subprocess.Popen(
        words, env=child_environment(name, smoke), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    reader = threading.Thread(target=echo, args=(process.stdout, tail), daemon=True)
    reader.start()
    begin = time.monotonic()
    try:
        status: int | None = process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        status = None
    end_group(process)
    reader.join(timeout=5)
    record = records.read(path)
    if record is not None and record["status"] == "finished" and status == 0:
        return record
    what = f"stopped after {limit:g} s" if status is None else f"ended with status {status}"
    record = record or unmeasured(name, smoke, command)
    record |= {"status": "timed out" if status is None else "failed", "problem": what}
    record |= {"seconds": round(time.monotonic() - begin, 1), "output": list(tail)}
    records.write(path, record)
    return record


def echo(stream: IO[str], tail: collections.deque[str]) -> None:
    """Show what a section prints, and keep its last lines."""
    with stream:
        for line in stream:
            tail.append(line.rstrip("\n")[:500])
            print(line, end="", flush=True)


def end_group(process: subprocess.Popen[str]) -> None:
    """End what is left of a section's session."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # a process that the driver holds cannot be waited for
        process.wait(timeout=10)


def unmeasured(name: str, smoke: bool, command: str) -> dict[str, Any]:
    """The record of a section that wrote none."""
    from gpu import goals

    return {
        **{"format": records.FORMAT, "name": "gpu_suite", "section": name, "smoke": smoke, "command": command},
        **records.commit(),
        **{"packages": records.packages(), "device": None, "written": records.now(), "items": {}, "errors": {}},
        "verdicts": goals.verdicts(name, {}, None, None),
    }


def play_section(name: str, out: Path, limit: float, *, smoke: bool, command: str) -> int:
    """What the section's own process does."""
    import torch
    from gpu.section import Section

    if not smoke and not torch.cuda.is_available():
        print("error: torch sees no GPU here; --smoke runs on a CPU", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    spent = max(time.time() - float(os.environ.get(BEGAN, "inf")), 0.0)
    section = Section(name, out, smoke=smoke, limit=limit - spent, command=command)
    module = importlib.import_module(f"gpu.{name}")
    module.run(section)
    section.write("finished")
    return 0


def exit_status(found: dict[str, dict[str, Any]]) -> int:
    """1: correctness failed or did not finish. 3: another section did not finish."""
    record = found.get("correctness")
    if record is not None:
        judged = [line["met"] for line in record["verdicts"]]
        # In a smoke run nothing is judged, but a test that fails there fails anywhere.
        tests = record["items"].get("tests", {})
        if record["status"] != "finished" or tests.get("failed") or tests.get("exit") != 0 or False in judged:
            return 1
    return 3 if any(record["status"] != "finished" for record in found.values()) else 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_suite.sh", description=(__doc__ or "").partition("\n")[0])
    folder = os.environ.get("OUT") or "gpu-results"
    parser.add_argument("--only", nargs="+", choices=list(LIMITS), default=list(LIMITS), metavar="SECTION",
                        help=f"some of {', '.join(LIMITS)}")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path(folder), help="folder of the records (default $OUT)")
    parser.add_argument("--again", action="store_true", help="also what has a finished record")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on a CPU; its figures mean nothing")
    parser.add_argument("--limit", action="append", default=[], metavar="SECTION=SECONDS", help="another time limit")
    parser.add_argument("--section", choices=list(LIMITS), help=argparse.SUPPRESS)
    parser.add_argument("--command", default="", help=argparse.SUPPRESS)
    chosen = parser.parse_args(argv)
    chosen.limits = {name: float(SMOKE_LIMIT if chosen.smoke else seconds) for name, seconds in LIMITS.items()}
    for word in chosen.limit:
        name, _, seconds = word.partition("=")
        if name not in LIMITS or not seconds.replace(".", "", 1).isdigit():
            parser.error(f"--limit {word}: SECTION=SECONDS with a section of {', '.join(LIMITS)}")
        chosen.limits[name] = float(seconds)
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    chosen = parse(words)
    if chosen.section is not None:
        limit = chosen.limits[chosen.section]
        return play_section(chosen.section, chosen.out, limit, smoke=chosen.smoke, command=chosen.command)
    command = " ".join(["bash scripts/gpu_suite.sh", *words])
    chosen.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any]] = {}
    for name in [name for name in LIMITS if name in chosen.only]:
        record = records.read(chosen.out / f"{name}.json")
        if record is not None and record["status"] == "finished" and not chosen.again:
            print(f"{name}: measured already", file=sys.stderr)
        else:
            print(f"{name}: at most {chosen.limits[name]:g} s", file=sys.stderr, flush=True)
            record = run_section(name, chosen.out, chosen.limits[name], smoke=chosen.smoke, command=command)
        found[name] = record
    text = gpu_table.page(gpu_table.load(chosen.out))
    records.write_text(chosen.out / "table.md", text)
    print(text, flush=True)
    return exit_status(found)


if __name__ == "__main__":
    raise SystemExit(main())
