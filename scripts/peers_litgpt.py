"""LitGPT's LoRA recipe over the examples of scripts/bench_peers.py, run by the interpreter of --litgpt-python.

`litgpt finetune_lora` trains: its model, LoRA layers, chunked loss and loop, in 32-true, bf16-mixed (`litgpt-bf16`) or
bf16-true (`litgpt-bf16-weights`, where the adapter and AdamW's averages are in bf16 too). The checkpoint it starts from
is converted by its own function and holds the first adapter weights as well. What its recipe has no option for is given
from outside: a constant rate takes the place of its cosine, and clipping goes before the update of torch's AdamW.
"""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from litgpt.data import DataModule, get_sft_collate_fn
from litgpt.prompts import Default
from peers_adapters import litgpt_to_peft, peft_to_litgpt
from peers_common import ADAPTER, BASE, CONTESTANTS, EXAMPLES, IGNORE, Settings, Steps
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

STEPS = Steps()
CHECKPOINT = "litgpt"
WEIGHTS = "adapter_model.safetensors"
PRECISIONS = {("fp32", "fp32"): "32-true", ("bf16", "fp32"): "bf16-mixed", ("bf16", "bf16"): "bf16-true"}


# --- what the recipe's configuration names ---------------------------------------------------------------------------


class Prepared(DataModule):
    """The prepared training examples in their order."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        content = json.loads((Path(folder) / EXAMPLES).read_text("utf-8"))
        self.rows = [
            {
                "input_ids": torch.tensor(row["ids"]),
                "labels": torch.tensor(row["labels"]),
                "token_counts": {"raw": len(row["ids"]), "raw_plus_prompt_template": len(row["ids"])},
            }
            for row in content["train"]
        ]
        self.pad_id = content["pad_id"]
        self.prompt_style = Default()
        self.batch_size = 1

    def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None) -> None:
        self.batch_size = batch_size

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """LitGPT's own batch, noted."""
        STEPS.seen([{"ids": row["input_ids"].tolist(), "labels": row["labels"].tolist()} for row in rows])
        return self.padded(rows)

    def padded(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return get_sft_collate_fn(pad_id=self.pad_id, ignore_index=IGNORE)(rows)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.rows, batch_size=self.batch_size, collate_fn=self.collate)

    def val_dataloader(self) -> DataLoader:
        """The recipe insists on a look at some before the first step; one row is the least."""
        return DataLoader(self.rows[:1], batch_size=1, collate_fn=self.padded)


class ClippedAdamW(torch.optim.AdamW):
    """AdamW after clipping, which notes when each update is done."""

    def __init__(self, params: Any, max_norm: float, **more: Any) -> None:
        super().__init__(params, **more)
        self.max_norm = max_norm

    def step(self, closure: Any = None) -> Any:
        trained = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        torch.nn.utils.clip_grad_norm_(trained, self.max_norm)
        result = super().step(closure)
        STEPS.ended()
        return result


def constant(optimizer: torch.optim.Optimizer, warmup_steps: int, max_steps: int) -> Any:
    """Stands in for the recipe's schedule."""
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


# --- the checkpoint ---------------------------------------------------------------------------------------------------


