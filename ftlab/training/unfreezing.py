"""When the parameters of a method's later stages begin to train.

Optimizer, penalties and checkpoints hold from the start whatever trains at the last stage. A parameter whose stage has
not come has no `requires_grad`: it gets no gradient, AdamW passes it over (no decay, no moments, no step count), and
below the lowest one that trains no graph is built.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ftlab.config import GradualUnfreezeConfig
from ftlab.data.loader import RowLoader
from ftlab.methods.rules import block_of
from ftlab.training.hooks import Hook
from ftlab.training.loop import Fit
from ftlab.training.state import TrainState

__all__ = ["Unfreezing"]


class Unfreezing(Hook):
    """A hook of the loop that lets the names of `stages` train one stage after the other.

    With the triggers `step` and `epoch` the stage is a function of where the run stands; with `stall` it is counted in
    the run's counters. Either way a resumed run finds it again.
    """

    def __init__(self, config: GradualUnfreezeConfig, stages: Sequence[Sequence[str]]) -> None:
        self.config = config
        self.stages = [tuple(names) for names in stages]
        self.entered = -1

    def before_step(self, state: TrainState, run: Fit) -> None:
        """Enter the stage that is due, if it is another than the present one."""
        counters = state.counters
        if self.config.trigger == "stall":
            if counters.stalled >= self.config.every:
                counters.stage, counters.stalled = counters.stage + 1, 0
                if counters.stage < len(self.stages):
                    counters.worse_in_a_row = 0  # checkpoint.patience waits for what a stage brings
        else:
            counters.stage = (counters.step if self.config.trigger == "step" else counters.epoch) // self.config.every
        counters.stage = min(counters.stage, len(self.stages) - 1)
        if counters.stage != self.entered:
            self.enter(run.replica.model, counters.stage)
            run.replica.wrap()  # data-parallel training decides once which gradients travel
            count = sum(p.numel() for p in run.replica.model.parameters() if p.requires_grad)
            run.progress.message(
                f"step {counters.step}: stage {counters.stage + 1} of {len(self.stages)}, {count:,} train"
            )

    def after_validation(self, state: TrainState, run: Fit, *, better: bool) -> None:
        """Count validations without a better value, where that is the trigger.

        The next stage begins with the next step, so that the counters never name one in which nothing was trained.
        """
        if self.config.trigger == "stall":
            state.counters.stalled = 0 if better else state.counters.stalled + 1

    def foreseen(self, steps: int, loader: RowLoader) -> str | None:
        """`unreached` of a run of so many steps, before its first; None for a stall, which nobody foresees."""
        if self.config.trigger == "stall":
            return None
        place = steps - 1
        if self.config.trigger == "epoch":
            epoch, done = 0, loader.steps_in_epoch(0)
            while done < steps:
                epoch += 1
                done += loader.steps_in_epoch(epoch)
            place = epoch
        return self.unreached(place // self.config.every)

    def unreached(self, stage: int) -> str | None:
        """What never trains in a run that ends in a stage, and what to do; None in the last one."""
        config = self.config
        if stage >= len(self.stages) - 1:
            return None
        names = [name for later in self.stages[stage + 1 :] for name in later]
        blocks = [block for name in names if (block := block_of(name)) is not None]
        parts = []
        if blocks:
            low, high = min(blocks), max(blocks)
            parts.append(f"block {low}" if low == high else f"blocks {low} to {high}")
        if len(blocks) < len(names):
            parts.append("the embedding")
        sooner = f", lower method.every={config.every}" if config.every > 1 else ""
        return (
            f"gradual unfreezing ends at stage {stage + 1} of {len(self.stages)} and leaves {' and '.join(parts)} "
            f"frozen; train longer (training.epochs, training.max_steps){sooner} or raise method.blocks={config.blocks}"
        )

    def enter(self, model: nn.Module, stage: int) -> None:
        """Set `requires_grad` of the parameters of every stage."""
        for number, names in enumerate(self.stages):
            for name in names:
                model.get_parameter(name).requires_grad_(number <= stage)
        self.entered = stage
