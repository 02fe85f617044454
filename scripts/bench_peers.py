#!/usr/bin/env python3
"""The same fine-tuning by Hugging Face's Trainer with PEFT, torchtune, LitGPT and ftlab, side by side on this CPU.

    python scripts/bench_peers.py --repeats 3 --wait-idle 300 --out docs/results/peers.json
    python scripts/bench_peers.py --dropout 0 --only hf-fp32 ftlab-fp32     do both learn the same?
    python scripts/bench_peers.py --tiny --examples 24 --held-out 16        no download; its numbers mean nothing

torchtune and LitGPT run by the Python of an environment of their own, and only where that is given (torch as here;
torchtune 0.6.1 imports what torchao removed in 0.16; LitGPT 0.5.13 needs requests, which only its extras ask for):

    python -m venv A && A/bin/pip install torch==2.13.0 torchtune==0.6.1 torchao==0.15.0
    python -m venv B && B/bin/pip install torch==2.13.0 litgpt==0.5.13 requests
    python scripts/bench_peers.py --torchtune-python A/bin/python --litgpt-python B/bin/python

Alike for all: base weights and first adapter weights (files that ftlab wrote and all read), token ids and labels,
order, examples in a step, rank, alpha, dropout rate, target layers, AdamW and its constants, a constant learning rate,
clipping, seed, threads, version of torch. Differing: all else that they do with them, which is what is compared.

- `hf-fp32`, `hf-bf16`, `hf-bf16-weights`: Trainer, batches padded on the right to their longest example; all in fp32,
  or bf16=True (autocast) over base weights in fp32 or in bf16. PEFT keeps the adapter in fp32 in each, its default.
- `torchtune-fp32`, `torchtune-bf16`: its recipe lora_finetune_single_device; see scripts/peers_torchtune.py. Its bf16
  has everything in bf16, the adapter included.
- `litgpt-fp32`, `litgpt-bf16`, `litgpt-bf16-weights`: its recipe finetune_lora in 32-true, bf16-mixed and bf16-true;
  the last has everything in bf16; see scripts/peers_litgpt.py.
- `ftlab-fp32`, `ftlab-bf16`: `python -m ftlab.train` without packing. bf16 is autocast over frozen weights in bf16. Its
  own options stand in FTLAB_OWN in scripts/peers_ftlab.py: the tokens that the examples of a step begin with are
  computed once, so these see them through one dropout mask. They count once for each example, as everywhere.

Each contestant runs in a process of its own, one after another, in another order in each repeat. Measured:

- tokens per second: real tokens (no padding) of steps 2 to the last over the time between the ends of step 1 and of
  the last one. Loading, ftlab's trial run of the largest batch and step 1 are warm-up and left out.
- peak memory: the process's largest resident set up to the end of the last step, loading included.
- training loss: nats per supervised token over the last quarter of the steps, as each framework measured it.
- held-out loss: nats over supervised tokens of the held-out examples. Every adapter, loaded by PEFT on the fp32 base,
  is scored by the same code in fp32, whatever it was trained in.

docs/results/README.md explains the record that --out writes.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

# This process must stay small and so imports neither torch nor the frameworks: on Linux a child's largest resident set
# starts from its parent's at the moment of the start.
SCRIPTS = Path(__file__).resolve().parent
ROOT = SCRIPTS.parent
sys.path[:0] = [str(SCRIPTS), str(ROOT)]

from peers_common import (  # noqa: E402
    CONTESTANTS,
    FACTS,
    GUESTS,
    PACKAGES,
    STEPS,
    BenchError,
    Settings,
    agreement,
    figures,
    order,
    summarize,
    table,
)
from peers_ftlab import FTLAB_OWN, own_overrides, prepare, read_ftlab  # noqa: E402
from peers_hf import score, train_hf  # noqa: E402

from ftlab.files import atomic_write  # noqa: E402

__all__ = ["beginning", "main", "now", "record"]

TOLERANCE = 1e-3  # nats; how far two fp32 runs of the same steps may drift apart without dropout
IDLE = 0.3  # load average of the last minute under which the machine counts as idle


def start(command: Sequence[str], work: Path, settings: Settings, what: str) -> None:
    """Run a child in the working folder; BenchError with its last words if it fails."""
    log = work / f"{what}.log"
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(settings.threads),
        "PYTHONPATH": str(ROOT),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",  # LitGPT takes a GPU that it sees
        "FTLAB_BF16": "always",  # as the others, on any processor
    }
    with log.open("wb") as output:
        done = subprocess.run(command, cwd=work, env=environment, stdout=output, stderr=output, check=False)
    if done.returncode != 0:
        said = [line for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
        raise BenchError(f"{what} ended with status {done.returncode}: {said[-1] if said else 'it said nothing'}")


def start_role(role: str, work: Path, settings: Settings, *words: str) -> None:
    """Run one of this file's roles as a child."""
    command = [sys.executable, str(Path(__file__).resolve()), "--role", role, json.dumps(asdict(settings)), *words]
    start(command, work, settings, words[-1] if role == "hf" else role)


