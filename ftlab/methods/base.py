"""What a method is: the object that decides what trains and how the result is kept."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from torch import nn

from ftlab.methods.trainable import TrainableTable

__all__ = ["Method"]


class Method(Protocol):
    """A way of changing a pretrained model. `apply` comes first; everything else acts on the applied model."""

    keeps_base: bool
    """Whether the pretrained weights stay as they are, so that `save` holds only what sits on top of them."""

    stages: tuple[tuple[str, ...], ...]
    """After `apply`: the parameters that train from the start, then those that join at each later stage; () is one."""

    def apply(self, model: nn.Module) -> TrainableTable:
        """Swap or add leaves in place, set `requires_grad`, and return the table that says who trains."""

    def save(self, model: nn.Module, directory: Path, base: str) -> None:
        """Write what was trained to `directory`, whole or not at all; `base` names the pretrained weights."""

    def load(self, model: nn.Module, directory: Path) -> None:
        """Read it back. Errors: FtlabError on tensors missing, left over or of another shape, and on other settings."""

    def merge(self, model: nn.Module) -> dict[str, float]:
        """Fold the update into the base weights. Returns the rounding error of each changed weight, by layer name.

        The error is ||stored - exact|| / ||update||, in Frobenius norms: 0 loses nothing, 1 loses the update.
        """

    def unmerge(self, model: nn.Module) -> None:
        """Take the update out again; the base weights are bit for bit what they were."""

    def merged(self, model: nn.Module) -> nn.Module:
        """The model after `merge` with plain layers only, as other tools know it. Changes `model` itself."""

    def disabled(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside the context the model computes what its pretrained weights compute."""
