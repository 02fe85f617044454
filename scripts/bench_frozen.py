#!/usr/bin/env python3
"""What freezing saves: time and memory of a training step, against full fine-tuning.

    python scripts/bench_frozen.py --repeats 3 --wait-idle 300 --out docs/results/frozen.json
    python scripts/bench_frozen.py --tiny              random models, no download; its numbers mean nothing

Each of ARMS trains STEPS steps in a process of its own, in turn, in every round: all-MiniLM-L6-v2 on definitions of
clinical terms (32 texts of 64 tokens a step), SmolLM2-135M-Instruct on rows of 512 tokens, both in bf16. The time of a
step is the median from the third step on; ratios are taken within a round. The memory of a step is what the run counts
before it begins: gradients, optimizer state, and the activations that its largest micro-batch keeps. The peak is that
of the whole process.

docs/results/README.md explains the record that --out writes.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ftlab.files import atomic_write  # noqa: E402
from scripts.bench_peers import beginning, now, wait_idle  # noqa: E402
from scripts.bench_startup import BenchError, parse  # noqa: E402

__all__ = ["ARMS", "MODELS", "main", "summarize", "words"]

STEPS, UNCOUNTED = 8, 2
COMMON = (
    *("evaluation=none", "evaluation.times=0", "tracking=disabled", "tracking.log_every_steps=1", "schedule=constant"),
    f"training.max_steps={STEPS}",
)
TEXTS = ("data.max_length=64", "data.too_long=truncate", "data.batch_size=32", "data.micro_batch_size=32")
ROWS = ("data.row_length=512", "data.pad_rows=true", "data.batch_size=1", "data.micro_batch_size=1")
MODELS = {
    "MiniLM": ("model=minilm", "data=hpo_organ", *TEXTS, "precision=bf16"),
    "SmolLM2": ("model=smollm2_135m", "data=hpo_lay_to_clinical", "data.template=chatml", *ROWS, "precision=bf16"),
}
TINY = {
    "MiniLM": ("model=tiny_bert_random", "data=topics", "data.batch_size=4", "data.micro_batch_size=4"),
    "SmolLM2": ("model=tiny_random", "data=capitals", *ROWS),
}
FROZEN = tuple(
    (f"lower {name} frozen", ("method=freeze", f"method.frozen_fraction={value}"))
    for name, value in (("third", 1 / 3), ("half", 1 / 2), ("two thirds", 2 / 3), ("five sixths", 5 / 6))
)
ARMS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "MiniLM": (
        ("full", ("method=full",)),
        *FROZEN,
        ("linear probe", ("method=linear_probe",)),
        ("BitFit", ("method=bitfit",)),
        ("LoRA, rank 16", ("method=lora_bert", "method.rank=16")),
    ),
    "SmolLM2": (
        ("full", ("method=full",)),
        *FROZEN,
        ("LoRA, rank 16", ("method=lora", "method.rank=16")),
        ("QLoRA, rank 16", ("method=qlora", "method.rank=16")),
    ),
}


def words(model: str, arm: Sequence[str], tiny: bool) -> list[str]:
    """What a run is given, without its folder."""
    return [*(TINY if tiny else MODELS)[model], *arm, *COMMON]


def run_arm(given: Sequence[str], folder: Path) -> dict[str, Any]:
    """Train in a process of its own: seconds of a step, memory in bytes, and run.json."""
    command = [sys.executable, "-m", "ftlab.train", *given, f"run_dir={folder}"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "FTLAB_BF16": "always"}
    )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise BenchError(f"{shlex.join(given)}: {said[-1] if said else 'it said nothing'}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    times = [line["time"] for line in lines if line["split"] == "train"]
    record = json.loads((folder / "run.json").read_text("utf-8"))
    steps = [after - before for before, after in itertools.pairwise(times)]
    return {"seconds": statistics.median(steps[UNCOUNTED - 1 :]), "record": record}


def counted(record: Mapping[str, Any]) -> dict[str, int]:
    """What of a run's memory goes into the record, and how many numbers train."""
    memory = record["memory"]
    kept = {name: memory[name] for name in ("weights", "gradients", "optimizer", "activations", "peak_rss")}
    trained = sum(row["count"] for row in record["parameters"] if row["trainable"])
    return {**kept, "trained": trained, "total": sum(row["count"] for row in record["parameters"])}


