"""RMSNorm and LayerNorm of rows, with the addition to the residual stream in the same pass.

Letters: M rows, D width of a row, e bytes of an element.

    s  = x + r rounded to x's dtype (the new residual stream; without r it is x)
    RMSNorm (arXiv 1910.07467):    rstd = 1 / sqrt(mean(s^2) + eps)        xh = s rstd           y = w xh
    LayerNorm (arXiv 1607.06450):  rstd = 1 / sqrt(mean((s - mean)^2) + eps)  xh = (s - mean) rstd  y = w xh + b
    g = w dy      ds' = ds + rstd (g - xh mean(g xh) [- mean(g]])      dw = sum_M dy xh      db = sum_M dy

dx and dr are both ds', one tensor. Everything between a load and a store is fp32, and the norm is of the rounded sum,
so that it is the norm of what is in memory. The weights may have another dtype than x. Kept for the backward: s, and
rstd (and the mean of LayerNorm) in fp32 for each row; never the normalised row.

Work: bytes, not arithmetic. Forward 2 e M D (with the addition 4 e M D), backward 3 e M D (4 e M D): 8192 x 4096 in
bf16 at 3.0 TB/s: 44.7 and 67.1 us, with the addition 89.5 and 89.5 against 111.8 and 134.2 for two passes. A row stays
in registers between its statistics and its output. Weights that do not train cost nothing. Trained ones: every program
adds up its own rows in fp32, torch adds the programs: no atomics, so equal inputs give equal bits on one kind of GPU.

Differs from Liger's fused_add_rms_norm: LayerNorm too, weights that are frozen, widths and strides of any kind; from
transformers in half precision: the weight is applied before the rounding, not after.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ftlab_kernels.aot import Shipped
from ftlab_kernels.common import cast, ceil_div, fp32, next_power_of_2, require_triton, tl, triton

__all__ = [
    "MAX_WIDTH",
    "add_layer_norm",
    "add_layer_norm_reference",
    "add_reference",
    "add_rms_norm",
    "layer_norm",
    "layer_norm_reference",
    "reference",
    "rms_norm",
    "shipped",
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_WIDTH = 16384  # a row has to fit into the registers of one program
FUSED_WIDTH = 8192  # and beside it the sums for the weights, or they have a pass of their own
SUM_OPTIONS = {"ROWS": 4, "COLUMNS": 512, "num_warps": 4}  # that pass: 16 elements a thread
SUM_PROGRAMS = 32  # over the rows, for each block of columns


# --- in plain torch ---------------------------------------------------------------------------------------------------


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` in plain torch."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(x.dtype)


def add_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in plain torch."""
    summed = x + residual
    return reference(summed, weight, eps), summed


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """`layer_norm` in plain torch."""
    wide = torch.promote_types(x.dtype, torch.float32)
    shift = None if bias is None else bias.to(wide)
    return F.layer_norm(x.to(wide), weight.shape, weight.to(wide), shift, eps).to(x.dtype)


