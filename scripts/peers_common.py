"""What every part of scripts/bench_peers.py shares: contestants, settings, file names, and what the figures mean.

Both this interpreter and those of other trainers import it, so that it needs nothing but the standard library.
"""

from __future__ import annotations

import itertools
import json
import resource
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["CONTESTANTS", "IGNORE", "BenchError", "Settings", "Steps", "step_sizes"]

CONTESTANTS = {  # name -> framework, what is computed in, what the frozen weights and the adapter are stored in
    "hf-fp32": ("hf", "fp32", "fp32", "fp32"),
    "hf-bf16": ("hf", "bf16", "fp32", "fp32"),
    "hf-bf16-weights": ("hf", "bf16", "bf16", "fp32"),
    "torchtune-fp32": ("torchtune", "fp32", "fp32", "fp32"),
    "torchtune-bf16": ("torchtune", "bf16", "bf16", "bf16"),
    "litgpt-fp32": ("litgpt", "fp32", "fp32", "fp32"),
    "litgpt-bf16": ("litgpt", "bf16", "fp32", "fp32"),
    "litgpt-bf16-weights": ("litgpt", "bf16", "bf16", "bf16"),
    "ftlab-fp32": ("ftlab", "fp32", "fp32", "fp32"),
    "ftlab-bf16": ("ftlab", "bf16", "bf16", "fp32"),
}
PACKAGES = ("transformers", "peft", "accelerate")
GUESTS = {  # frameworks with an interpreter of their own -> the packages whose versions a record names
    "torchtune": ("torch", "torchtune", "torchao"),
    "litgpt": ("torch", "litgpt", "lightning"),
}
BASE, ADAPTER, EXAMPLES, RECORDS, FACTS = "base", "adapter", "examples.json", "train.jsonl", "facts.json"
STEPS = "steps.json"
IGNORE = -100


@dataclass(frozen=True)
class Settings:
    """What all contestants share."""

    examples: int = 160
    held_out: int = 48
    max_length: int = 512
    batch_size: int = 8
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.1
    lr: float = 1e-3
    max_grad_norm: float = 1.0
    seed: int = 0
    threads: int = 1
    tiny: bool = False


class BenchError(Exception):
    """A mistake or failure that one line explains."""


