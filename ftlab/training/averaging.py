"""An average of the weights over training, which takes the place of the last ones.

Each sample is what trains (under LoRA the factors A and B themselves), taken after a step:

    ema   avg <- decay avg + (1 - decay) theta        (Polyak and Juditsky 1992; arXiv 1703.01780, section 2)
    swa   avg <- avg + (theta - avg) / n              n-th sample (arXiv 1803.05407, algorithm 1)

The first sample is the average by itself, so it begins in a region that training has reached rather than at the
pretrained weights. Averages are fp32, stand in the checkpoint, and validation measures them once they have begun, so
that the best validation is one of weights that can be kept. Differs from SWA in the schedule, which is the run's own.

Logged once they have begun: ||avg - theta||, average/distance, and the number of samples, average/models.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ftlab.config import AverageConfig
from ftlab.training.hooks import Hook
from ftlab.training.loop import Fit, StepResult
from ftlab.training.state import TrainState

__all__ = ["Averaging"]

_KEY = "average"  # in the state's memory


class Averaging(Hook):
    """A hook of the loop that keeps an average of what trains, and shows it to each validation."""

    def __init__(self, config: AverageConfig, total_steps: int) -> None:
        self.config = config
        self.first = max(1, int(config.start * total_steps))

    def after_step(self, state: TrainState, run: Fit, result: StepResult) -> None:
        """Take a sample if one is due; a step that moved nothing gives none."""
        since = state.counters.updates - self.first
        if result.applied and since >= 0 and since % self.config.every == 0:
            self.sample(state)

    def sample(self, state: TrainState) -> None:
        """Take the present weights into the average."""
        step = state.counters.step
        memory = state.memory.setdefault(_KEY, {"samples": 0, "first": step, "weights": {}})
        memory["samples"] += 1
        memory["last"] = step
        share = 1 - self.config.decay if self.config.kind == "ema" else 1 / memory["samples"]
        weights = memory["weights"]
        for name, tensor in state.trainable().items():
            if memory["samples"] == 1:
                weights[name] = tensor.float().clone()
            else:
                weights[name] = weights[name].to(tensor.device).lerp_(tensor.float(), share)

    def scalars(self, state: TrainState) -> dict[str, float]:
        """How far the average is from the weights, and how many samples it is of; nothing before the first."""
        average = state.memory.get(_KEY)
        if average is None:
            return {}
        away = [
            torch.linalg.vector_norm(average["weights"][name].to(tensor.device) - tensor)
            for name, tensor in state.trainable().items()
        ]
        return {
            "average/distance": float(torch.linalg.vector_norm(torch.stack(away))),
            "average/models": float(average["samples"]),
        }

    @contextlib.contextmanager
    def validating(self, state: TrainState) -> Iterator[None]:
        """Put the average in the place of the weights, and afterwards the weights back, bit for bit."""
        average = state.memory.get(_KEY)
        if average is None:
            yield
            return
        kept = {name: tensor.clone() for name, tensor in state.trainable().items()}
        state.load_weights(average["weights"])
        try:
            yield
        finally:
            state.load_weights(kept)

    def settle(self, state: TrainState, best_step: int | None) -> str:
        """Make the average the result, and say which weights the result is.

        best_step: the validation whose weights the model holds already; None: it holds the last ones.
        """
        kind, average = self.config.kind, state.memory.get(_KEY)
        if average is None:
            return f"{kind}: no sample was taken, so the result is not an average; lower regularizer.average.start"
        if best_step is None:
            state.load_weights(average["weights"])
            return f"{kind}: the result is the average of {_samples(average)}"
        if best_step < average["first"]:
            return (
                f"{kind}: the result is not an average: the best validation, of step {best_step}, was before the first "
                f"sample, of step {average['first']}; checkpoint.load_best=false takes the average"
            )
        return f"{kind}: the result is the average as it stood at the best validation, of step {best_step}"


def _samples(average: dict[str, Any]) -> str:
    return f"{average['samples']} samples, of steps {average['first']} to {average['last']}"
