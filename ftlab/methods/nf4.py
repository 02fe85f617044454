"""Frozen weights in NF4, 4 bits each (QLoRA, Dettmers et al. 2023, arXiv 2305.14314, section 3 and appendix E).

A block of 64 numbers of a weight is divided by its largest magnitude, and each becomes the nearest of 16 levels: the
quantiles of a normal distribution, with 0 among them. Double quantisation: the magnitudes, less their mean over the
weight, are stored in 8 bits with one fp32 scale for 256 of them.

    w ~ level[code] * (mean + scale * code_8)        4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits a weight

Differs from the paper: the 8 bits are signed integers, not 8-bit floats. What they store lies close together, so equal
steps are the better ones: an error of at most 1/254 of the largest distance from the mean in 256 blocks. Where one of
those blocks holds an outlier that is large against the other magnitudes; it then turns no sign, but costs precision.

A product makes the rows of the weight again a million numbers at a time, in the forward and again in the backward pass;
no dequantised copy outlives the product of its rows.
"""

from __future__ import annotations

from typing import Any

import torch
from ftlab_kernels.nf4 import BLOCK, LEVELS
from torch import Tensor, nn

from ftlab.operators import TORCH, Operators

__all__ = ["BLOCK", "LEVELS", "NF4Weight", "nf4_linear"]

GROUP = 256  # magnitudes that share a scale
_AT_ONCE = 1 << 20  # numbers that are dequantised at a time


class NF4Weight(nn.Module):
    """A frozen [out, in] weight in 4 bits. Its tensors are buffers: nothing trains them and no dtype is imposed."""

    codes: Tensor  # uint8 [blocks, 32]: two codes a byte, the first in the upper half
    magnitudes: Tensor  # int8 [blocks]
    scales: Tensor  # fp32 [ceil(blocks / 256)]
    mean: Tensor  # fp32 [1]

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.shape = (weight.shape[0], weight.shape[1])
        flat = weight.detach().reshape(-1)
        blocks = -(-len(flat) // BLOCK)
        codes = torch.empty(blocks, BLOCK // 2, dtype=torch.uint8, device=weight.device)
        largest = torch.empty(blocks, device=weight.device)
        step = _AT_ONCE // BLOCK
        for first in range(0, blocks, step):
            part = flat[first * BLOCK : (first + step) * BLOCK].float()
            rows = torch.nn.functional.pad(part, (0, -len(part) % BLOCK)).view(-1, BLOCK)
            here = slice(first, first + len(rows))
            largest[here] = rows.abs().amax(1)
            codes[here] = _pack(_nearest(rows / largest[here].clamp_min(torch.finfo().tiny)[:, None]))
        mean = largest.mean().view(1)
        apart = torch.nn.functional.pad(largest - mean, (0, -blocks % GROUP)).view(-1, GROUP)
        scales = apart.abs().amax(1) / 127
        step_sizes = scales.clamp_min(torch.finfo().tiny)[:, None]
        # Beside an outlier half a step may be more than a magnitude, and a negative one would turn its block around.
        magnitudes = (apart / step_sizes).round().maximum((-mean / step_sizes).ceil()).to(torch.int8)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("magnitudes", magnitudes.view(-1)[:blocks].clone(), persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("mean", mean, persistent=False)

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    def rows_at_once(self) -> int:
        """How many rows are dequantised at a time: a multiple of 64, so that they begin with a block."""
        return max(_AT_ONCE // self.shape[1] // BLOCK, 1) * BLOCK

    def dequantise(
        self,
        first: int = 0,
        end: int | None = None,
        dtype: torch.dtype = torch.float32,
        operators: Operators = TORCH,
    ) -> Tensor:
        """Rows first .. end - 1: [end - first, in], by the kernel of `operators`. `first` is a multiple of 64."""
        rows, columns = self.shape
        end = rows if end is None else min(end, rows)
        blocks = slice(first * columns // BLOCK, -(-end * columns // BLOCK))
        groups = torch.arange(blocks.start, blocks.stop, device=self.codes.device) // GROUP
        magnitudes = self.magnitudes[blocks].float() * self.scales[groups] + self.mean
        values = operators.nf4_dequantise(self.codes[blocks], magnitudes, dtype)
        return values.view(-1)[: (end - first) * columns].view(end - first, columns)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"{self.shape[0]} x {self.shape[1]}, {self.nbytes / 2**20:.2f} MiB"


def _nearest(x: Tensor) -> Tensor:
    """The index of the nearest level of each number in [-1, 1]."""
    levels = torch.tensor(LEVELS, device=x.device)
    return torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)


def _pack(codes: Tensor) -> Tensor:
    pairs = codes.to(torch.uint8).view(len(codes), -1, 2)
    return pairs[:, :, 0] << 4 | pairs[:, :, 1]


def nf4_linear(x: Tensor, weight: NF4Weight, bias: Tensor | None, operators: Operators = TORCH) -> Tensor:
    """x W^T + bias: [..., in] -> [..., out], in x's dtype; the gradient goes to x and the bias."""
    # torch gives Function.apply no types
    out: Tensor = _Product.apply(x.reshape(-1, x.shape[-1]), weight, operators)  # type: ignore[no-untyped-call]
    if bias is not None:
        out = out + bias.to(out.dtype)
    return out.view(*x.shape[:-1], weight.shape[0])


class _Product(torch.autograd.Function):
    """Keeps the quantised weight alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: NF4Weight, operators: Operators) -> Tensor:
        ctx.weight, ctx.operators = weight, operators
        out = x.new_empty(len(x), weight.shape[0])
        step = weight.rows_at_once()
        with torch.autocast(x.device.type, enabled=False):
            for first in range(0, weight.shape[0], step):
                rows = weight.dequantise(first, first + step, x.dtype, operators)
                torch.mm(x, rows.t(), out=out[:, first : first + step])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        weight: NF4Weight = ctx.weight
        dx = torch.zeros(len(dy), weight.shape[1], dtype=torch.float32, device=dy.device)
        step = weight.rows_at_once()
        with torch.autocast(dy.device.type, enabled=False):
            for first in range(0, weight.shape[0], step):
                rows = weight.dequantise(first, first + step, dy.dtype, ctx.operators)
                dx += torch.mm(dy[:, first : first + step], rows)
        return dx.to(dy.dtype), None, None