def add_layer_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`add_layer_norm` in plain torch."""
    summed = x + residual
    return layer_norm_reference(summed, weight, bias, eps), summed


# --- the functions ----------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension of x [..., D], in x's dtype; differentiable once.

    weight: [D], of any of fp32, fp16 and bf16. Errors: ValueError for shapes, dtypes or widths that do not fit;
    KernelUnavailableError where Triton cannot run.
    """
    _check(x, weight, None, None)
    normed: Tensor = _Norm.apply(x, None, weight, None, eps, False)
    return normed


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(normed, summed): summed = x + residual, of one shape and dtype, rounded to it; normed = rms_norm(summed)."""
    _check(x, weight, None, residual)
    normed, summed = _Norm.apply(x, residual, weight, None, eps, False)
    return normed, summed


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension of x [..., D]; as `rms_norm`."""
    _check(x, weight, bias, None)
    normed: Tensor = _Norm.apply(x, None, weight, bias, eps, True)
    return normed


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(normed, summed): summed = x + residual, of one shape and dtype, rounded to it; normed = layer_norm(summed)."""
    _check(x, weight, bias, residual)
    normed, summed = _Norm.apply(x, residual, weight, bias, eps, True)
    return normed, summed


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    width = x.shape[-1] if x.dim() else 0
    if not 0 < width <= MAX_WIDTH:
        raise ValueError(f"rows of 1 to {MAX_WIDTH} elements are normalised, not {tuple(x.shape)}")
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and other.shape != (width,):
            raise ValueError(f"the {name} of rows of {width} must be [{width}], not {tuple(other.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        found = f"{tuple(x.shape)} of {x.dtype} and {tuple(residual.shape)} of {residual.dtype}"
        raise ValueError(f"x and residual must have one shape and dtype, not {found}")
    tensors = [each for each in (x, weight, bias, residual) if each is not None]
    if wrong := [each.dtype for each in tensors if each.dtype not in DTYPES]:
        raise ValueError(f"the kernel takes fp32, fp16 and bf16, not {wrong[0]}")
    require_triton(*tensors)


def _rows(x: Tensor) -> Tensor:
    """[..., D] as [M, D] whose rows are contiguous, if they may be apart; copied only where that cannot be."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


class _Norm(torch.autograd.Function):
    """Keeps the summed rows, their statistics and the weight."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centre: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Add, normalise."""
        rows = _rows(x)
        count = len(rows)
        weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
        normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        summed = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        rstd = torch.empty(count, dtype=torch.float32, device=x.device)
        mean = torch.empty(count, dtype=torch.float32, device=x.device) if centre else None
        if count:
            added = None if residual is None else _rows(residual)
            _launch_forward(rows, added, (weight, bias), eps, (normed, summed, mean, rstd))
        ctx.save_for_backward(rows if summed is None else summed, weight, mean, rstd)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        return normed if summed is None else (normed, summed)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_normed: Tensor | None, d_summed: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """One pass over the rows; one tensor is the gradient of both x and the residual."""
        if d_normed is None:
            return d_summed, d_summed, None, None, None, None
        rows, weight, mean, rstd = ctx.saved_tensors
        shape = d_normed.shape
        rows = _rows(rows)
        of_weight, of_bias = ctx.needs_input_grad[2], ctx.needs_input_grad[3]
        dx = torch.empty(shape, dtype=rows.dtype, device=rows.device)
        partials = _partials(rows, of_weight, of_bias)
        if len(rows):
            upstream = (_rows(d_normed), None if d_summed is None else _rows(d_summed))
            _launch_backward(upstream, rows, weight, (mean, rstd), dx, partials)
        # fp32 sums of a fixed order over a fixed number of programs.
        dw, db = (None if each is None else each.sum(0) for each in partials)
        dw = None if dw is None else dw.to(weight.dtype)
        db = None if db is None else db.to(ctx.bias_dtype)
        return dx, dx if ctx.needs_input_grad[1] else None, dw, db, None, None


# --- launches ---------------------------------------------------------------------------------------------------------


