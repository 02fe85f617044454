"""Evaluation mode that is undone exactly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["evaluation_mode"]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and `torch.inference_mode` inside the block; afterwards every submodule is as it was.

    A plain `model.train()` at the end would also wake submodules that were frozen in evaluation mode on purpose, and
    leaving it out would train on without dropout. The flags are put back one by one, also when the block raises.
    """
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in flags:
            module.training = training
