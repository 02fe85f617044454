"""The configuration: one dataclass per option, each default in one place.

Every field is made by `option`, which carries its help text and the values it may take; `validate` reads them. The YAML
files under conf/ name these classes in their defaults lists and hold nothing but choices. Nothing here imports Hydra.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any

from ftlab.config.data import (
    DataConfig,
    FilesDataConfig,
    HPODataConfig,
    LabelledDataConfig,
    makes_classifier,
)
from ftlab.config.method import (
    BitFitConfig,
    FreezeConfig,
    FullConfig,
    GradualUnfreezeConfig,
    LinearProbeConfig,
    LoRAConfig,
    MethodConfig,
)
from ftlab.config.model import HeadConfig, ModelConfig, PretrainedConfig, RandomBertConfig, RandomConfig
from ftlab.config.optimizer import (
    AdamWConfig,
    ConstantConfig,
    CosineConfig,
    InverseSqrtConfig,
    LinearConfig,
    OptimizerConfig,
    PolynomialConfig,
    ScheduleConfig,
    WSDConfig,
)
from ftlab.config.options import option
from ftlab.config.regularizer import (
    AverageConfig,
    DropoutConfig,
    EWCConfig,
    L1SPConfig,
    L2Config,
    L2SPConfig,
    LwFConfig,
    RegularizerConfig,
    ReplayConfig,
)
from ftlab.config.run import (
    CheckpointConfig,
    EvaluationConfig,
    ParallelConfig,
    PrecisionConfig,
    TrackingConfig,
    TrainingConfig,
)

__all__ = [
    "AdamWConfig",
    "AverageConfig",
    "BitFitConfig",
    "CheckpointConfig",
    "Config",
    "ConstantConfig",
    "CosineConfig",
    "DataConfig",
    "DropoutConfig",
    "EWCConfig",
    "EvaluationConfig",
    "FilesDataConfig",
    "FreezeConfig",
    "FullConfig",
    "GradualUnfreezeConfig",
    "HPODataConfig",
    "HeadConfig",
    "InverseSqrtConfig",
    "L1SPConfig",
    "L2Config",
    "L2SPConfig",
    "LabelledDataConfig",
    "LinearConfig",
    "LinearProbeConfig",
    "LoRAConfig",
    "LwFConfig",
    "MethodConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PolynomialConfig",
    "PrecisionConfig",
    "PretrainedConfig",
    "RandomBertConfig",
    "RandomConfig",
    "RegularizerConfig",
    "ReplayConfig",
    "ScheduleConfig",
    "TrackingConfig",
    "TrainingConfig",
    "WSDConfig",
    "from_plain",
    "makes_classifier",
    "option_classes",
]


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
    head: HeadConfig = option(HeadConfig, "the head of a classifier")
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
        plain = {key: value for key, value in plain.items() if key != "kind" or key in known}
        if unknown := sorted(plain.keys() - known):
            raise KeyError(f"{cls.__name__} has no {unknown[0]}")
        nested = {key: hints[key] for key in plain if dataclasses.is_dataclass(hints[key])}
        chosen = {key: globals()[classes.get(key, hint.__name__)] for key, hint in nested.items()}
        return cls(**{key: build(chosen[key], value) if key in chosen else value for key, value in plain.items()})

    config: Config = build(Config, values)
    return config
