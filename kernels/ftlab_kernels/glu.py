"""Gated units: an activation of one tensor times another, SwiGLU and GEGLU (arXiv 2002.05202).

Letters: M rows, F width of a row, e bytes of an element.

    h = f(gate) up        dup = f(gate) dh        dgate = f'(gate) up dh
    silu:  f(x) = x s(x)      f'(x) = s(x) + x s(x) (1 - s(x))            s(x) = 1 / (1 + exp(-x))
    tanh:  f(x) = x s(2 u)    f'(x) = s(2 u) + x s(2 u) (1 - s(2 u)) 2 u'    u = sqrt(2 / pi) (x + 0.044715 x^3)
    none:  f(x) = x P(x)      f'(x) = P(x) + x exp(-x^2 / 2) / sqrt(2 pi)    P(x) = (1 + erf(x / sqrt(2))) / 2

Only gate and up are kept; the backward computes the activation again and writes both gradients in one pass. fp32
between load and store, rounded once: torch rounds f(gate) first. s(2 u) is (1 + tanh u) / 2 without a tanh, and without
the cancellation where u is near -1. erf is Triton's own, on a GPU that of CUDA's libdevice.

Bytes are the limit: forward 3 e M F, backward 5 e M F; 8192 x 14336 in bf16 at 3.0 TB/s: 235 and 391 us. No memory but
the outputs. Rows may be apart, so gate and up may be the halves of one product.

Differs from Liger's: GEGLU without tanh too, rows that are apart, gradients in new tensors rather than over gate and up
(the same bytes); from Unsloth's: h is not written again in the backward.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ftlab_kernels.aot import Shipped
from ftlab_kernels.common import cast, ceil_div, next_power_of_2, require_triton, tl, triton

__all__ = ["geglu", "geglu_reference", "reference", "shipped", "swiglu"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_SILU, _TANH, _ERF = tl.constexpr("silu"), tl.constexpr("tanh"), tl.constexpr("none")
_CUBE = tl.constexpr(0.044715)
_TWICE_ROOT = tl.constexpr(2 * math.sqrt(2 / math.pi))
_ROOT_HALF = tl.constexpr(math.sqrt(0.5))
_DENSITY = tl.constexpr(1 / math.sqrt(2 * math.pi))
_LOG2E = tl.constexpr(math.log2(math.e))


def reference(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` in plain torch."""
    return F.silu(gate) * up


def geglu_reference(gate: Tensor, up: Tensor, approximate: str = "tanh") -> Tensor:
    """`geglu` in plain torch."""
    return F.gelu(gate, approximate=approximate) * up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape and dtype; differentiable once.

    Errors: ValueError for shapes or dtypes that do not fit; KernelUnavailableError where Triton cannot run.
    """
    _check(gate, up)
    h: Tensor = _Gated.apply(gate, up, "silu")
    return h


def geglu(gate: Tensor, up: Tensor, approximate: str = "tanh") -> Tensor:
    """gelu(gate, approximate) * up with approximate "tanh" or "none", as in torch; otherwise as `swiglu`.

    The default is the one of the models that have such a unit (Gemma), not torch's "none".
    """
    if approximate not in ("tanh", "none"):
        raise ValueError(f"approximate must be tanh or none, not {approximate!r}")
    _check(gate, up)
    h: Tensor = _Gated.apply(gate, up, approximate)
    return h


def _check(gate: Tensor, up: Tensor) -> None:
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.dtype not in DTYPES:
        found = f"{gate.dtype} {tuple(gate.shape)} and {up.dtype} {tuple(up.shape)}"
        raise ValueError(f"gate and up must be fp32, fp16 or bf16 of one shape and dtype, not {found}")
    require_triton(gate, up)


class _Gated(torch.autograd.Function):
    """Keeps gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        """f(gate) up."""
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        if h.numel():
            gate, up = _rows(gate), _rows(up)
            _forward[_grid(gate)](
                gate,
                up,
                h,
                *gate.shape,
                gate.stride(0),
                up.stride(0),
                ACTIVATION=activation,
                **_options(gate.shape[1]),
            )
        return h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor, None]:
        """Both gradients."""
        gate, up = ctx.saved_tensors
        d_gate, d_up = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (gate, up))
        if dh.numel():
            gate, up, dh = _rows(gate), _rows(up), _rows(dh)
            _backward[_grid(gate)](
                dh,
                gate,
                up,
                d_gate,
                d_up,
                *gate.shape,
                dh.stride(0),
                gate.stride(0),
                up.stride(0),
                ACTIVATION=ctx.activation,
                **_options(gate.shape[1]),
            )
        return d_gate, d_up, None


