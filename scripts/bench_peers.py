#!/usr/bin/env python3
"""The same fine-tuning by Hugging Face's Trainer with PEFT and by ftlab, side by side on this machine's CPU.

    python scripts/bench_peers.py --repeats 3 --out docs/results/peers.json
    python scripts/bench_peers.py --dropout 0 --only hf-fp32 ftlab-fp32     do both learn the same?
    python scripts/bench_peers.py --tiny --examples 24                      no download; its numbers mean nothing

Alike for all: base weights and first adapter weights (files that ftlab wrote and both read), token ids and labels,
order, examples in a step, rank, alpha, dropout rate, target layers, AdamW and its constants, a constant learning rate,
clipping, seed, threads. Differing: all else that the two do with them, which is what is compared.

- `hf-fp32`, `hf-bf16`, `hf-bf16-weights`: Trainer, batches padded on the right to their longest example; all in fp32,
  or bf16=True (autocast) over base weights in fp32 or in bf16. PEFT keeps the adapter in fp32 in each, its default.
- `ftlab-fp32`, `ftlab-bf16`: `python -m ftlab.train` without packing. bf16 is autocast over frozen weights in bf16.

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
import importlib.util
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# This process must stay small and so imports neither torch nor the frameworks: on Linux a child's largest resident set
# starts from its parent's at the moment of the start.
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ftlab.files import atomic_write  # noqa: E402

__all__ = ["CONTESTANTS", "Settings", "agreement", "main", "order", "read_ftlab", "summarize", "table", "tail_loss"]

PACKAGES = ("transformers", "peft", "accelerate")
VERSIONS = ("torch", "numpy", "safetensors", "tokenizers", *PACKAGES)
CONTESTANTS = {  # name -> framework, what is computed in, what the frozen weights are stored in
    "hf-fp32": ("hf", "fp32", "fp32"),
    "hf-bf16": ("hf", "bf16", "fp32"),
    "hf-bf16-weights": ("hf", "bf16", "bf16"),
    "ftlab-fp32": ("ftlab", "fp32", "fp32"),
    "ftlab-bf16": ("ftlab", "bf16", "bf16"),
}
BASE, ADAPTER, EXAMPLES, RECORDS, FACTS = "base", "adapter", "examples.json", "train.jsonl", "facts.json"
IGNORE = -100
TOLERANCE = 1e-3  # nats; how far two fp32 runs of the same steps may drift apart without dropout


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


# --- what the figures mean -------------------------------------------------------------------------------------------


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

    speed and memory are divided by the HF contestants' highest speed and lowest peak; the held-out loss is subtracted.
    """
    measured = ("tokens_per_second", "peak_rss", "train_loss", "held_out_loss")
    rows: dict[str, dict[str, float | None]] = {}
    medians: dict[str, dict[str, float]] = {}
    for name in CONTESTANTS:
        mine = [run for run in runs if run["contestant"] == name]
        if mine:
            medians[name] = {key: statistics.median(run[key] for run in mine) for key in measured}
    peers = [values for name, values in medians.items() if CONTESTANTS[name][0] == "hf"]
    for name, values in medians.items():
        rows[name] = {**values, "speed_ratio": None, "memory_ratio": None, "held_out_difference": None}
        if peers:
            rows[name] |= {
                "speed_ratio": values["tokens_per_second"] / max(peer["tokens_per_second"] for peer in peers),
                "memory_ratio": values["peak_rss"] / min(peer["peak_rss"] for peer in peers),
                "held_out_difference": values["held_out_loss"] - min(peer["held_out_loss"] for peer in peers),
            }
    return rows


def table(summary: Mapping[str, Mapping[str, float | None]]) -> str:
    """The medians as text, a line a contestant. `x HF`: divided by the best HF setting; `- HF`: minus it."""
    heads = ("contestant", "tokens/s", "x HF", "peak GiB", "x HF", "train loss", "held-out", "- HF")

    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    lines = [heads]
    for name, row in summary.items():
        peak = row["peak_rss"]
        cells = (
            shown(row["tokens_per_second"], ".1f"),
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
    """The largest difference between the two frameworks' fp32 losses of one step; None unless both ran."""
    losses: dict[str, list[float]] = {run["contestant"]: run["losses"] for run in runs}
    if not {"hf-fp32", "ftlab-fp32"} <= losses.keys():
        return None
    return max(abs(a - b) for a, b in zip(losses["hf-fp32"], losses["ftlab-fp32"], strict=True))


def read_ftlab(run_dir: Path) -> dict[str, Any]:
    """A run folder of ftlab in the same terms as `train_hf`: end of each step, its loss and tokens, peak memory."""
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text("utf-8").splitlines()]
    lines = [line for line in metrics if line["split"] == "train"]

    def each_step(key: str) -> list[int]:
        totals = [0, *(line[key] for line in lines)]
        return [after - before for before, after in itertools.pairwise(totals)]

    return {
        "times": [line["time"] for line in lines],
        "losses": [line["loss"] for line in lines],
        "tokens": each_step("tokens"),
        "supervised": each_step("supervised_tokens"),
        "peak_rss": lines[-1]["memory_bytes"],
    }


