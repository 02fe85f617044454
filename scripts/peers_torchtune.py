"""torchtune's LoRA recipe over the examples of scripts/bench_peers.py, run by the interpreter of --torchtune-python.

`tune run lora_finetune_single_device` trains: its model builder, LoRA layers, loss (in one chunk), loop and
checkpoints, with device=cpu. By its configuration it gets from this file what it has no component for: the prepared
token ids, the first adapter weights (its builder draws its own), and a logger that notes when each step ends. In bf16
the recipe keeps the adapter and AdamW's averages in bf16 too; it has no other bf16. torch.compile is off, as in its own
configurations.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peers_adapters import peft_to_torchtune
from peers_common import ADAPTER, BASE, CONTESTANTS, EXAMPLES, Settings, Steps

STEPS = Steps()
ATTENTION = ["q_proj", "k_proj", "v_proj", "output_proj"]


# --- components that the configuration names --------------------------------------------------------------------------


def model(
    folder: str,
    lora_rank: int,
    lora_alpha: float,
    lora_dropout: float,
    lora_attn_modules: Sequence[str],
    apply_lora_to_mlp: bool,
) -> torch.nn.Module:
    """torchtune's Llama with tied embeddings, in the base's sizes, with the shared first adapter weights."""
    from safetensors.torch import load_file
    from torchtune.models.llama3_2._component_builders import lora_llama3_2

    base = json.loads((Path(folder) / BASE / "config.json").read_text("utf-8"))
    built = lora_llama3_2(
        list(lora_attn_modules),
        apply_lora_to_mlp,
        vocab_size=base["vocab_size"],
        num_layers=base["num_hidden_layers"],
        num_heads=base["num_attention_heads"],
        num_kv_heads=base["num_key_value_heads"],
        embed_dim=base["hidden_size"],
        max_seq_len=base["max_position_embeddings"],
        intermediate_dim=base["intermediate_size"],
        norm_eps=base["rms_norm_eps"],
        rope_base=base["rope_theta"],
        scale_factor=1,  # frequencies as they are
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        tie_word_embeddings=base["tie_word_embeddings"],
    )
    first = peft_to_torchtune(load_file(Path(folder) / ADAPTER / "adapter_model.safetensors"), base["head_dim"])
    unknown = built.load_state_dict(first, strict=False).unexpected_keys
    assert not unknown, unknown
    return built


class Padding:
    """All that the recipe asks of a tokenizer when the token ids are there."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id


def examples(tokenizer: Padding, folder: str) -> list[dict[str, list[int]]]:
    """The prepared training examples, as torchtune names their parts."""
    rows = json.loads((Path(folder) / EXAMPLES).read_text("utf-8"))["train"]
    return [{"tokens": row["ids"], "labels": row["labels"]} for row in rows]


def collate(batch: list[dict[str, list[int]]], padding_idx: int, ignore_idx: int) -> dict[str, torch.Tensor]:
    """torchtune's own batch, noted."""
    from torchtune.data import padded_collate_sft

    STEPS.seen([{"ids": row["tokens"], "labels": row["labels"]} for row in batch])
    return padded_collate_sft(batch, padding_idx, ignore_idx)


class StepLog:
    """A logger that notes the end and the loss of each step."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def log_config(self, config: Any) -> None:
        pass

    def log_dict(self, payload: Mapping[str, Any], step: int) -> None:
        STEPS.ended()
        STEPS.losses.append(float(payload["loss"]))

    def close(self) -> None:
        STEPS.write(self.folder)


# --- the run ----------------------------------------------------------------------------------------------------------


def configuration(settings: Settings, precision: str, work: Path, run: Path, pad_id: int) -> dict[str, Any]:
    """The recipe's configuration."""
    return {
        "output_dir": str(run),
        "device": "cpu",
        "dtype": precision,
        "seed": settings.seed,
        "epochs": 1,
        "max_steps_per_epoch": None,
        "batch_size": settings.batch_size,
        "gradient_accumulation_steps": 1,
        "clip_grad_norm": settings.max_grad_norm,
        "compile": False,
        "shuffle": False,
        "resume_from_checkpoint": False,
        "save_adapter_weights_only": True,
        "log_every_n_steps": 1,
        "model": {
            "_component_": "peers_torchtune.model",
            "folder": str(work),
            "lora_rank": settings.rank,
            "lora_alpha": settings.alpha,
            "lora_dropout": settings.dropout,
            "lora_attn_modules": ATTENTION,
            "apply_lora_to_mlp": True,
        },
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "checkpoint_dir": str(work / BASE),
            "checkpoint_files": ["model.safetensors"],
            "model_type": "LLAMA3_2",
            "output_dir": str(run),
        },
        "tokenizer": {"_component_": "peers_torchtune.Padding", "pad_id": pad_id},
        "dataset": {"_component_": "peers_torchtune.examples", "folder": str(work)},
        "collate_fn": "peers_torchtune.collate",
        # Of its 8 chunks each is a part of every row, for which torch copies the head's weights once for each row: on a
        # CPU that took most of the time.
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss", "num_output_chunks": 1},
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": settings.lr, "weight_decay": 0.0, "fused": True},
        "lr_scheduler": {  # no warmup and no part of a wave: constant
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
            "num_warmup_steps": 0,
            "num_cycles": 0.0,
        },
        "metric_logger": {"_component_": "peers_torchtune.StepLog", "folder": str(run)},
    }


def main(words: Sequence[str]) -> None:
    """Arguments: the settings as JSON, the contestant, the run. The working folder is that of the comparison."""
    from torchtune._cli.tune import main as tune

    settings = Settings(**json.loads(words[0]))
    work = Path.cwd()
    run = work / words[2]
    run.mkdir()
    pad_id = json.loads((work / EXAMPLES).read_text("utf-8"))["pad_id"]
    precision = CONTESTANTS[words[1]][1]
    path = run / "recipe.yaml"  # JSON is YAML
    path.write_text(json.dumps(configuration(settings, precision, work, run, pad_id)), "utf-8")
    torch.set_num_threads(settings.threads)
    sys.argv = ["tune", "run", "lora_finetune_single_device", "--config", str(path)]
    try:
        tune()
    except SystemExit as end:  # a recipe leaves with what its main returns, which is None if all went well
        if end.code not in (None, 0):
            raise
    (run / "adapter").mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(run / "epoch_0" / name, run / "adapter" / name)


if __name__ == "__main__":
    import peers_torchtune  # the copy that the recipe finds by name, whose STEPS it fills

    peers_torchtune.main(sys.argv[1:])
