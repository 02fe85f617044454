"""What holds it back (group `regularizer`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ftlab.config.options import option

__all__ = [
    "AverageConfig",
    "DropoutConfig",
    "EWCConfig",
    "L1SPConfig",
    "L2Config",
    "L2SPConfig",
    "LwFConfig",
    "RegularizerConfig",
    "ReplayConfig",
]


@dataclass
class L2SPConfig:
    """strength * ||theta - theta0||^2, the pull to the pretrained weights (arXiv 1802.01483)."""

    strength: float = option(0.0, "lambda; 0 is bitwise the run without it", low=0)
    beta: float = option(0.0, "the same for ||theta||^2 of what has no pretrained value (a new head)", low=0)
    mode: str = option(
        "coupled", "in the loss, or in the optimizer's step beside weight decay", choices=("coupled", "decoupled")
    )
    rules: list[str] = option(
        list, "PATTERN:FACTOR of the strength, by parts of parameter names; the first that matches decides"
    )
    anchor: str = option(
        "fp32",
        "how theta0 is kept; cpu: fp32 in main memory; mmap: in files, read in each step",
        choices=("fp32", "bf16", "cpu", "mmap"),
    )


@dataclass
class L1SPConfig:
    """strength * ||theta - theta0||_1, under which many weights stay near where they were (arXiv 1802.01483)."""

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
class ReplayConfig:
    """Examples of earlier runs' training data among the new ones (arXiv 1902.10486)."""

    share: float = option(
        0.0, "share of an epoch's examples that are replayed; 0 is bitwise the run without it", low=0, below=1
    )
    source: list[str] = option(list, "earlier runs whose training data are drawn from, without replacement")


@dataclass
class LwFConfig:
    """strength * T^2 * KL(old || new) of what the model and its start say of a token or text (arXiv 1606.09282)."""

    strength: float = option(0.0, "lambda; 0 is bitwise the run without it", low=0)
    temperature: float = option(2.0, "T, by which the logits of both are divided", above=0)


@dataclass
class DropoutConfig:
    """Probabilities of dropout inside the model, by place (arXiv 1207.0580); the adapter's own is method.dropout."""

    embedding: float = option(0.0, "on the token embeddings", low=0, below=1)
    attention: float = option(0.0, "on the attention probabilities; leaves the fused attention", low=0, below=1)
    residual: float = option(0.0, "on what attention and MLP add, before the sum", low=0, below=1)
    hidden: float = option(0.0, "on the activations inside the MLP", low=0, below=1)
    head: float = option(0.0, "on what enters the LM head, or a classifier's", low=0, below=1)


@dataclass
class AverageConfig:
    """An average of the weights over training, which takes the place of the last ones."""

    kind: str = option("none", "none, ema (exponential, by decay) or swa (plain mean)", choices=("none", "ema", "swa"))
    decay: float = option(0.999, "of kind=ema: the share of the average that each sample leaves", low=0, below=1)
    start: float = option(0.0, "share of the run's steps before the first sample", low=0, below=1)
    every: int = option(1, "updates of the weights from one sample to the next", low=1)


@dataclass
class RegularizerConfig:
    """What holds the weights back, or disturbs the model while it trains; zero is bitwise the run without it."""

    l2_sp: L2SPConfig = option(L2SPConfig, "pull to the pretrained weights")
    l1_sp: L1SPConfig = option(L1SPConfig, "pull of equal force to the pretrained weights")
    l2: L2Config = option(L2Config, "pull to zero")
    ewc: EWCConfig = option(EWCConfig, "pull to the weights of earlier tasks")
    lwf: LwFConfig = option(LwFConfig, "pull to what the model said of the new data when training began")
    replay: ReplayConfig = option(ReplayConfig, "examples of earlier runs among the new ones")
    label_smoothing: float = option(
        0.0, "share of each target spread evenly over the vocabulary, in training only", low=0, below=1
    )
    dropout: DropoutConfig = option(DropoutConfig, "dropout inside the model, by place")
    stochastic_depth: float = option(
        0.0,
        "probability that the last block is left out of a micro-batch; falls linearly towards the first",
        low=0,
        below=1,
    )
    neftune: float = option(0.0, "alpha of the uniform noise on embeddings, alpha / sqrt(L d) at most", low=0)
    r_drop: float = option(
        0.0, "strength of the agreement of two passes under two dropout masks; doubles the forward work", low=0
    )
    mixout: float = option(0.0, "probability that a weight is the pretrained one in a forward pass", low=0, below=1)
    sam: float = option(
        0.0, "rho of sharpness-aware minimization: how far the weights move before the gradient is taken", low=0
    )
    average: AverageConfig = option(AverageConfig, "an average of the weights as the result")
    extra: dict[str, Any] = option(dict, "your own penalties: name -> {_target_: module.Class, ...arguments}")