@dataclass
class Steps:
    """What happened at each step of a run."""

    times: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    supervised: list[int] = field(default_factory=list)
    peak_rss: int = 0

    def seen(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> None:
        """The next step's examples are these."""
        sizes = step_sizes(rows, len(rows))
        self.tokens += sizes["tokens"]
        self.supervised += sizes["supervised"]

    def ended(self) -> None:
        """A step is done, its update included."""
        self.times.append(time.time())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.peak_rss = peak if sys.platform == "darwin" else peak * 1024

    def write(self, folder: Path) -> None:
        """Into the run's folder."""
        (folder / STEPS).write_text(json.dumps(asdict(self)), "utf-8")


def step_sizes(examples: Sequence[Mapping[str, Sequence[int]]], batch_size: int) -> dict[str, list[int]]:
    """Real and supervised tokens of each step in order. A row's first token is never predicted."""
    parts = [examples[start : start + batch_size] for start in range(0, len(examples), batch_size)]
    return {
        "tokens": [sum(len(row["ids"]) for row in part) for part in parts],
        "supervised": [sum(label != IGNORE for row in part for label in row["labels"][1:]) for part in parts],
    }


def tail_loss(losses: Sequence[float], supervised: Sequence[int]) -> float:
    """Nats per supervised token over the last quarter of the steps (at least one), from each step's mean and tokens."""
    last = max(1, len(losses) // 4)
    weights = supervised[-last:]
    return sum(loss * weight for loss, weight in zip(losses[-last:], weights, strict=True)) / sum(weights)


def order(names: Sequence[str], repeat: int) -> list[str]:
    """The order of one repeat: each repeat begins one further, so that no contestant always runs first or last."""
    start = repeat % len(names)
    return [*names[start:], *names[:start]]


def summarize(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Medians over the repeats, and their relation to the best HF setting of each column; None without an HF run.

    Of the speed the lowest and the highest too. speed and memory are divided by the HF contestants' highest speed and
    lowest peak; the held-out loss is subtracted.
    """
    measured = ("tokens_per_second", "peak_rss", "train_loss", "held_out_loss")
    rows: dict[str, dict[str, float | None]] = {}
    medians: dict[str, dict[str, float]] = {}
    for name in CONTESTANTS:
        mine = [run for run in runs if run["contestant"] == name]
        if mine:
            speeds = [run["tokens_per_second"] for run in mine]
            medians[name] = {key: statistics.median(run[key] for run in mine) for key in measured}
            rows[name] = {"tokens_per_second_low": min(speeds), "tokens_per_second_high": max(speeds)}
    peers = [values for name, values in medians.items() if CONTESTANTS[name][0] == "hf"]
    for name, values in medians.items():
        rows[name] |= {**values, "speed_ratio": None, "memory_ratio": None, "held_out_difference": None}
        if peers:
            rows[name] |= {
                "speed_ratio": values["tokens_per_second"] / max(peer["tokens_per_second"] for peer in peers),
                "memory_ratio": values["peak_rss"] / min(peer["peak_rss"] for peer in peers),
                "held_out_difference": values["held_out_loss"] - min(peer["held_out_loss"] for peer in peers),
            }
    return rows


def table(summary: Mapping[str, Mapping[str, float | None]]) -> str:
    """The medians as text, a line a contestant. `x HF`: divided by the best HF setting; `- HF`: minus it."""
    heads = (
        "contestant",
        "tokens/s",
        "lowest",
        "highest",
        "x HF",
        "peak GiB",
        "x HF",
        "train loss",
        "held-out",
        "- HF",
    )

    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    lines = [heads]
    for name, row in summary.items():
        peak = row["peak_rss"]
        cells = (
            shown(row["tokens_per_second"], ".1f"),
            shown(row["tokens_per_second_low"], ".1f"),
            shown(row["tokens_per_second_high"], ".1f"),
            shown(row["speed_ratio"], ".2f"),
            shown(None if peak is None else peak / 2**30, ".2f"),
            shown(row["memory_ratio"], ".2f"),
            shown(row["train_loss"], ".4f"),
            shown(row["held_out_loss"], ".4f"),
            shown(row["held_out_difference"], "+.4f"),
        )
        lines.append((name, *cells))
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def agreement(runs: Sequence[Mapping[str, Any]]) -> float | None:
    """The largest difference between two frameworks' fp32 losses of one step; None unless two frameworks ran in it."""
    losses = {run["contestant"]: run["losses"] for run in runs if CONTESTANTS[run["contestant"]][1] == "fp32"}
    if len(losses) < 2:
        return None
    return max(
        abs(a - b) for one, other in itertools.combinations(losses.values(), 2) for a, b in zip(one, other, strict=True)
    )


def figures(steps: Mapping[str, Any], expected: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """One run's figures from what was recorded at each step; refuses a run over other examples than the rest."""
    tokens, times = steps["tokens"], steps["times"]
    if tokens != expected["tokens"] or steps["supervised"] != expected["supervised"]:
        raise BenchError("it did not train on the prepared examples in their order; the comparison would be void")
    if not len(tokens) == len(times) == len(steps["losses"]):
        raise BenchError(f"{len(tokens)} batches, {len(times)} steps and {len(steps['losses'])} losses do not fit")
    seconds = times[-1] - times[0]
    return {
        "tokens_per_second": sum(tokens[1:]) / seconds,
        "seconds": seconds,
        "tokens": sum(tokens[1:]),
        "steps": len(tokens),
        "peak_rss": steps["peak_rss"],
        "train_loss": tail_loss(steps["losses"], steps["supervised"]),
        "losses": steps["losses"],
    }
