"""Dropout that draws 16 random bits an element.

    y_i = x_i / keep if bits_i >= p * 65536 else 0,    keep = 1 - round(p * 65536) / 65536

torch's dropout on a CPU draws a whole random number for each element, which costs more than the small products of an
adapter. One 64-bit draw serves four elements here, so p is rounded to a multiple of 2^-16; the scale uses the rounded
p, so the mean is kept exactly. On a GPU, and where torch.compile makes and applies the mask in one go, this is torch's
own dropout.

The bits come from the default generator, so that activation checkpointing, which restores that generator's state,
makes the same mask when it recomputes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["dropout", "quantised"]

_LEVELS = 1 << 16


def quantised(p: float) -> float:
    """The probability that `dropout` really uses on a CPU: p rounded to a multiple of 2^-16, and below 1."""
    return min(round(p * _LEVELS), _LEVELS - 1) / _LEVELS


def dropout(x: Tensor, p: float) -> Tensor:
    """Zero each element with probability p (0 <= p < 1) and divide the others by 1 - p; any shape, dtype of x.

    p = 0 returns x itself and draws nothing.
    """
    if not 0 <= p < 1:
        raise ValueError(f"dropout probability must be in [0, 1), not {p}")
    if p == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p, training=True)
    dropped: Tensor = _Dropout.apply(x, p)  # type: ignore[no-untyped-call]
    return dropped


class _Dropout(torch.autograd.Function):
    """Keeps an int16 mask (0 or 1) between forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        rounded = quantised(p)
        draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        bits = draws.view(torch.int16)[: x.numel()].view(x.shape)
        keep = bits.ge_(round(rounded * _LEVELS) - _LEVELS // 2)  # the bits are signed: -32768 stands for 0
        ctx.scale = 1 / (1 - rounded)
        ctx.save_for_backward(keep)
        return _masked(x, keep, ctx.scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return _masked(gradient, keep, ctx.scale), None


def _masked(x: Tensor, keep: Tensor, scale: float) -> Tensor:
    """x * keep * scale. A multiplication in x's own dtype is several times faster than `where` on a CPU."""
    return keep.to(x.dtype).mul_(x).mul_(scale)
