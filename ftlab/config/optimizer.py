"""Optimizer and schedule (groups `optimizer` and `schedule`)."""

from __future__ import annotations

from dataclasses import dataclass

from ftlab.config.options import option

__all__ = [
    "AdamWConfig",
    "ConstantConfig",
    "CosineConfig",
    "InverseSqrtConfig",
    "LinearConfig",
    "OptimizerConfig",
    "PolynomialConfig",
    "ScheduleConfig",
    "WSDConfig",
]


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
    state: str = option(
        "fp32", "moments in fp32, or 8bit: one byte each in blocks of 256 (arXiv 2110.02861)", choices=("fp32", "8bit")
    )


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
