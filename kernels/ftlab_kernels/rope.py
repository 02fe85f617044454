"""Rotary positions (arXiv 2104.09864) of queries and keys, at any positions, in one launch.

Letters: B rows, T positions, H query heads, K key heads, E width of a head, R = 2 half rotated elements of it (R <= E).

    y[i]        = x[i] cos[i] - x[i + half] sin[i]         i < half
    y[i + half] = x[i + half] cos[i] + x[i] sin[i]
    y[j]        = x[j]                                     R <= j < E

so the pairs are (i, i + half), as in llama and NeoX checkpoints, not neighbours. cos and sin belong to positions: each
row and position has its own, so packed documents need nothing more. The gradient is the same turn by minus the angle:
nothing is kept but cos and sin. Arithmetic in fp32, rounded once to x's dtype.

Bytes are the limit: B T (H + K) E elements read and as many written, each way; 32 + 8 heads of 128 at 8192 positions in
bf16 and 3.0 TB/s: 55.9 us. cos and sin add 8 half bytes a position (0.6% of that), because one program turns all heads
of a position. No memory but the outputs: q and k are read where they are, also as parts of one product.

Differs from Liger's: new tensors rather than the old ones overwritten (the same bytes; autograd may still need the old
ones), partial rotation, positions by row. Interleaved pairs are not here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ftlab_kernels.aot import Shipped
from ftlab_kernels.common import cast, next_power_of_2, require_triton, tl, triton

__all__ = ["reference", "rope", "shipped"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The same in plain torch, with a gradient by autograd."""
    cos, sin = _by_position(cos)[:, :, None], _by_position(sin)[:, :, None]
    half = cos.shape[-1]

    def turn(x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        first, second = wide[..., :half], wide[..., half : 2 * half]
        turned = (first * cos - second * sin, second * cos + first * sin, wide[..., 2 * half :])
        return torch.cat(turned, -1).to(x.dtype)

    return turn(q), turn(k)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q [B, T, H, E] and k [B, T, K, E] turned by the angles of their positions, as new tensors; differentiable once.

    cos, sin: fp32 [B or 1, T, 1, half] or [B or 1, T, half], of which half may be less than E / 2: the elements from
    2 half on stay as they are. No gradient flows to them. q and k may be views, such as parts of one fused product.
    Errors: ValueError for shapes or dtypes that do not fit; KernelUnavailableError where Triton cannot run.
    """
    _check(q, k, cos, sin)
    require_triton(q, k, cos, sin)
    turned: tuple[Tensor, Tensor] = _Rope.apply(q, k, _by_position(cos), _by_position(sin))
    return turned


def _by_position(x: Tensor) -> Tensor:
    """[B or 1, T, 1, half] as [B or 1, T, half]."""
    return x.squeeze(2) if x.dim() == 4 else x


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        found = f"{tuple(q.shape)} and {tuple(k.shape)}"
        raise ValueError(f"q must be [B, T, H, E] and k [B, T, K, E] with one E, not {found}")
    if q.dtype != k.dtype or q.dtype not in DTYPES:
        raise ValueError(f"q and k must both be fp32, fp16 or bf16, not {q.dtype} and {k.dtype}")
    if cos.shape != sin.shape or cos.dtype != torch.float32 or sin.dtype != torch.float32:
        found = f"{cos.dtype} {tuple(cos.shape)} and {sin.dtype} {tuple(sin.shape)}"
        raise ValueError(f"cos and sin must be fp32 of one shape, not {found}")
    rows, positions, width = q.shape[0], q.shape[1], q.shape[3]
    shape = (*cos.shape[:2], *cos.shape[3:]) if cos.dim() == 4 and cos.shape[2] == 1 else tuple(cos.shape)
    if len(shape) != 3 or shape[0] not in (1, rows) or shape[1] != positions or not 0 < 2 * shape[2] <= width:
        wanted = f"[{rows} or 1, {positions}, at most {width // 2}]"
        raise ValueError(f"cos and sin of q {tuple(q.shape)} must be {wanted}, not {tuple(cos.shape)}")


class _Rope(torch.autograd.Function):
    """Keeps cos and sin."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Turn forwards."""
        ctx.save_for_backward(cos, sin)
        return _launch(q, k, cos, sin, inverse=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Turn back."""
        return *_launch(dq, dk, *ctx.saved_tensors, inverse=True), None, None


def _aligned(x: Tensor) -> Tensor:
    """x with elements of a head (or position) side by side; copied if they are not."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _launch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
    q, k, cos, sin = _aligned(q), _aligned(k), _aligned(cos), _aligned(sin)
    out = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    rows, positions, heads, width = q.shape
    if rows * positions * width == 0:
        return out[0], out[1]
    one_row = cos.shape[0] == 1
    _turn_heads[(rows * positions,)](
        q,
        k,
        cos,
        sin,
        *out,
        positions,
        heads,
        k.shape[2],
        cos.shape[2],
        *q.stride()[:3],
        *k.stride()[:3],
        0 if one_row else cos.stride(0),
        cos.stride(1),
        0 if one_row else sin.stride(0),
        sin.stride(1),
        INVERSE=inverse,
        WIDTH=width,
        **_options(heads, k.shape[2], width, cos.shape[2]),
    )
    return out[0], out[1]


def _options(q_heads: int, k_heads: int, width: int, half: int) -> dict[str, int]:
    """Block sizes and warps: one program has all heads of a position, about 32 elements of them a thread."""
    blocks = {"Q_HEADS": next_power_of_2(q_heads), "K_HEADS": next_power_of_2(k_heads), "HALF": next_power_of_2(half)}
    rest = {"REST": next_power_of_2(width - 2 * half) if width > 2 * half else 0}
    elements = (blocks["Q_HEADS"] + blocks["K_HEADS"]) * width
    return {**blocks, **rest, "num_warps": min(max(next_power_of_2(elements) // 2048, 1), 8)}


@triton.jit
def _turn(
    x_ptr,
    y_ptr,
    heads,
    head_stride,
    cos,
    sin,
    half,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    """All heads of one position of one tensor; the output's heads are contiguous. cos, sin: [1, HALF]."""
    head = tl.arange(0, HEADS)[:, None]
    i = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (i < half)
    source = x_ptr + head.to(tl.int64) * head_stride + i
    target = y_ptr + head * WIDTH + i
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(target, cast(first * cos - second * sin, y_ptr.dtype.element_ty), mask=inside)
    tl.store(target + half, cast(second * cos + first * sin, y_ptr.dtype.element_ty), mask=inside)
    if REST > 0:
        j = 2 * half + tl.arange(0, REST)[None, :]
        inside = (head < heads) & (j < WIDTH)
        kept = tl.load(x_ptr + head.to(tl.int64) * head_stride + j, mask=inside, other=0.0)
        tl.store(y_ptr + head * WIDTH + j, kept, mask=inside)


@triton.jit
def _turn_heads(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    positions,
    q_heads,
    k_heads,
    half,
    q_row,
    q_position,
    q_head,
    k_row,
    k_position,
    k_head,
    cos_row,
    cos_position,
    sin_row,
    sin_position,
    INVERSE: tl.constexpr,
    WIDTH: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    """One position a program: its cos and sin once, then the heads of q and of k. WIDTH: of a head."""
    place = tl.program_id(0)  # a division of 64 bits would cost more than all the rest
    row, position = (place // positions).to(tl.int64), (place % positions).to(tl.int64)
    i = tl.arange(0, HALF)[None, :]
    cos = tl.load(cos_ptr + row * cos_row + position * cos_position + i, mask=i < half, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + row * sin_row + position * sin_position + i, mask=i < half, other=0.0).to(tl.float32)
    if INVERSE:
        sin = -sin
    q_ptr += row * q_row + position * q_position
    k_ptr += row * k_row + position * k_position
    q_out_ptr += place.to(tl.int64) * (q_heads * WIDTH)
    k_out_ptr += place.to(tl.int64) * (k_heads * WIDTH)
    _turn(q_ptr, q_out_ptr, q_heads, q_head, cos, sin, half, WIDTH, Q_HEADS, HALF, REST)
    _turn(k_ptr, k_out_ptr, k_heads, k_head, cos, sin, half, WIDTH, K_HEADS, HALF, REST)


def shipped() -> list[Shipped]:
    """What is compiled ahead of time: bf16 heads of llamas (32 + 8 of 128, 9 + 3 of 64) and a rotation of a quarter."""
    pointers = ("q_ptr", "k_ptr", "q_out_ptr", "k_out_ptr")
    types = {**dict.fromkeys(pointers, "*bf16"), "cos_ptr": "*fp32", "sin_ptr": "*fp32"}
    strides = tuple(f"{x}_{what}" for x in ("q", "k") for what in ("row", "position", "head"))
    strides += tuple(f"{x}_{what}" for x in ("cos", "sin") for what in ("row", "position"))
    sizes = ("positions", "q_heads", "k_heads", "half", *strides)
    entries = []
    for q_heads, k_heads, width, half in ((32, 8, 128, 64), (9, 3, 64, 32), (32, 32, 128, 16)):
        divisible = ("positions", "half", *strides, *(("q_heads",) if q_heads % 16 == 0 else ()))
        for inverse in (False, True):
            part = "" if 2 * half == width else f", {2 * half} turned"
            entries.append(
                Shipped(
                    name=f"rope {'backward' if inverse else 'forward'} {q_heads} + {k_heads} x {width}{part}",
                    kernel=_turn_heads,
                    types={**types, **dict.fromkeys(sizes, "i32")},
                    constants={"INVERSE": inverse, "WIDTH": width},
                    options=_options(q_heads, k_heads, width, half),
                    divisible=divisible,
                )
            )
    return entries