def figures(steps: Mapping[str, Any], expected: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """One run's figures from what was recorded at each step; refuses a run over other examples than the rest."""
    tokens, times = steps["tokens"], steps["times"]
    if tokens != expected["tokens"] or steps["supervised"] != expected["supervised"]:
        raise BenchError("it did not train on the prepared examples in their order; the comparison would be void")
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


# --- the contestants, each in its own process -------------------------------------------------------------------------


def ftlab_overrides(settings: Settings, precision: str) -> list[str]:
    """The arguments of `python -m ftlab.train`, which runs in the working folder."""
    return [
        *("model=smollm2_135m", "model.name=base", f"model.location={BASE}", f"precision={precision}"),
        *("data=files", f"data.train={RECORDS}", "data.validation_fraction=0", "data.test_fraction=0"),
        *("data.template=model", f"data.max_length={settings.max_length}", "data.packing=false", "data.shuffle=false"),
        *(f"data.batch_size={settings.batch_size}", f"data.micro_batch_size={settings.batch_size}"),
        *("method=lora", f"method.rank={settings.rank}", f"method.alpha={settings.alpha}"),
        *(f"method.dropout={settings.dropout}", f"optimizer.lr={settings.lr}", "optimizer.weight_decay=0"),
        *(f"optimizer.max_grad_norm={settings.max_grad_norm}", "schedule=constant", "schedule.warmup_steps=0"),
        *("parallel.device=cpu", f"parallel.threads={settings.threads}", f"training.seed={settings.seed}"),
        *("tracking=disabled", "tracking.log_every_steps=1", "evaluation=none", "training.epochs=1"),
    ]


def prepare(work: Path, settings: Settings) -> None:
    """Write base, first adapter, examples (as text for ftlab, as ids for HF) and the facts of machine and data."""
    import importlib.metadata
    import platform

    import torch

    from ftlab.build import build_data, build_model, build_tokenizer
    from ftlab.compose import compose
    from ftlab.methods import make_method
    from ftlab.models.checkpoint import save_safetensors
    from ftlab.training.parallel import start_ranks
    from ftlab.training.record import describe_machine

    source = ["model=tiny_random", "data=capitals"] if settings.tiny else ["model=smollm2_135m", "data=hpo_define"]
    limits = [f"data.limit_train={settings.examples}", f"data.limit_validation={settings.held_out}"]
    shared = [override for override in ftlab_overrides(settings, "fp32") if override.startswith("parallel.")]
    config, _ = compose([*source, *limits, *shared, "data.template=model", f"data.max_length={settings.max_length}"])
    tokenizer = build_tokenizer(config)
    data = build_data(config, tokenizer)
    if (len(data.train), len(data.validation)) != (settings.examples, settings.held_out):
        raise BenchError(
            f"{data.source.name} has {len(data.train)} training and {len(data.validation)} held-out examples"
        )
    rows = [{"id": r.id, "messages": [asdict(message) for message in r.messages]} for r in data.splits.train]
    with start_ranks(config.parallel) as ranks:
        model = build_model(config, tokenizer, ranks, dtype=torch.float32)
        save_safetensors(model, work / BASE)
        tokenizer.save(work / BASE)
        atomic_write(work / RECORDS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        training, _ = compose(ftlab_overrides(settings, "fp32"))  # its files must exist
        method = make_method(training.method, seed=training.training.seed)
        method.apply(model)
        method.save(model, work / ADAPTER, BASE)
        machine = describe_machine(ranks.device, ranks.world)
    sides = {"train": data.train, "held_out": data.validation}
    content = {
        side: [{"ids": list(example.token_ids), "labels": labels_of(example)} for example in examples]
        for side, examples in sides.items()
    }
    atomic_write(work / EXAMPLES, json.dumps({**content, "pad_id": tokenizer.pad_id}))
    facts = {
        "machine": machine,
        "packages": {"python": platform.python_version(), **{n: importlib.metadata.version(n) for n in VERSIONS}},
        "data": data.source.as_dict(),
        "model": config.model.name,
        "steps": step_sizes(content["train"], settings.batch_size),
    }
    atomic_write(work / FACTS, json.dumps(facts))


def labels_of(example: Any) -> list[int]:
    """Labels by position, unshifted as transformers wants them: the id where it is learnt, else -100."""
    return [id if learnt else IGNORE for id, learnt in zip(example.token_ids, example.supervised, strict=True)]


def step_sizes(examples: Sequence[Mapping[str, Sequence[int]]], batch_size: int) -> dict[str, list[int]]:
    """Real and supervised tokens of each step in order. A row's first token is never predicted."""
    parts = [examples[start : start + batch_size] for start in range(0, len(examples), batch_size)]
    return {
        "tokens": [sum(len(row["ids"]) for row in part) for part in parts],
        "supervised": [sum(label != IGNORE for row in part for label in row["labels"][1:]) for part in parts],
    }


def padded(rows: Sequence[Mapping[str, Sequence[int]]], pad_id: int) -> dict[str, Any]:
    """A batch as transformers takes it, each int64 [B, T], padded on the right to the longest row."""
    import torch

    longest = max(len(row["ids"]) for row in rows)

    def filled(values: Sequence[int], filler: int) -> list[int]:
        return [*values, *[filler] * (longest - len(values))]

    return {
        "input_ids": torch.tensor([filled(row["ids"], pad_id) for row in rows]),
        "labels": torch.tensor([filled(row["labels"], IGNORE) for row in rows]),
        "attention_mask": torch.tensor([filled([1] * len(row["ids"]), 0) for row in rows]),
    }


def train_hf(work: Path, settings: Settings, name: str, run: str) -> None:
    """Trainer and PEFT over the prepared examples; writes its adapter and what happened at each step."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from ftlab.training.record import peak_rss_bytes

    torch.set_num_threads(settings.threads)
    _, compute, frozen = CONTESTANTS[name]
    content = json.loads((work / EXAMPLES).read_text("utf-8"))
    steps: dict[str, Any] = {"times": [], "losses": [], "tokens": [], "supervised": []}

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
        for key, sizes in step_sizes(rows, len(rows)).items():
            steps[key] += sizes
        return padded(rows, content["pad_id"])

    class Watch(TrainerCallback):
        def on_step_end(self, *arguments: Any, **named: Any) -> None:
            steps["times"].append(time.time())
            steps["peak_rss"] = peak_rss_bytes()

        def on_log(self, *arguments: Any, **named: Any) -> None:
            if "loss" in named["logs"]:  # the last call has the run's totals instead
                steps["losses"].append(named["logs"]["loss"])

    dtype = torch.bfloat16 if frozen == "bf16" else torch.float32
    base = AutoModelForCausalLM.from_pretrained(work / BASE, dtype=dtype)
    model = PeftModel.from_pretrained(
        base, work / ADAPTER, is_trainable=True
    )  # autocast_adapter_dtype: adapter in fp32
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    arguments = TrainingArguments(
        output_dir=str(work / run),
        per_device_train_batch_size=settings.batch_size,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        learning_rate=settings.lr,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        use_cpu=True,
        bf16=compute == "bf16",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=content["train"], callbacks=[Watch()])
    trainer.train()
    model.save_pretrained(str(work / run / "adapter"))
    atomic_write(work / run / "steps.json", json.dumps(steps))


def score(work: Path, settings: Settings, runs: Sequence[str]) -> None:
    """The held-out loss of each run's adapter on the fp32 base: one evaluator for all, and neither framework's own."""
    import torch
    from peft import PeftModel
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(settings.threads)
    content = json.loads((work / EXAMPLES).read_text("utf-8"))
    held_out = content["held_out"]
    losses = {}
    for run in runs:
        base = AutoModelForCausalLM.from_pretrained(work / BASE, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, work / run / "adapter").eval()
        nats, count = 0.0, 0
        for start in range(0, len(held_out), settings.batch_size):
            batch = padded(held_out[start : start + settings.batch_size], content["pad_id"])
            targets = batch.pop("labels")[:, 1:].flatten()
            with torch.inference_mode():
                logits = model(**batch).logits[:, :-1].flatten(0, 1)
                nats += float(cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE))
            count += int((targets != IGNORE).sum())
        losses[run] = {"held_out_loss": nats / count, "held_out_tokens": count}
    atomic_write(work / "scores.json", json.dumps(losses))


# --- the parent ------------------------------------------------------------------------------------------------------


def start(command: Sequence[str], work: Path, settings: Settings, what: str) -> None:
    """Run a child in the working folder; BenchError with its last words if it fails."""
    log = work / f"{what}.log"
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(settings.threads),
        "PYTHONPATH": str(ROOT),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
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


def play_role(role: str, settings: Settings, words: Sequence[str]) -> None:
    """What a child does; the working folder is the current one."""
    work = Path.cwd()
    if role == "prepare":
        prepare(work, settings)
    elif role == "hf":
        train_hf(work, settings, *words)
    else:
        score(work, settings, words)


def measure(work: Path, settings: Settings, names: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """Every contestant in every repeat, then the held-out losses of all."""
    expected = json.loads((work / FACTS).read_text("utf-8"))["steps"]
    runs: list[dict[str, Any]] = []
    for repeat in range(repeats):
        for name in order(names, repeat):
            run = f"{name}-{repeat}"
            load = os.getloadavg()[0]
            framework, compute, _ = CONTESTANTS[name]
            if framework == "hf":
                start_role("hf", work, settings, name, run)
                steps = json.loads((work / run / "steps.json").read_text("utf-8"))
            else:
                overrides = [*ftlab_overrides(settings, compute), f"run_dir={run}"]
                start([sys.executable, "-m", "ftlab.train", *overrides], work, settings, run)
                steps = read_ftlab(work / run)
            try:
                found = figures(steps, expected)
            except BenchError as error:
                raise BenchError(f"{run}: {error}") from None
            runs.append({"contestant": name, "repeat": repeat, "load_before": load, **found})
            print(f"{run}: {found['tokens_per_second']:.1f} tokens/s", file=sys.stderr, flush=True)
    start_role("score", work, settings, *(f"{run['contestant']}-{run['repeat']}" for run in runs))
    scores = json.loads((work / "scores.json").read_text("utf-8"))
    return [{**run, **scores[f"{run['contestant']}-{run['repeat']}"]} for run in runs]


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
        "device": facts["machine"],
        "model": facts["model"],
        "data": facts["data"],
        "settings": asdict(settings),
        "contestants": {
            name: dict(zip(("framework", "compute", "frozen"), CONTESTANTS[name], strict=True))
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
    parser.add_argument("--only", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS), metavar="NAME")
    parser.add_argument("--tiny", action="store_true", help="two random layers and a table of capitals: no download")
    parser.add_argument("--out", type=Path, help="write the JSON record here")
    chosen = parser.parse_args(argv)
    least = 2 * defaults.batch_size
    if chosen.examples < least:
        parser.error(f"--examples {chosen.examples}: at least {least}, since step 1 is warm-up")
    if min(chosen.held_out, chosen.repeats, chosen.threads) < 1 or not 0 <= chosen.dropout < 1:
        parser.error("--held-out, --repeats and --threads are at least 1, --dropout is at least 0 and below 1")
    if chosen.out is not None and not chosen.out.resolve().parent.is_dir():
        parser.error(f"--out {chosen.out}: there is no such folder")
    return chosen


def compare(chosen: argparse.Namespace) -> int:
    """Prepare, run, print and record; 1 if two runs that must agree do not."""
    settings = Settings(
        examples=chosen.examples,
        held_out=chosen.held_out,
        dropout=chosen.dropout,
        threads=chosen.threads,
        tiny=chosen.tiny,
    )
    names = [name for name in CONTESTANTS if name in chosen.only]
    started = beginning()
    with tempfile.TemporaryDirectory(prefix="bench-peers-") as folder:
        work = Path(folder)
        start_role("prepare", work, settings)
        runs = measure(work, settings, names, chosen.repeats)
        facts = json.loads((work / FACTS).read_text("utf-8"))
    content = record(settings, facts, runs, started)
    machine = facts["machine"]
    print(f"{machine['name']}, {settings.threads} threads; medians of {chosen.repeats}; {settings.examples} examples")
    print(table(content["summary"]))
    if chosen.out is not None:
        atomic_write(chosen.out, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    difference = content["largest_fp32_loss_difference"]
    if difference is None:
        return 0
    print(f"without dropout the fp32 training losses of hf and ftlab differ by at most {difference:.1e} in any step")
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
