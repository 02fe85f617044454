"""Dropout with the mask of `ftlab_kernels.random`: one bit an element is kept for the backward pass.

Letters: M rows, K columns (the last dimension), G = ceil(K / 8).

    y = x * keep * LEVELS / (LEVELS - threshold(p))      dx = dy * keep * LEVELS / (LEVELS - threshold(p))

Traffic for M x K elements of e bytes: forward 2 e M K + M K / 8, backward the same; torch's own keeps a byte an
element. Accumulates nothing; the product is made in fp32 and rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ftlab_kernels.aot import Shipped
from ftlab_kernels.common import cast, ceil_div, fp32, next_power_of_2, require_triton, tl, triton
from ftlab_kernels.random import (
    GROUP,
    draw_seed,
    expand_mask,
    keep_byte,
    keep_scale,
    mask_bytes,
    threshold,
    unpack_mask,
)

__all__ = ["dropout", "reference", "shipped"]


def reference(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """The same in plain torch, with a gradient by autograd. x: [..., K]."""
    rows = x.numel() // max(x.shape[-1], 1)
    keep = unpack_mask(mask_bytes(seed, rows, x.shape[-1], p), x.shape[-1]).view(x.shape)
    return torch.where(keep, x * keep_scale(p), 0)


def dropout(x: Tensor, p: float, *, seed: Tensor | None = None, training: bool = True) -> Tensor:
    """Zero each element of x [..., K] with probability p and scale the others; x's dtype, differentiable once.

    seed: int64 [1] on x's device; None draws one from torch's generator. p = 0 or not training returns x itself.
    Errors: ValueError for p outside [0, 1); KernelUnavailableError where Triton cannot run.
    """
    threshold(p)
    if p == 0 or not training or x.numel() == 0:
        return x
    require_triton(x)
    out: Tensor = _Dropout.apply(x, p, draw_seed(x.device) if seed is None else seed)
    return out


class _Dropout(torch.autograd.Function):
    """Keeps the packed mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: Tensor) -> Tensor:
        """Draw, pack, apply."""
        x = x.contiguous()
        columns = x.shape[-1]
        rows = x.numel() // columns
        mask = torch.empty(rows, ceil_div(columns, GROUP), dtype=torch.uint8, device=x.device)
        y = torch.empty_like(x)
        _launch(x, y, mask, seed, p, draw=True)
        ctx.save_for_backward(mask)
        ctx.p = p
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        """Apply the kept mask to the gradient."""
        (mask,) = ctx.saved_tensors
        dy = dy.contiguous()
        dx = torch.empty_like(dy)
        _launch(dy, dx, mask, mask, ctx.p, draw=False)
        return dx, None, None


def _launch(x: Tensor, y: Tensor, mask: Tensor, seed: Tensor, p: float, *, draw: bool) -> None:
    rows, groups = mask.shape
    columns = x.shape[-1]
    options = _options(columns)
    grid = (ceil_div(rows, options["ROWS"]), ceil_div(columns, options["COLUMNS"]))
    _apply_mask[grid](x, y, mask, seed, threshold(p), keep_scale(p), rows, columns, groups, DRAW=draw, **options)


def _options(columns: int) -> dict[str, int]:
    """Block sizes and warps: about 4096 elements a program."""
    wide = min(max(next_power_of_2(columns), 16), 1024)
    return {"ROWS": max(4096 // wide, 1), "COLUMNS": wide, "num_warps": 4}


@triton.jit
def _apply_mask(
    x_ptr,
    y_ptr,
    mask_ptr,
    seed_ptr,
    drop_below,
    scale,
    rows,
    columns,
    groups,
    DRAW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """y = x * mask * scale for a [ROWS, COLUMNS] block of contiguous x; draws and stores the mask, or reads it."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    g = tl.program_id(1) * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)
    inside_g = (m < rows)[:, None] & (g < groups)[None, :]
    index_g = m[:, None] * groups + g[None, :]
    if DRAW:
        byte = keep_byte(tl.load(seed_ptr), index_g, drop_below)
        left = columns - g * 8  # elements of the row from this group on
        used = tl.where(left >= 8, 255, (1 << tl.maximum(tl.minimum(left, 8), 0)) - 1)
        byte = byte & used[None, :]
        # Stored a byte at a time: for wider stores the compiler would draw the mask twice, in two layouts.
        tl.store(mask_ptr + tl.max_contiguous(index_g, (1, 1)), byte.to(tl.uint8), mask=inside_g)
    else:
        byte = tl.load(mask_ptr + index_g, mask=inside_g, other=0).to(tl.int32)
    keep = expand_mask(byte, ROWS, COLUMNS)
    inside = (m < rows)[:, None] & (k < columns)[None, :]
    at = m[:, None] * columns + k[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    y = tl.where(keep, x * fp32(scale), 0.0)
    tl.store(y_ptr + at, cast(y, y_ptr.dtype.element_ty), mask=inside)


def shipped() -> list[Shipped]:
    """What is compiled ahead of time: bf16 rows of 4096, drawing and reading."""
    types = {"x_ptr": "*bf16", "y_ptr": "*bf16", "mask_ptr": "*u8", "seed_ptr": "*i64"}
    sizes = {"drop_below": "i32", "scale": "fp32", "rows": "i32", "columns": "i32", "groups": "i32"}
    return [
        Shipped(
            name=f"dropout {'forward' if draw else 'backward'}",
            kernel=_apply_mask,
            types={**types, **sizes},
            constants={"DRAW": draw},
            options=_options(4096),
            divisible=("rows", "columns", "groups"),
        )
        for draw in (True, False)
    ]
