"""Learning-rate schedules: pure functions of the optimizer step.

The rate at step t (t = 0 is the first) is lr * factor(t). With w warmup steps and T steps in all:

    warmup        factor(t) = (t + 1) / w                for t < w, so the first rate is lr / w and step w - 1 has lr
    afterwards    factor(t) = f + (1 - f) * shape(u),    u = (t - p) / (T - 1 - p),  p = max(w - 1, 0)

where p is the step of the peak, u runs from 0 at the peak to 1 at the last step, shape falls from 1 to 0 and
f = final_factor. The peak is exactly 1 and the last factor exactly f. A run of a single step has factor 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ftlab.config import (
    ConstantConfig,
    CosineConfig,
    InverseSqrtConfig,
    LinearConfig,
    PolynomialConfig,
    ScheduleConfig,
    WSDConfig,
)
from ftlab.errors import ConfigError

__all__ = ["make_schedule", "warmup_steps"]


def make_schedule(config: ScheduleConfig, total_steps: int) -> Callable[[int], float]:
    """The factor of the learning rate by step; steps past the end keep the last factor.

    Errors: ConfigError if the warmup fills the whole run, or meets the decay of `wsd`.
    """
    if total_steps < 1:
        raise ConfigError(f"a run needs at least one optimizer step, not {total_steps}")
    warmup = warmup_steps(config, total_steps)
    after = _after_warmup(config, warmup, total_steps)

    def factor(step: int) -> float:
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        step = min(step, total_steps - 1)
        return (step + 1) / warmup if step < warmup else after(step)

    return factor


def warmup_steps(config: ScheduleConfig, total_steps: int) -> int:
    """Optimizer steps of warmup: warmup_steps, or warmup_fraction of all steps rounded down."""
    if config.warmup_steps is not None:
        key, steps = "warmup_steps", config.warmup_steps
    else:
        key, steps = "warmup_fraction", math.floor(config.warmup_fraction * total_steps + 1e-9)
    if steps >= total_steps:
        raise ConfigError(
            f"schedule.{key}: a warmup of {steps} steps leaves nothing of a run of {total_steps}; make it shorter"
        )
    return steps


def _after_warmup(config: ScheduleConfig, warmup: int, total_steps: int) -> Callable[[int], float]:
    """The factor at the steps from `warmup` on."""
    peak, last = max(warmup - 1, 0), total_steps - 1

    def progress(step: int) -> float:
        return (step - peak) / (last - peak) if last > peak else 0.0

    if isinstance(config, ConstantConfig):
        return lambda step: 1.0
    if isinstance(config, LinearConfig):
        return lambda step: _between(config.final_factor, 1 - progress(step))
    if isinstance(config, CosineConfig):
        return lambda step: _between(config.final_factor, 0.5 * (1 + math.cos(math.pi * progress(step))))
    if isinstance(config, PolynomialConfig):
        return lambda step: _between(config.final_factor, (1 - progress(step)) ** config.power)
    if isinstance(config, InverseSqrtConfig):
        return lambda step: math.sqrt(max(warmup, 1) / (step + 1))
    if isinstance(config, WSDConfig):
        return _stable_then_decay(config, peak, last)
    raise ConfigError("schedule: choose an option, for example schedule=cosine")


def _stable_then_decay(config: WSDConfig, peak: int, last: int) -> Callable[[int], float]:
    """1 up to the decay, then a straight line to final_factor at the last step; no decay if its fraction is 0."""
    decay = min(math.ceil(config.decay_fraction * (last + 1) - 1e-9), last)
    if decay == 0:
        return lambda step: 1.0
    start = last - decay  # the last step at factor 1
    if start < peak:
        raise ConfigError(
            f"schedule.decay_fraction: {decay} steps of decay and {peak + 1} of warmup do not fit into a run of "
            f"{last + 1}; make one of them shorter"
        )
    return lambda step: _between(config.final_factor, 1 - max(step - start, 0) / decay)


def _between(final: float, share: float) -> float:
    """`final` at share 0 and 1 at share 1, both exactly."""
    return share + (1 - share) * final