def _options(width: int) -> dict[str, int]:
    """Rows and columns of a block, and warps: 16 elements a thread, two 16-byte loads of bf16 under way in each tensor.

    32 elements a thread for the widest rows, where 32 warps would leave each thread 64 registers. (LayerNorm's backward
    of 16384 just fits into the 128 that 16 warps leave; triton 3.6 spills up to 168 bytes of them.)
    """
    columns = max(next_power_of_2(width), 16)
    rows = max(2048 // columns, 1)
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": min(max(rows * columns // 512, 4), 16)}


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _partials(rows: Tensor, of_weight: bool, of_bias: bool) -> tuple[Tensor | None, Tensor | None]:
    """fp32 [programs, D] for the sums over rows that are wanted: as many programs as the processors hold at once."""
    count, width = rows.shape
    options = _options(width) if width <= FUSED_WIDTH else SUM_OPTIONS
    most = _processors(rows.device) * 16 // options["num_warps"] if width <= FUSED_WIDTH else SUM_PROGRAMS
    programs = min(ceil_div(count, options["ROWS"]), most)

    def partial(wanted: bool) -> Tensor | None:
        return torch.empty(programs, width, dtype=torch.float32, device=rows.device) if wanted else None

    return partial(of_weight), partial(of_bias)


def _launch_forward(
    rows: Tensor,
    residual: Tensor | None,
    parameters: tuple[Tensor, Tensor | None],
    eps: float,
    outputs: tuple[Tensor, Tensor | None, Tensor | None, Tensor],
) -> None:
    """What is absent is given as a tensor that is there; no kernel reads or writes it."""
    weight, bias = parameters
    normed, summed, mean, rstd = outputs
    count, width = rows.shape
    options = _options(width)
    _normalise[(ceil_div(count, options["ROWS"]),)](
        rows,
        rows if residual is None else residual,
        weight,
        weight if bias is None else bias,
        normed,
        normed if summed is None else summed,
        rstd if mean is None else mean,
        rstd,
        eps,
        count,
        width,
        rows.stride(0),
        rows.stride(0) if residual is None else residual.stride(0),
        ADD=residual is not None,
        CENTRE=mean is not None,
        BIAS=bias is not None,
        **options,
    )


def _launch_backward(
    upstream: tuple[Tensor, Tensor | None],
    rows: Tensor,
    weight: Tensor,
    statistics: tuple[Tensor | None, Tensor],
    dx: Tensor,
    partials: tuple[Tensor | None, Tensor | None],
) -> None:
    d_normed, d_summed = upstream
    mean, rstd = statistics
    count, width = rows.shape
    options = _options(width)
    summing = next((each for each in partials if each is not None), None)
    fused = summing is not None and width <= FUSED_WIDTH
    dw, db = partials if fused else (None, None)
    # Without sums each block of rows has a program of its own: enough of them hide the waiting for memory.
    grid = (len(summing) if summing is not None and fused else ceil_div(count, options["ROWS"]),)
    _differentiate[grid](
        d_normed,
        d_normed if d_summed is None else d_summed,
        rows,
        weight,
        rstd if mean is None else mean,
        rstd,
        dx,
        rstd if dw is None else dw,
        rstd if db is None else db,
        count,
        width,
        d_normed.stride(0),
        d_normed.stride(0) if d_summed is None else d_summed.stride(0),
        rows.stride(0),
        ADD=d_summed is not None,
        CENTRE=mean is not None,
        DW=dw is not None,
        DB=db is not None,
        STAGES=2 if fused else 1,
        **options,
    )
    if summing is not None and not fused:
        _sum_rows[(ceil_div(width, SUM_OPTIONS["COLUMNS"]), len(summing))](
            d_normed,
            rows,
            rstd if mean is None else mean,
            rstd,
            summing if partials[0] is None else partials[0],
            summing if partials[1] is None else partials[1],
            count,
            width,
            d_normed.stride(0),
            rows.stride(0),
            CENTRE=mean is not None,
            DW=partials[0] is not None,
            DB=partials[1] is not None,
            **SUM_OPTIONS,
        )


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _normalise(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    normed_ptr,
    summed_ptr,
    mean_ptr,
    rstd_ptr,
    eps,
    rows,
    columns,
    x_stride,
    residual_stride,
    ADD: tl.constexpr,
    CENTRE: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """[ROWS, COLUMNS] whole rows a program: s, its statistics, y. Outputs are contiguous."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)[None, :]
    inside = (m < rows)[:, None] & (c < columns)
    at = m[:, None] * columns + c
    w = tl.load(weight_ptr + c, mask=c < columns, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + m[:, None] * x_stride + c, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + m[:, None] * residual_stride + c, mask=inside, other=0.0).to(tl.float32)
        summed = cast(x, summed_ptr.dtype.element_ty)
        tl.store(summed_ptr + at, summed, mask=inside)
        x = summed.to(tl.float32)
    if CENTRE:
        mean = tl.sum(x, 1) / columns
        tl.store(mean_ptr + m, mean, mask=m < rows)
        x = tl.where(inside, x - mean[:, None], 0.0)
    square = tl.where(m < rows, tl.sum(x * x, 1) / columns, 1.0)  # rows that are not there have no 1 / 0 either
    rstd = tl.rsqrt(square + fp32(eps))
    tl.store(rstd_ptr + m, rstd, mask=m < rows)
    y = x * rstd[:, None] * w
    if BIAS:
        y += tl.load(bias_ptr + c, mask=c < columns, other=0.0).to(tl.float32)
    tl.store(normed_ptr + at, cast(y, normed_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _differentiate(
    d_normed_ptr,
    d_summed_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dw_ptr,
    db_ptr,
    rows,
    columns,
    d_normed_stride,
    d_summed_stride,
    x_stride,
    ADD: tl.constexpr,
    CENTRE: tl.constexpr,
    DW: tl.constexpr,
    DB: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Every num_programs-th block of rows: dx; with DW and DB the program's sums of dy xh and dy.

    ds is read where it is added, not with the others: that makes 64 registers, so four programs of 8 warps share a
    multiprocessor and 64 KB are under way; read at the beginning it makes 73, and spills on sm_80.
    """
    c = tl.arange(0, COLUMNS)[None, :]
    w = tl.load(weight_ptr + c, mask=c < columns, other=0.0).to(tl.float32)
    dw = tl.zeros((ROWS, COLUMNS), tl.float32)
    db = tl.zeros((ROWS, COLUMNS), tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        m = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (m < rows)[:, None] & (c < columns)
        x = tl.load(x_ptr + m[:, None] * x_stride + c, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(d_normed_ptr + m[:, None] * d_normed_stride + c, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + m, mask=m < rows, other=0.0)[:, None]
        if CENTRE:
            x -= tl.load(mean_ptr + m, mask=m < rows, other=0.0)[:, None]
            x = tl.where(inside, x, 0.0)
        xh = x * rstd
        g = dy * w
        dx = g - xh * (tl.sum(g * xh, 1) / columns)[:, None]
        if CENTRE:
            dx -= (tl.sum(g, 1) / columns)[:, None]
        dx *= rstd
        if ADD:
            dx += tl.load(d_summed_ptr + m[:, None] * d_summed_stride + c, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + m[:, None] * columns + c, cast(dx, dx_ptr.dtype.element_ty), mask=inside)
        if DW:
            dw += dy * xh
        if DB:
            db += dy
    at = tl.program_id(0) * columns + tl.arange(0, COLUMNS)
    there = tl.arange(0, COLUMNS) < columns
    if DW:
        tl.store(dw_ptr + at, tl.sum(dw, 0), mask=there)
    if DB:
        tl.store(db_ptr + at, tl.sum(db, 0), mask=there)


@triton.jit
def _sum_rows(
    d_normed_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    dw_ptr,
    db_ptr,
    rows,
    columns,
    d_normed_stride,
    x_stride,
    CENTRE: tl.constexpr,
    DW: tl.constexpr,
    DB: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums of dy xh and dy over every num_programs-th block of rows, for a block of columns."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    dw = tl.zeros((ROWS, COLUMNS), tl.float32)
    db = tl.zeros((ROWS, COLUMNS), tl.float32)
    for block in tl.range(tl.program_id(1), tl.cdiv(rows, ROWS), tl.num_programs(1), num_stages=2):
        m = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (m < rows)[:, None] & (c < columns)[None, :]
        dy = tl.load(d_normed_ptr + m[:, None] * d_normed_stride + c[None, :], mask=inside, other=0.0).to(tl.float32)
        if DW:
            xh = tl.load(x_ptr + m[:, None] * x_stride + c[None, :], mask=inside, other=0.0).to(tl.float32)
            if CENTRE:
                xh -= tl.load(mean_ptr + m, mask=m < rows, other=0.0)[:, None]
            dw += dy * xh * tl.load(rstd_ptr + m, mask=m < rows, other=0.0)[:, None]
        if DB:
            db += dy
    at = tl.program_id(1) * columns + c
    if DW:
        tl.store(dw_ptr + at, tl.sum(dw, 0), mask=c < columns)
    if DB:
        tl.store(db_ptr + at, tl.sum(db, 0), mask=c < columns)


# --- ahead of time ----------------------------------------------------------------------------------------------------

_STATISTICS = ("mean_ptr", "rstd_ptr", "dw_ptr", "db_ptr")
_SIZES = ("rows", "columns", "x_stride", "residual_stride", "d_normed_stride", "d_summed_stride")


def _ship(name: str, kernel: Any, pointers: tuple[str, ...], constants: dict[str, Any], width: int) -> Shipped:
    """One kernel for bf16 rows of `width`, whose strides are multiples of 16."""
    types = {**dict.fromkeys(pointers, "*bf16"), **dict.fromkeys(_STATISTICS, "*fp32"), "eps": "fp32"}
    types |= dict.fromkeys(_SIZES, "i32")
    names = kernel.arg_names
    return Shipped(
        name=f"{name} {width}",
        kernel=kernel,
        types={argument: word for argument, word in types.items() if argument in names},
        constants=constants,
        options=SUM_OPTIONS if kernel is _sum_rows else _options(width),
        divisible=tuple(size for size in _SIZES if size in names),
    )


def _ship_forward(name: str, width: int, **flags: bool) -> Shipped:
    pointers = ("x_ptr", "residual_ptr", "weight_ptr", "bias_ptr", "normed_ptr", "summed_ptr")
    return _ship(name, _normalise, pointers, {"ADD": False, "CENTRE": False, "BIAS": False, **flags}, width)


def _ship_backward(name: str, width: int, **flags: bool) -> Shipped:
    pointers = ("d_normed_ptr", "d_summed_ptr", "x_ptr", "weight_ptr", "dx_ptr")
    constants = {"ADD": False, "CENTRE": False, "DW": False, "DB": False, **flags}
    stages = 2 if constants["DW"] or constants["DB"] else 1
    return _ship(name, _differentiate, pointers, {**constants, "STAGES": stages}, width)


def shipped() -> list[Shipped]:
    """What is compiled ahead of time: bf16 rows of 4096, 8192 and the limit, with frozen and trained weights."""
    entries = []
    for width in (4096, 8192):
        entries += [
            _ship_forward("rms_norm forward", width),
            _ship_backward("rms_norm backward", width),
            _ship_forward("add_rms_norm forward", width, ADD=True),
            _ship_backward("add_rms_norm backward", width, ADD=True),
            _ship_backward("add_rms_norm backward with dw", width, ADD=True, DW=True),
            _ship_forward("add_layer_norm forward", width, ADD=True, CENTRE=True, BIAS=True),
            _ship_backward("add_layer_norm backward with dw, db", width, ADD=True, CENTRE=True, DW=True, DB=True),
        ]
    sums = {"CENTRE": True, "DW": True, "DB": True}
    return [
        *entries,
        _ship_backward("add_layer_norm backward", 8192, ADD=True, CENTRE=True),
        _ship_forward("add_rms_norm forward", MAX_WIDTH, ADD=True),
        _ship_backward("add_rms_norm backward", MAX_WIDTH, ADD=True),
        _ship("layer_norm dw, db", _sum_rows, ("d_normed_ptr", "x_ptr"), sums, MAX_WIDTH),
    ]