def measure(work: Path, tiny: bool, repeats: int, wait: float) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Every arm in every round, in turn, and a run.json. A round that is not counted brings files into memory."""
    runs: list[dict[str, Any]] = []
    last: dict[str, Any] = {}
    for repeat in range(-1, repeats):
        for model, arms in ARMS.items():
            for name, arm in arms if repeat >= 0 else arms[:1]:
                waited = round(wait_idle(wait), 1) if repeat >= 0 else 0.0
                load = os.getloadavg()[0]
                folder = work / f"run-{len(list(work.iterdir()))}"
                found = run_arm(words(model, arm, tiny), folder)
                last = found.pop("record")
                if repeat >= 0:
                    about = {"model": model, "arm": name, "repeat": repeat, "waited": waited, "load_before": load}
                    runs.append({**about, **found, **counted(last)})
                print(f"{model}, {name}: {found['seconds']:.3f} s a step, load before {load:.2f}", file=sys.stderr)
    return runs, last


def summarize(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """By model and arm: step time and memory over those of full in the same round, medians with lowest and highest."""
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for model, arms in ARMS.items():
        full = {run["repeat"]: run for run in runs if run["model"] == model and run["arm"] == "full"}
        rows[model] = {}
        for name, _ in arms:
            own = [run for run in runs if run["model"] == model and run["arm"] == name]
            times = [run["seconds"] / full[run["repeat"]]["seconds"] for run in own]
            first, whole = own[0], full[own[0]["repeat"]]
            rows[model][name] = {
                "time": statistics.median(times),
                "time_low": min(times),
                "time_high": max(times),
                "trained": first["trained"] / first["total"],
                "step_memory": step_memory(first) / step_memory(whole),
                "gradients": first["gradients"] / whole["gradients"],
                "optimizer": first["optimizer"] / whole["optimizer"],
                "activations": first["activations"] / whole["activations"],
                "peak": statistics.median(run["peak_rss"] / full[run["repeat"]]["peak_rss"] for run in own),
            }
    return rows


def step_memory(run: Mapping[str, Any]) -> float:
    """Bytes that training takes on top of the weights."""
    return float(run["gradients"] + run["optimizer"] + run["activations"])


def record(
    given: Sequence[str], runs: Sequence[Mapping[str, Any]], last: Mapping[str, Any], started: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of the JSON record; docs/results/README.md explains it."""
    tiny = "--tiny" in given
    return {
        "format": 1,
        "name": "bench_frozen",
        "command": shlex.join(["python", "scripts/bench_frozen.py", *given]),
        **started,
        "finished": now(),
        "packages": last["packages"],
        "device": last["device"],
        "words": {model: {name: shlex.join(words(model, arm, tiny)) for name, arm in ARMS[model]} for model in ARMS},
        "runs": list(runs),
        "summary": summarize(runs),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command; a run that fails is one line and status 1."""
    given = list(sys.argv[1:] if argv is None else argv)
    chosen = parse(given, "bench_frozen.py", __doc__ or "")
    started = beginning()
    try:
        with tempfile.TemporaryDirectory(prefix="bench-frozen-") as folder:
            runs, last = measure(Path(folder), chosen.tiny, chosen.repeats, chosen.wait_idle)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    content = record(given, runs, last, started)
    for model, rows in content["summary"].items():
        for name, row in rows.items():
            print(f"{model}, {name}: {row['time']:.2f} of full's time, {row['step_memory']:.2f} of its memory a step")
    if chosen.out is not None:
        atomic_write(chosen.out, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