def start_guest(framework: str, python: Path, work: Path, settings: Settings, words: Sequence[str]) -> None:
    """Run the file of a framework that has an interpreter of its own."""
    script = SCRIPTS / f"peers_{framework}.py"
    command = [str(python), str(script), json.dumps(asdict(settings)), *words]
    start(command, work, settings, f"{framework}-{words[0]}" if len(words) == 1 else words[-1])


def play_role(role: str, settings: Settings, words: Sequence[str]) -> None:
    """What a child does; the working folder is the current one."""
    work = Path.cwd()
    if role == "prepare":
        prepare(work, settings)
    elif role == "hf":
        train_hf(work, settings, *words)
    else:
        score(work, settings, words)


def run_one(work: Path, settings: Settings, name: str, run: str, pythons: Mapping[str, Path]) -> Mapping[str, Any]:
    """One contestant's run: what happened at each step."""
    framework, compute = CONTESTANTS[name][:2]
    if framework == "ftlab":
        start([sys.executable, "-m", "ftlab.train", *own_overrides(settings, compute, run)], work, settings, run)
        return read_ftlab(work / run)
    if framework == "hf":
        start_role("hf", work, settings, name, run)
    else:
        start_guest(framework, pythons[framework], work, settings, [name, run])
    steps: dict[str, Any] = json.loads((work / run / STEPS).read_text("utf-8"))
    return steps


def wait_idle(seconds: float) -> float:
    """Wait until the machine is idle, at most that long; the seconds it took."""
    began = time.monotonic()
    while os.getloadavg()[0] >= IDLE and (left := seconds - (time.monotonic() - began)) > 0:
        time.sleep(min(2.0, left))
    return time.monotonic() - began


def measure(
    work: Path, settings: Settings, names: Sequence[str], pythons: Mapping[str, Path], repeats: int, wait: float
) -> list[dict[str, Any]]:
    """Every contestant in every repeat, then the held-out losses of all."""
    expected = json.loads((work / FACTS).read_text("utf-8"))["steps"]
    runs: list[dict[str, Any]] = []
    for repeat in range(repeats):
        for name in order(names, repeat):
            run = f"{name}-{repeat}"
            waited = wait_idle(wait)
            load = os.getloadavg()[0]
            steps = run_one(work, settings, name, run, pythons)
            try:
                found = figures(steps, expected)
            except BenchError as error:
                raise BenchError(f"{run}: {error}") from None
            runs.append({"contestant": name, "repeat": repeat, "waited": waited, "load_before": load, **found})
            print(f"{run}: {found['tokens_per_second']:.1f} tokens/s", file=sys.stderr, flush=True)
    start_role("score", work, settings, *(f"{run['contestant']}-{run['repeat']}" for run in runs))
    scores = json.loads((work / "scores.json").read_text("utf-8"))
    return [{**run, **scores[f"{run['contestant']}-{run['repeat']}"]} for run in runs]


