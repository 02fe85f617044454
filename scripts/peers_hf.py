"""Trainer and PEFT in scripts/bench_peers.py: their run, and the held-out loss of everyone's adapter by PEFT."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peers_common import ADAPTER, BASE, CONTESTANTS, EXAMPLES, IGNORE, Settings, Steps

from ftlab.files import atomic_write

__all__ = ["padded", "score", "train_hf"]


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

    torch.set_num_threads(settings.threads)
    _, compute, frozen, _ = CONTESTANTS[name]
    content = json.loads((work / EXAMPLES).read_text("utf-8"))
    steps = Steps()

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
        steps.seen(rows)
        return padded(rows, content["pad_id"])

    class Watch(TrainerCallback):
        def on_step_end(self, *arguments: Any, **named: Any) -> None:
            steps.ended()

        def on_log(self, *arguments: Any, **named: Any) -> None:
            if "loss" in named["logs"]:  # the last call has the run's totals instead
                steps.losses.append(named["logs"]["loss"])

    dtype = torch.bfloat16 if frozen == "bf16" else torch.float32
    base = AutoModelForCausalLM.from_pretrained(work / BASE, dtype=dtype)
    # autocast_adapter_dtype, on unless told otherwise, keeps the adapter in fp32.
    model = PeftModel.from_pretrained(base, work / ADAPTER, is_trainable=True)
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
    steps.write(work / run)


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
