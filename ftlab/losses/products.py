"""Sums over the elements of s P Q + D with their gradients in P and Q, the product never whole.

Penalties of an adapter's effective weight need each element of B A, which is as large as the layer. Here it is made a
block of rows at a time, small enough for the processor's cache, and while a block is there its part of the gradient is
taken too:

    dP = s G Q^T,    dQ = s P^T G,    G = the gradient in the elements of s P Q + D

so that the backward pass only multiplies two small matrices by a number. On a GPU a block is the whole matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Measure", "sum_over_product"]

# (elements [rows, in], which rows) -> their sum, and the gradient of it in the elements. It may overwrite them.
Measure = Callable[[Tensor, slice], tuple[Tensor, Tensor]]

_BLOCK = 2**17  # elements: half a megabyte


def sum_over_product(product: tuple[Tensor, Tensor, float], offset: Tensor | None, measure: Measure) -> Tensor:
    """The sum of `measure` over s P Q + D: a scalar with a gradient in P and Q.

    product: P [out, k], Q [k, in] and s. offset: D [out, in], a constant; None: 0.
    """
    p, q, scale = product
    total: Tensor = _Sum.apply(p, q, scale, offset, measure)  # type: ignore[no-untyped-call]
    return total


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor, q: Tensor, scale: float, offset: Tensor | None, measure: Measure) -> Tensor:
        total, dp, dq = p.new_zeros(()), torch.empty_like(p), torch.zeros_like(q)
        rows = len(p) if p.is_cuda else max(1, _BLOCK // q.shape[1])
        with torch.autocast(p.device.type, enabled=False):
            scaled = scale * q
            for start in range(0, len(p), rows):
                part = slice(start, start + rows)
                if offset is None:
                    moved = p[part] @ scaled
                else:
                    moved = torch.addmm(offset[part].to(p.dtype), p[part], q, alpha=scale)
                value, gradient = measure(moved, part)
                total += value
                torch.mm(gradient, q.t(), out=dp[part])
                dq.addmm_(p[part].t(), gradient)
        ctx.save_for_backward(dp.mul_(scale), dq.mul_(scale))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        dp, dq = ctx.saved_tensors
        return gradient * dp, gradient * dq, None, None, None
