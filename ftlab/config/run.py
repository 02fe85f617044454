"""How a run goes: precision, ranks, tracking, evaluation, checkpoints, the loop's own numbers."""

from __future__ import annotations

from dataclasses import dataclass

from ftlab.config.options import LARGEST_SEED, option

__all__ = [
    "CheckpointConfig",
    "EvaluationConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "TrackingConfig",
    "TrainingConfig",
]


@dataclass
class PrecisionConfig:
    """Dtypes. What trains is always stored in fp32."""

    compute: str = option("fp32", "dtype of the matrix products", choices=("fp32", "bf16", "fp16"))
    frozen: str = option("fp32", "storage dtype of weights that do not train", choices=("fp32", "bf16", "fp16"))
    init_scale: float = option(65536.0, "first loss scale of fp16", above=0)


@dataclass
class ParallelConfig:
    """Where it runs. The number of ranks comes from torchrun."""

    device: str = option("auto", "auto: the GPU if there is one", choices=("auto", "cpu", "cuda"))
    threads: int | None = option(None, "CPU threads a rank; null: cores divided by the ranks of this machine", low=1)
    timeout_seconds: int = option(1800, "a collective that waits longer than this fails", low=1)


# --- tracking, evaluation, checkpoints, training -------------------------------------------------------------------


@dataclass
class TrackingConfig:
    """metrics.jsonl is always written; Weights & Biases mirrors it."""

    mode: str = option("offline", "Weights & Biases", choices=("offline", "online", "disabled"))
    project: str = option("ftlab", "Weights & Biases project")
    entity: str | None = option(None, "Weights & Biases team or user; null: its default")
    tags: list[str] = option(list, "Weights & Biases tags")
    profile: bool = option(False, "profile a few steps: a trace and the heaviest operators in the run folder")
    log_every_steps: int = option(10, "optimizer steps between two lines of training metrics", low=1)


@dataclass
class EvaluationConfig:
    """What is measured, when, and on how much."""

    every_steps: int | None = option(None, "optimizer steps between validations; null: times", low=1)
    times: int = option(4, "validations spread evenly over the run (the last one at its end); 0: none", low=0)
    batch_size: int = option(16, "rows or examples in one forward pass on one rank", low=1)
    generate: bool = option(True, "score greedy generations too (exact match, F1, BLEU, chrF, ROUGE)")
    generate_limit: int | None = option(100, "validation records to generate for; null: all", low=1)
    generate_batch_size: int = option(50, "prompts generated together", low=1)
    max_new_tokens: int = option(64, "longest generation in tokens", low=1)
    test: bool = option(True, "score the test split once, at the end")
    baseline: bool = option(True, "score the untouched model on the same test split, for the before/after table")
    bootstrap: int = option(1000, "resamples behind each 95 % interval", low=100)
    samples: int = option(20, "before/after samples shown in the report", low=0)


@dataclass
class CheckpointConfig:
    """When the state is saved and which state is kept."""

    every_steps: int | None = option(None, "optimizer steps between two checkpoints; null: by minutes alone", low=1)
    every_minutes: float | None = option(10.0, "minutes between two checkpoints; null: by steps alone", above=0)
    keep_last: int = option(2, "newest checkpoints kept", low=1)
    metric: str = option("loss", "validation metric that decides which state is best")
    mode: str = option("auto", "whether that metric should fall or rise", choices=("auto", "min", "max"))
    load_best: bool = option(True, "finish with the best validated state instead of the last one")
    patience: int | None = option(None, "stop after this many validations without a better one; null: never", low=1)


@dataclass
class TrainingConfig:
    """How long, and how."""

    epochs: float | None = option(1.0, "passes over the training rows, unless max_steps is given", above=0)
    max_steps: int | None = option(None, "optimizer steps, whatever epochs says; null: epochs", low=1)
    seed: int = option(0, "seed of initialisation, data order and dropout", low=0, high=LARGEST_SEED)
    activation_checkpointing: bool = option(False, "keep only block inputs and recompute the rest in backward")
    compile: bool = option(False, "torch.compile each decoder block")
    activation_cache_gib: float = option(
        0.0, "memory to keep what enters the lowest layer that trains, over epochs; 0: compute it each time", low=0
    )
    head_chunk: int = option(256, "supervised positions that pass through the LM head at once", low=1)
    max_bad_steps: int = option(5, "steps in a row with a non-finite gradient before the run stops", low=1)
    preflight: bool = option(True, "run the longest batch once before step 1 for peak memory and time")