def _rows(x: Tensor) -> Tensor:
    """[..., F] as [M, F] whose rows are contiguous, if they may be apart; copied only where that cannot be."""
    rows = x.reshape(-1, x.shape[-1]) if x.dim() else x.view(1, 1)
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _options(width: int) -> dict[str, int]:
    """Block sizes and warps: 16 elements a thread, two 16-byte loads of bf16 under way in each tensor."""
    columns = min(max(next_power_of_2(width), 16), 1024)
    return {"ROWS": 2048 // columns, "COLUMNS": columns, "num_warps": 4}


def _grid(x: Tensor) -> tuple[int]:
    """One dimension: there may be more blocks of rows than another dimension can hold."""
    options = _options(x.shape[1])
    return (ceil_div(x.shape[1], options["COLUMNS"]) * ceil_div(x.shape[0], options["ROWS"]),)


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _logistic(x):
    """s = 1 / (1 + exp(-x)) and 1 - s, which has lost its digits where it is subtracted from 1."""
    e = tl.exp2(-x * _LOG2E)
    share = 1.0 / (1.0 + e)  # 0 where e is infinite
    return share, tl.where(share > 0.0, e * share, 1.0)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """f(x) / x, and f'(x) - f(x) / x."""
    if ACTIVATION == _SILU:
        share, rest = _logistic(x)
        slope = x * share * rest
    elif ACTIVATION == _TANH:
        square = x * x
        share, rest = _logistic(x * _TWICE_ROOT * (1.0 + square * _CUBE))
        slope = x * share * rest * (1.0 + square * (3.0 * _CUBE)) * _TWICE_ROOT
    else:
        tl.static_assert(ACTIVATION == _ERF)
        share = 0.5 + 0.5 * tl.math.erf(x * _ROOT_HALF)
        slope = x * tl.exp2(x * x * (-0.5 * _LOG2E)) * _DENSITY
    return share, slope


@triton.jit
def _place(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows, columns and the mask of this program's block; neighbouring programs share rows."""
    blocks = tl.cdiv(columns, COLUMNS)
    m = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return m, c, (m < rows) & (c < columns)


@triton.jit
def _forward(
    gate_ptr,
    up_ptr,
    h_ptr,
    rows,
    columns,
    gate_stride,
    up_stride,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A [ROWS, COLUMNS] block of h, which is contiguous."""
    m, c, inside = _place(rows, columns, ROWS, COLUMNS)
    x = tl.load(gate_ptr + m * gate_stride + c, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + m * up_stride + c, mask=inside, other=0.0).to(tl.float32)
    share, _ = _activate(x, ACTIVATION)
    tl.store(h_ptr + m * columns + c, cast(x * share * up, h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dh_ptr,
    gate_ptr,
    up_ptr,
    d_gate_ptr,
    d_up_ptr,
    rows,
    columns,
    dh_stride,
    gate_stride,
    up_stride,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A [ROWS, COLUMNS] block of both gradients, which are contiguous."""
    m, c, inside = _place(rows, columns, ROWS, COLUMNS)
    dh = tl.load(dh_ptr + m * dh_stride + c, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(gate_ptr + m * gate_stride + c, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + m * up_stride + c, mask=inside, other=0.0).to(tl.float32)
    share, slope = _activate(x, ACTIVATION)
    at = m * columns + c
    tl.store(d_up_ptr + at, cast(dh * x * share, d_up_ptr.dtype.element_ty), mask=inside)
    tl.store(d_gate_ptr + at, cast(dh * up * (share + slope), d_gate_ptr.dtype.element_ty), mask=inside)


def shipped() -> list[Shipped]:
    """What is compiled ahead of time: bf16 rows of 14336, each activation, both ways."""
    width = 14336
    tensors = ("dh_ptr", "gate_ptr", "up_ptr", "d_gate_ptr", "d_up_ptr", "h_ptr")
    sizes = ("rows", "columns", "dh_stride", "gate_stride", "up_stride")
    types = {**dict.fromkeys(tensors, "*bf16"), **dict.fromkeys(sizes, "i32")}
    entries = []
    for name, activation in (("swiglu", "silu"), ("geglu tanh", "tanh"), ("geglu", "none")):
        for part, kernel in (("forward", _forward), ("backward", _backward)):
            names = kernel.arg_names
            entries.append(
                Shipped(
                    name=f"{name} {part} {width}",
                    kernel=kernel,
                    types={argument: word for argument, word in types.items() if argument in names},
                    constants={"ACTIVATION": activation},
                    options=_options(width),
                    divisible=tuple(size for size in sizes if size in names),
                )
            )
    return entries
