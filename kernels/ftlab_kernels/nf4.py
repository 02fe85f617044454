"""Frozen weights in NF4 (QLoRA, arXiv 2305.14314, section 3), made again: numbers of 4 bits and a magnitude for 64.

Letters: b a block, i one of its 32 bytes, e bytes of an element.

    w[64 b + 2 i] = level[code >> 4] * magnitude[b]      w[64 b + 2 i + 1] = level[code & 15] * magnitude[b]

with code = codes[b, i]. The levels are the paper's (appendix E): quantiles of a normal distribution, 0 among them. One
fp32 product a number, rounded once to the output's type, so every path gives the same bits.

Bytes are the limit: 1 / 2 + 1 / 16 read and e written a number; 4096 x 4096 in bf16 at
3.0 TB/s: 14 us, where the product of 8192 rows with it takes 345.

Differs from bitsandbytes': the magnitudes come dequantised (their double quantisation is 1 / 64 of the work); the two
numbers of a byte are interleaved in registers, so that stores are contiguous.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ftlab_kernels.aot import Shipped
from ftlab_kernels.common import cast, ceil_div, require_triton, tl, triton

__all__ = ["BLOCK", "LEVELS", "check", "level_table", "nf4_dequantise", "reference", "shipped"]

LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
BLOCK = 64  # numbers that share a magnitude
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_BYTES = tl.constexpr(BLOCK // 2)


@functools.cache
def level_table(device: torch.device) -> Tensor:
    """LEVELS as fp32 [16], made once a device: the copy to a GPU waits for it."""
    return torch.tensor(LEVELS, dtype=torch.float32, device=device)


def reference(codes: Tensor, magnitudes: Tensor, dtype: torch.dtype) -> Tensor:
    """`nf4_dequantise` in plain torch."""
    places = torch.stack((codes >> 4, codes & 15), 2).view(len(codes), BLOCK).long()
    return (level_table(codes.device)[places] * magnitudes[:, None]).to(dtype)


def check(codes: Tensor, magnitudes: Tensor, dtype: torch.dtype) -> None:
    """Errors: ValueError for dtypes and shapes that do not fit."""
    fits = codes.dtype == torch.uint8 and magnitudes.dtype == torch.float32 and dtype in DTYPES
    if not fits or codes.shape != (len(magnitudes), BLOCK // 2) or magnitudes.dim() != 1:
        found = f"{codes.dtype} {tuple(codes.shape)}, {magnitudes.dtype} {tuple(magnitudes.shape)} and {dtype}"
        raise ValueError(
            f"codes must be uint8 [blocks, 32], magnitudes fp32 [blocks], for a floating type, not {found}"
        )


def nf4_dequantise(codes: Tensor, magnitudes: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers of 4 bits as [blocks, 64] of `dtype`; no gradient.

    codes: uint8 [blocks, 32], two a byte, the first in the upper half. magnitudes: fp32 [blocks].
    Errors: ValueError for dtypes and shapes that do not fit; KernelUnavailableError where Triton cannot run.
    """
    check(codes, magnitudes, dtype)
    require_triton(codes, magnitudes)
    out = torch.empty(len(codes), BLOCK, dtype=dtype, device=codes.device)
    if out.numel():
        options = _options()
        grid = (ceil_div(len(codes), options["BLOCKS"]),)
        _dequantise[grid](
            codes.contiguous(), magnitudes.contiguous(), level_table(codes.device), out, len(codes), **options
        )
    return out


def _options() -> dict[str, int]:
    """Blocks of a program and its warps: 16 bytes of codes a thread."""
    return {"BLOCKS": 64, "num_warps": 4}


@triton.jit
def _dequantise(codes_ptr, magnitudes_ptr, levels_ptr, out_ptr, blocks, BLOCKS: tl.constexpr):
    """BLOCKS blocks of 64 numbers."""
    b = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    inside = (b < blocks)[:, None]
    magnitude = tl.load(magnitudes_ptr + b, mask=b < blocks, other=0.0)[:, None]
    first = b.to(tl.int64)[:, None] * _BYTES  # of a byte: half of a number's place
    codes = tl.load(codes_ptr + first + tl.arange(0, _BYTES)[None, :], mask=inside, other=0).to(tl.int32)
    upper = tl.load(levels_ptr + (codes >> 4)) * magnitude
    lower = tl.load(levels_ptr + (codes & 15)) * magnitude
    numbers = tl.interleave(upper, lower)
    at = out_ptr + 2 * first + tl.arange(0, 2 * _BYTES)[None, :]
    tl.store(at, cast(numbers, out_ptr.dtype.element_ty), mask=inside)


def shipped() -> list[Shipped]:
    """What is compiled ahead of time: to bf16 and to fp32."""
    types = {"codes_ptr": "*u8", "magnitudes_ptr": "*fp32", "levels_ptr": "*fp32", "blocks": "i32"}
    return [
        Shipped(
            name=f"nf4 to {word}",
            kernel=_dequantise,
            types={**types, "out_ptr": f"*{word}"},
            constants={},
            options=_options(),
            divisible=("blocks",),
        )
        for word in ("bf16", "fp32")
    ]
