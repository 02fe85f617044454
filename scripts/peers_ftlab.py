"""ftlab's part of scripts/bench_peers.py: what all contestants start from, its own run, and the reading of that run."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peers_common import ADAPTER, BASE, EXAMPLES, FACTS, IGNORE, PACKAGES, RECORDS, BenchError, Settings, step_sizes

from ftlab.files import atomic_write

__all__ = ["FTLAB_OWN", "ftlab_overrides", "own_overrides", "prepare", "read_ftlab"]

# Options of ftlab alone, for the contestants and not for what all start from: how it computes these examples fastest.
# Sharing the prefix changes nothing but that the examples of a step see it through one dropout mask.
FTLAB_OWN: tuple[str, ...] = ("data.share_prefix=true",)
VERSIONS = ("torch", "numpy", "safetensors", "tokenizers", *PACKAGES)


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


def own_overrides(settings: Settings, precision: str, run: str) -> list[str]:
    """The arguments of a contestant's run."""
    return [*ftlab_overrides(settings, precision), *FTLAB_OWN, f"run_dir={run}"]


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


def read_ftlab(run_dir: Path) -> dict[str, Any]:
    """A run folder of ftlab in the same terms as `Steps`: end of each step, its loss and tokens, peak memory."""
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
