"""SAM: the gradient is taken where the loss nearby is highest (Foret et al. 2021, arXiv 2010.01412).

    theta <- theta - lr * update(g(theta + rho g(theta) / ||g(theta)||))

g is the gradient of the whole global batch, penalties included; the norm is over everything that trains (under LoRA A
and B), as in the paper's equation 2 with p = 2. Each of the two gradients draws masks of its own. Clipping and the
optimizer see the second gradient alone. In the paper's experiments each device moves by its own part
of the batch: here all ranks move alike, so the result does not depend on their number.

The step notes how much higher the loss is up there, without penalties: sam/rise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

__all__ = ["climbed"]


@contextlib.contextmanager
def climbed(model: nn.Module, rho: float) -> Iterator[None]:
    """Move what has a gradient by rho along it, and put it back at the end, bit for bit.

    A scale of the gradient does not matter, fp16's loss scale included. A gradient that is zero or not finite moves
    nothing.
    """
    moving = [(p, p.grad) for p in model.parameters() if p.grad is not None]
    kept = [parameter.detach().clone() for parameter, _ in moving]
    norm = torch.nn.utils.get_total_norm([gradient for _, gradient in moving])
    step = torch.where((norm > 0) & norm.isfinite(), rho / norm, 0.0)
    with torch.no_grad():
        for parameter, gradient in moving:
            parameter.add_(torch.where(step > 0, gradient * step, 0.0))
    try:
        yield
    finally:
        with torch.no_grad():
            for (parameter, _), before in zip(moving, kept, strict=True):
                parameter.copy_(before)
