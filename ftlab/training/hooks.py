"""What a method or a regularizer may do between the steps of the loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ftlab.training.loop import Fit, StepResult
    from ftlab.training.state import TrainState

__all__ = ["Hook", "Logged"]


class Hook:
    """What a method or a regularizer does between steps; each of these does nothing until it is overridden.

    What it must remember stands in the state's counters or its memory.
    """

    def before_step(self, state: TrainState, run: Fit) -> None:
        """Called before each step, on every rank."""

    def after_step(self, state: TrainState, run: Fit, result: StepResult) -> None:
        """Called after each step, once it is counted, on every rank."""

    def scalars(self, state: TrainState) -> dict[str, float]:
        """What to log beside the loss; called after the steps that get a line, on every rank."""
        return {}

    def validating(self, state: TrainState) -> contextlib.AbstractContextManager[None]:
        """Around each validation and the keeping of the weights that it found best, on every rank."""
        return contextlib.nullcontext()

    def after_validation(self, state: TrainState, run: Fit, *, better: bool) -> None:
        """Called after each validation, before its checkpoint; better: than every one before."""


class Logged(Hook):
    """Logs a number that is read when a step gets a line."""

    def __init__(self, name: str, read: Callable[[], float]) -> None:
        self.name, self.read = name, read

    def scalars(self, state: TrainState) -> dict[str, float]:
        """The number under its name."""
        return {self.name: self.read()}