def convert(work: Path) -> None:
    """The base and the first adapter as a checkpoint of LitGPT's."""
    import yaml
    from litgpt.config import Config
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama

    base = json.loads((work / BASE / "config.json").read_text("utf-8"))
    fields = {
        "name": work.name,
        "block_size": base["max_position_embeddings"],
        "vocab_size": base["vocab_size"],
        "padded_vocab_size": base["vocab_size"],
        "n_layer": base["num_hidden_layers"],
        "n_head": base["num_attention_heads"],
        "n_query_groups": base["num_key_value_heads"],
        "n_embd": base["hidden_size"],
        "head_size": base["head_dim"],
        "intermediate_size": base["intermediate_size"],
        "norm_eps": base["rms_norm_eps"],
        "rope_base": int(base["rope_theta"]),
        "rotary_percentage": 1.0,
        "parallel_residual": False,
        "bias": False,
        "norm_class_name": "RMSNorm",
        "mlp_class_name": "LLaMAMLP",
    }
    state: dict[str, Any] = {}
    copy_weights_hf_llama(Config(**fields), {}, state, load_file(work / BASE / "model.safetensors"))
    state |= peft_to_litgpt(load_file(work / ADAPTER / WEIGHTS))
    folder = work / CHECKPOINT
    folder.mkdir()
    torch.save(state, folder / "lit_model.pth")
    (folder / "model_config.yaml").write_text(yaml.safe_dump(fields), "utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(work / BASE / name, folder / name)


# --- the run ----------------------------------------------------------------------------------------------------------


def configuration(settings: Settings, precision: str, work: Path, run: Path) -> dict[str, Any]:
    """The recipe's arguments. max_steps ends it before the text that it generates at the end of its epochs."""
    never = 1 << 30
    steps = -(-settings.examples // settings.batch_size)
    layers = ("query", "key", "value", "projection", "mlp")
    return {
        "checkpoint_dir": str(work / CHECKPOINT),
        "out_dir": str(run),
        "precision": precision,
        "devices": 1,
        "lora_r": settings.rank,
        "lora_alpha": int(settings.alpha),
        "lora_dropout": settings.dropout,
        **{f"lora_{layer}": True for layer in layers},
        "data": {"class_path": "peers_litgpt.Prepared", "init_args": {"folder": str(work)}},
        "train": {
            "save_interval": None,
            "log_interval": 1,
            "global_batch_size": settings.batch_size,
            "micro_batch_size": settings.batch_size,
            "lr_warmup_steps": 0,
            "epochs": 1,
            "max_steps": steps,
        },
        "eval": {"interval": never, "max_new_tokens": 1, "max_iters": 1, "final_validation": False},
        "optimizer": {
            "class_path": "peers_litgpt.ClippedAdamW",
            "init_args": {
                "max_norm": settings.max_grad_norm,
                "lr": settings.lr,
                "weight_decay": 0.0,
                "fused": True,
            },
        },
        "logger_name": "csv",
        "seed": settings.seed,
    }


def train(work: Path, settings: Settings, name: str, run: Path) -> None:
    """The recipe's run, and its adapter in PEFT's layout."""
    import litgpt.finetune.lora as recipe
    from litgpt.__main__ import main as litgpt

    run.mkdir()
    _, compute, frozen, _ = CONTESTANTS[name]
    path = run / "recipe.yaml"  # JSON is YAML
    path.write_text(json.dumps(configuration(settings, PRECISIONS[compute, frozen], work, run)), "utf-8")
    recipe.get_lr_scheduler = constant
    torch.set_num_threads(settings.threads)
    sys.argv = ["litgpt", "finetune_lora", "--config", str(path)]
    litgpt()
    (log,) = run.glob("logs/csv/*/metrics.csv")
    with log.open(newline="") as lines:
        STEPS.losses = [float(line["loss"]) for line in csv.DictReader(lines) if line["loss"]]
    STEPS.write(run)
    first = load_file(work / ADAPTER / WEIGHTS)
    trained = torch.load(run / "final" / "lit_model.pth.lora")["model"]
    (run / "adapter").mkdir()
    save_file(litgpt_to_peft(trained, first), run / "adapter" / WEIGHTS)
    shutil.copy(work / ADAPTER / "adapter_config.json", run / "adapter" / "adapter_config.json")


def main(words: Sequence[str]) -> None:
    """Arguments: the settings as JSON, the contestant, the run. The working folder is that of the comparison."""
    work = Path.cwd()
    if words[1:] == ["prepare"]:
        convert(work)
    else:
        train(work, Settings(**json.loads(words[0])), words[1], work / words[2])


if __name__ == "__main__":
    import peers_litgpt  # the copy that the recipe finds by name, whose STEPS it fills

    peers_litgpt.main(sys.argv[1:])