def guest_packages(framework: str, python: Path) -> dict[str, str]:
    """Versions in another interpreter, which must have the framework and the same torch as this one."""
    code = (
        "import importlib.metadata as m, json, platform, sys; "
        "print(json.dumps({'python': platform.python_version(), **{n: m.version(n) for n in sys.argv[1:]}}))"
    )
    done = subprocess.run([python, "-c", code, *GUESTS[framework]], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise BenchError(f"--{framework}-python {python}: {said[-1] if said else 'it said nothing'}")
    versions: dict[str, str] = json.loads(done.stdout)
    here = importlib.metadata.version("torch")
    if versions["torch"] != here:
        raise BenchError(f"--{framework}-python {python} has torch {versions['torch']}, this one {here}")
    return versions


def git(*words: str) -> str | None:
    """What git says about this checkout; None outside one."""
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def record(
    settings: Settings, facts: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], started: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of the JSON record; docs/results/README.md explains it."""
    return {
        "format": 1,
        "name": "bench_peers",
        "command": shlex.join(["python", "scripts/bench_peers.py", *sys.argv[1:]]),
        **started,
        "finished": now(),
        "packages": facts["packages"],
        "guest_packages": facts["guest_packages"],
        "device": facts["machine"],
        "model": facts["model"],
        "data": facts["data"],
        "settings": asdict(settings),
        "ftlab_own": list(FTLAB_OWN),
        "contestants": {
            name: dict(zip(("framework", "compute", "frozen", "adapter"), CONTESTANTS[name], strict=True))
            for name in CONTESTANTS
            if any(run["contestant"] == name for run in runs)
        },
        "runs": list(runs),
        "summary": summarize(runs),
        "largest_fp32_loss_difference": agreement(runs) if settings.dropout == 0 else None,
    }


def beginning() -> dict[str, Any]:
    """When the comparison began, and of which state of the code it is."""
    changes = git("status", "--porcelain", "--untracked-files=no")
    return {"started": now(), "commit": git("rev-parse", "HEAD"), "dirty": bool(changes)}


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="bench_peers.py", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    defaults = Settings()
    parser.add_argument(
        "--examples", type=int, default=defaults.examples, help="training examples (default %(default)s)"
    )
    parser.add_argument(
        "--held-out", type=int, default=defaults.held_out, help="held-out examples (default %(default)s)"
    )
    parser.add_argument("--dropout", type=float, default=defaults.dropout, help="on the adapter (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each contestant; medians are shown (default 1)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (default: all cores)")
    parser.add_argument("--only", nargs="+", choices=list(CONTESTANTS), metavar="NAME", help="these contestants alone")
    for guest in GUESTS:
        parser.add_argument(
            f"--{guest}-python", type=Path, metavar="PATH", help=f"a Python that has {guest}, which then takes part"
        )
    parser.add_argument(
        "--wait-idle",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help=f"before each run, wait at most that long for a load average under {IDLE} (default: do not wait)",
    )
    parser.add_argument("--tiny", action="store_true", help="two random layers and a table of capitals: no download")
    parser.add_argument("--out", type=Path, help="write the JSON record here")
    chosen = parser.parse_args(argv)
    check(parser, chosen)
    return chosen


def check(parser: argparse.ArgumentParser, chosen: argparse.Namespace) -> None:
    """Refuse what cannot work; add `pythons`, the interpreters by framework, and `names`, who takes part."""
    batch = Settings().batch_size
    if chosen.examples < 2 * batch:
        parser.error(f"--examples {chosen.examples}: at least {2 * batch}, since step 1 is warm-up")
    if min(chosen.held_out, chosen.repeats, chosen.threads) < 1 or not 0 <= chosen.dropout < 1:
        parser.error("--held-out, --repeats and --threads are at least 1, --dropout is at least 0 and below 1")
    if not chosen.wait_idle >= 0:
        parser.error("--wait-idle is at least 0")
    given = {guest: getattr(chosen, f"{guest}_python") for guest in GUESTS}
    # Not resolved: the Python of a virtual environment is a link, and where it stands says which packages it has.
    chosen.pythons = {guest: path.absolute() for guest, path in given.items() if path is not None}
    for guest, path in chosen.pythons.items():
        if not path.is_file():
            parser.error(f"--{guest}-python {path}: there is no such file")
    present = {"hf", "ftlab", *chosen.pythons}
    for name in chosen.only or ():
        if CONTESTANTS[name][0] not in present:
            parser.error(f"--only {name} needs --{CONTESTANTS[name][0]}-python")
    chosen.names = [n for n in CONTESTANTS if CONTESTANTS[n][0] in present and n in (chosen.only or CONTESTANTS)]
    if chosen.examples % batch and any(CONTESTANTS[name][0] == "torchtune" for name in chosen.names):
        parser.error(f"--examples {chosen.examples}: a multiple of {batch}, since torchtune leaves out a smaller batch")
    if chosen.out is not None and not chosen.out.resolve().parent.is_dir():
        parser.error(f"--out {chosen.out}: there is no such folder")


def compare(chosen: argparse.Namespace) -> int:
    """Prepare, run, print and record; 1 if two runs that must agree do not."""
    settings = Settings(
        examples=chosen.examples,
        held_out=chosen.held_out,
        dropout=chosen.dropout,
        threads=chosen.threads,
        tiny=chosen.tiny,
    )
    guests = {guest: guest_packages(guest, python) for guest, python in chosen.pythons.items()}
    started = beginning()
    with tempfile.TemporaryDirectory(prefix="bench-peers-") as folder:
        work = Path(folder)
        start_role("prepare", work, settings)
        if any(CONTESTANTS[name][0] == "litgpt" for name in chosen.names):
            start_guest("litgpt", chosen.pythons["litgpt"], work, settings, ["prepare"])
        runs = measure(work, settings, chosen.names, chosen.pythons, chosen.repeats, chosen.wait_idle)
        facts = {**json.loads((work / FACTS).read_text("utf-8")), "guest_packages": guests}
    content = record(settings, facts, runs, started)
    machine = facts["machine"]
    print(
        f"{machine['name']}, {settings.threads} threads; medians of {chosen.repeats} runs; {settings.examples} examples"
    )
    print(table(content["summary"]))
    if chosen.out is not None:
        atomic_write(chosen.out, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    difference = content["largest_fp32_loss_difference"]
    if difference is None:
        return 0
    print(f"without dropout the fp32 training losses of the frameworks differ by at most {difference:.1e} in any step")
    return int(difference > TOLERANCE)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; a mistake or a failed contestant is one line and status 1."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--role"]:
        play_role(words[1], Settings(**json.loads(words[2])), words[3:])
        return 0
    chosen = parse(words)
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        print(f"error: {', '.join(missing)} missing; install the test extra: pip install -e '.[test]'", file=sys.stderr)
        return 1
    try:
        return compare(chosen)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
