"""A linear head and the cross entropy of its rows, without ever building all logits.

Letters: N rows, n of them with a label, C rows of one chunk, D hidden width, V vocabulary, e label smoothing, T the
temperature and m the mix of soft targets, t the teacher's logits.

    z = h W^T        lse = log sum_v exp(z_v)
    hard = lse - (1 - e) z_label - e mean_v z_v                       (torch's cross_entropy with label_smoothing)
    soft = T^2 KL(softmax(t / T) || softmax(z / T))                   (Hinton et al., arXiv 1503.02531)
    loss = sum_n [ (1 - m) hard + m soft + z_loss lse^2 ]             (z loss: PaLM, arXiv 2204.02311)
    dloss/dz = (1 - m) (softmax(z) - (1 - e) onehot(label) - e / V) + m T (softmax(z / T) - softmax(t / T))
               + 2 z_loss lse softmax(z)

The gradients are made in the forward pass, where the logits are: a chunk's logits turn into their own gradient in
place, and from that into the gradients of h and W; the backward pass only scales those by the upstream gradient, which
it reads on the device. Without gradients (torch.no_grad, or nothing that wants one) the second pass over the logits
and these products are left out. Rows without a label are removed before the head.

Dtypes: the products run in the autocast dtype where autocast is on, else in h's dtype, with fp32 accumulation; logits
and their gradient are stored in that dtype. Softmax, each row's loss and the sum are fp32; W's gradient is an fp32 sum
over the chunks, rounded once. Gradients of fp16 logits are stored 64 times larger (and scaled back inside the next
product): a probability of 1e-6 is a subnormal number there; 2 z_loss lse must stay below 1000. No atomics: a row's loss
is one program's, and torch sums.

Work for n rows on an H100 (798 TFLOP/s, 3.0 TB/s; n = 8192, D = 4096, V = 128256): 2 n D V FLOPs a product, 10.8 ms;
2 products with a frozen head, 3 with a trained one. The row kernel moves 4 n V bytes of bf16 logits, 1.4 ms, if its
second reading comes from a cache. `rows_per_chunk` has the rest. Memory: one chunk of logits (two where the teacher's
are made here), h's gradient for n rows, 4 D V bytes for W's, later beside the scaled one; a copy of W if its dtype is
not the products'.

Differs from Liger's fused linear cross entropy (arXiv 2410.10989): a sum rather than a mean; rows without a label cost
nothing; chunks four times as large, so that W is read a quarter as often; W's gradient in fp32; no waiting for the
device but to count rows. Differs from Apple's cut cross entropy (arXiv 2411.09009): logits are made once, not twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ftlab_kernels.aot import ARCHITECTURES, Shipped
from ftlab_kernels.common import cast, ceil_div, fp32, next_power_of_2, require_triton, tl, triton

__all__ = ["SoftTargets", "linear_cross_entropy", "reference", "rows_per_chunk", "shipped"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FP16_SCALE = 64.0
ALIGN = 16  # elements: rows of a buffer start where 16-byte accesses and cuBLAS want them, whatever V is
TILE = 128  # rows of a matrix product's tile
SCALE_OPTIONS = {"BLOCK": 4096, "num_warps": 4}  # 32 elements a thread
LOWEST = -1e30  # stands for "no logit"; finite, so that no difference of two is NaN
_LOWEST = tl.constexpr(LOWEST)
_LOG2E = tl.constexpr(math.log2(math.e))


@dataclass(frozen=True)
class SoftTargets:
    """What a teacher says of the N rows, for distillation; no gradient flows to it.

    Either logits [N, V], or hidden [N, E] and weight [V, E], of which the teacher's logits are made chunk by chunk.
    The loss of a row is (1 - mix) * cross entropy + mix * T^2 * KL(teacher || student), both at temperature T inside
    the KL. Rows without a label have no soft target either. The teacher's logits must be finite or -inf.
    """

    logits: Tensor | None = None
    hidden: Tensor | None = None
    weight: Tensor | None = None
    temperature: float = 1.0
    mix: float = 0.5

    def __post_init__(self) -> None:
        there = [name for name in ("logits", "hidden", "weight") if getattr(self, name) is not None]
        if there not in (["logits"], ["hidden", "weight"]):
            raise ValueError("soft targets are either logits, or hidden and weight")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, not {self.temperature}")
        if not 0 <= self.mix <= 1:
            raise ValueError(f"mix must be in [0, 1], not {self.mix}")

    def tensors(self) -> list[Tensor]:
        """Those that are there: logits, or hidden and weight."""
        return [x for x in (self.logits, self.hidden, self.weight) if x is not None]


def reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_targets: SoftTargets | None = None,
) -> Tensor:
    """The same sum from all logits at once, in plain torch; fp64 for fp64 input."""
    if ignore_index is None:
        ignore_index = -100
    kept = labels != ignore_index
    logits = F.linear(hidden, weight.to(hidden.dtype))
    precise = torch.promote_types(logits.dtype, torch.float32)
    logits = logits[kept].to(precise)
    loss = F.cross_entropy(logits, labels[kept], reduction="sum", label_smoothing=label_smoothing)
    if soft_targets is not None:
        with torch.no_grad():
            teacher = soft_targets.logits
            if teacher is None:
                assert soft_targets.hidden is not None
                assert soft_targets.weight is not None
                teacher = F.linear(soft_targets.hidden, soft_targets.weight.to(soft_targets.hidden.dtype))
        t, m = soft_targets.temperature, soft_targets.mix
        wanted = F.log_softmax(teacher[kept].to(precise) / t, -1)
        soft = F.kl_div(F.log_softmax(logits / t, -1), wanted, reduction="sum", log_target=True)
        loss = (1 - m) * loss + m * t * t * soft
    return loss + z_loss * torch.logsumexp(logits, -1).square().sum()


def rows_per_chunk(vocabulary: int, width: int, *, trainable: bool) -> int:
    """How many rows of logits are made at once: a multiple of 128 in 256 .. 4096.

    A product of C rows takes 2 C D V / 798e12 s and reads the 2 D V bytes of a bf16 W in 2 D V / 3.0e12 s: equal at
    C = 266, so below that W's bytes are the limit. 1024 rows hide them. With a frozen head more rows only help until
    the tiles of the second product, [C, D] in pieces of 128 x 256, fill the 132 multiprocessors once: C = 2^22 / D.
    The logits of a chunk stay within 2^27 elements (268 MB of bf16).

    A trainable head adds each chunk's product to its fp32 gradient, 8 D V bytes of traffic a chunk against 6 C D V
    FLOPs: 35% of the time at 1024 rows, 17% at 2048, 9% at 4096. So it takes up to 4096 rows within 2^28 elements.

    V = 128256, D = 4096: 1024 rows frozen, 2048 trainable.
    """
    wanted = 4096 if trainable else min(max(1024, 2**22 // max(width, 1)), 4096)
    fitting = (2**28 if trainable else 2**27) // vocabulary
    return max(min(wanted, fitting) // TILE * TILE, 256)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int | None = None,
    soft_targets: SoftTargets | None = None,
) -> Tensor:
    """The summed loss of the rows of hidden [N, D] under the head weight [V, D]: an fp32 scalar, differentiable once.

    labels: int64 [N]. ignore_index: the label of rows that are left out; None promises that every row has a label.
    The sizes of the products have to be known on the host, so leaving rows out waits for the device once (to count
    them); with None nothing waits, so gather the rows before where the labels are at hand on the CPU. With no row left
    the loss is 0 and the gradients are zeros.

    A label outside [0, V) that is not ignore_index makes the loss and the gradient of its row NaN, and through W's
    gradient all of that: nothing is read out of bounds, nothing waits to look, and the run cannot go on unnoticed. So
    does ignore_index in a row where None promised that there is none.

    label_smoothing: as in torch.nn.functional.cross_entropy. z_loss: the factor of lse^2. chunk: rows of logits at a
    time; None: `rows_per_chunk`, divided evenly. A head with a bias: a column of W, and ones in hidden.

    Errors: ValueError for shapes, dtypes or numbers that do not fit; KernelUnavailableError where Triton cannot run.
    """
    _check(hidden, weight, labels, soft_targets)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], not {label_smoothing}")
    if not z_loss >= 0:
        raise ValueError(f"z_loss must be at least 0, not {z_loss}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, not {chunk}")
    require_triton(hidden, weight, labels, *(soft_targets.tensors() if soft_targets else ()))
    # Inside a Function gradients are always off, so whether they are wanted has to be asked here.
    wanted = (hidden.requires_grad, weight.requires_grad) if torch.is_grad_enabled() else (False, False)
    rows = None
    if ignore_index is not None:
        rows = torch.nonzero(labels != ignore_index).squeeze(1)
        rows = None if len(rows) == len(labels) else rows
    teacher = soft_targets.hidden if soft_targets else None
    dtypes = (_product_dtype(hidden), _product_dtype(hidden if teacher is None else teacher))
    how = _How(float(label_smoothing), float(z_loss), soft_targets, chunk, *dtypes, rows)
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, how, wanted)
    return loss


def _product_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, soft: SoftTargets | None) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or len(weight) == 0:
        found = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"hidden must be [N, D] and weight [V, D] with V > 0, not {found}")
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 [{len(hidden)}], not {labels.dtype} {tuple(labels.shape)}")
    teacher = soft.tensors() if soft else []
    if wrong := [x.dtype for x in (hidden, weight, *teacher) if x.dtype not in DTYPES]:
        raise ValueError(f"the kernel takes fp32, fp16 and bf16, not {wrong[0]}")
    rows, vocabulary = len(hidden), len(weight)
    shapes = [tuple(x.shape) for x in teacher]
    if len(shapes) == 1 and shapes[0] != (rows, vocabulary):
        raise ValueError(f"the teacher's logits must be [{rows}, {vocabulary}], not {shapes[0]}")
    if len(shapes) == 2 and shapes != [(rows, *shapes[0][1:2]), (vocabulary, *shapes[0][1:2])]:
        raise ValueError(f"the teacher's hidden and weight must be [{rows}, E] and [{vocabulary}, E], not {shapes}")


@dataclass(frozen=True)
class _How:
    """What a call was asked for; compute: the products' dtype, here and for the teacher. rows: None for all."""

    label_smoothing: float
    z_loss: float
    soft: SoftTargets | None
    chunk: int | None
    compute: torch.dtype
    teacher_compute: torch.dtype
    rows: Tensor | None


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, how: _How, wanted: tuple[bool, bool]
    ) -> Tensor:
        """All chunks."""
        with torch.autocast(hidden.device.type, enabled=False):
            loss, d_hidden, d_weight = _all_chunks(hidden, weight, labels, how, wanted)
        ctx.save_for_backward(d_hidden, d_weight, how.rows)
        ctx.shape, ctx.dtypes = hidden.shape, (hidden.dtype, weight.dtype)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Scale; rows that had no label get zeros."""
        d_hidden, d_weight, rows = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = _scaled(d_hidden, upstream, ctx.dtypes[0])
            if rows is not None:
                whole = torch.zeros(ctx.shape, dtype=d_hidden.dtype, device=d_hidden.device)
                d_hidden = whole.index_copy_(0, rows, d_hidden)
        if d_weight is not None:
            d_weight = _scaled(d_weight, upstream, ctx.dtypes[1])
        return d_hidden, d_weight, None, None, None


def _all_chunks(
    hidden: Tensor, weight: Tensor, labels: Tensor, how: _How, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, the gradient of the rows of h that have a label (in the compute dtype), and W's in fp32."""
    vocabulary, width = weight.shape
    weight = weight.to(how.compute)
    labels = labels.contiguous() if how.rows is None else labels.index_select(0, how.rows)
    num_rows, device = len(labels), hidden.device
    chunk = how.chunk or _even(num_rows, rows_per_chunk(vocabulary, width, trainable=wanted[1]))
    losses = torch.empty(num_rows, dtype=torch.float32, device=device)
    buffer = _logits_buffer(min(chunk, num_rows), vocabulary, how.compute, device)
    teacher = _Teacher(how.soft, min(chunk, num_rows), how.teacher_compute) if how.soft else None
    d_hidden = torch.empty(num_rows, width, dtype=how.compute, device=device) if wanted[0] else None
    d_weight = torch.empty(vocabulary, width, dtype=torch.float32, device=device) if wanted[1] else None
    scale = FP16_SCALE if how.compute == torch.float16 else 1.0
    for start in range(0, num_rows, chunk):
        part = slice(start, min(start + chunk, num_rows))
        rows = None if how.rows is None else how.rows[part]
        part_hidden = (hidden[part] if rows is None else hidden.index_select(0, rows)).to(how.compute)
        logits = buffer[: len(part_hidden)]
        real = logits[:, :vocabulary]
        torch.mm(part_hidden, weight.t(), out=real)
        soft = teacher.chunk(part, rows) if teacher else None
        _launch(logits, labels[part], losses[part], how, (vocabulary, scale if any(wanted) else None), soft)
        if d_hidden is not None:
            to = d_hidden[part]
            torch.addmm(to, real, weight, beta=0, alpha=1 / scale, out=to)
        if d_weight is not None:  # the first product needs no zeros to be added to
            _add_product_(d_weight, real.t(), part_hidden, beta=int(start > 0), alpha=1 / scale)
    if d_weight is not None and num_rows == 0:
        d_weight.zero_()
    return losses.sum(), d_hidden, d_weight


def _even(num_rows: int, most: int) -> int:
    """Chunks of about equal size, in whole tiles: a last chunk of a few rows would read all of W for them."""
    return ceil_div(ceil_div(max(num_rows, 1), ceil_div(max(num_rows, 1), most)), TILE) * TILE


def _logits_buffer(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[rows, V rounded up to ALIGN]."""
    return torch.empty(rows, ceil_div(vocabulary, ALIGN) * ALIGN, dtype=dtype, device=device)


def _add_product_(total: Tensor, left: Tensor, right: Tensor, beta: int, alpha: float) -> None:
    """total = beta * total + alpha * left @ right in fp32."""
    if left.dtype != total.dtype and total.is_cuda:
        torch.addmm(total, left, right, out_dtype=torch.float32, beta=beta, alpha=alpha, out=total)
    else:  # the CPU, in the interpreter, has no product of 16-bit numbers that is given in fp32
        total.addmm_(left.to(total.dtype), right.to(total.dtype), beta=beta, alpha=alpha)


class _Teacher:
    """The teacher's logits of a chunk: those given, or made in a buffer."""

    def __init__(self, soft: SoftTargets, chunk: int, compute: torch.dtype) -> None:
        self.logits = soft.logits
        if self.logits is not None:
            self.logits = self.logits if self.logits.stride(1) == 1 else self.logits.contiguous()
            return
        assert soft.hidden is not None
        assert soft.weight is not None
        self.hidden, self.weight = soft.hidden, soft.weight.to(compute)
        self.buffer = _logits_buffer(chunk, len(self.weight), compute, self.hidden.device)

    def chunk(self, part: slice, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Logits, and which of their rows belong to the chunk (None: the first ones)."""
        if self.logits is not None:
            return (self.logits[part], None) if rows is None else (self.logits, rows)
        hidden = (self.hidden[part] if rows is None else self.hidden.index_select(0, rows)).to(self.weight.dtype)
        logits = self.buffer[: len(hidden)]
        torch.mm(hidden, self.weight.t(), out=logits[:, : len(self.weight)])
        return logits, None


# --- kernels ----------------------------------------------------------------------------------------------------------


def _launch(
    logits: Tensor,
    labels: Tensor,
    losses: Tensor,
    how: _How,
    size: tuple[int, float | None],
    soft: tuple[Tensor, Tensor | None] | None,
) -> None:
    """Losses of a chunk's rows; logits [C, V padded] become their gradient times a scale, unless that is None."""
    vocabulary, scale = size
    teacher, rows = soft or (logits, None)
    temperature, mix = (how.soft.temperature, how.soft.mix) if how.soft else (1.0, 0.0)
    _row_losses[(len(logits),)](
        logits,
        labels,
        losses,
        teacher,
        labels if rows is None else rows,
        vocabulary,
        logits.shape[1],
        teacher.stride(0),
        teacher.shape[1],
        how.label_smoothing,
        how.z_loss,
        1 / temperature,
        mix,
        1.0 if scale is None else scale,
        GRADIENT=scale is not None,
        SMOOTH=how.label_smoothing > 0,
        SOFT=soft is not None,
        GATHER=rows is not None,
        EVEN=vocabulary % ALIGN == 0,
        **_options(vocabulary, soft is not None),
    )


def _options(vocabulary: int, soft: bool) -> dict[str, int]:
    """Warps of a row's program, and the lines of 8 elements that it takes at a time. By arithmetic, not measured.

    Two lines a thread are two 16-byte loads under way, 32 KB for 32 warps, where 3 TB/s need about 18 KB on each of the
    132 multiprocessors. The second reading should find the rows at work in the L2 cache of 50 MB: V / 4096 warps make
    that 1 row a multiprocessor for V = 128256 (41 registers; 34 MB of bf16), 3 or 4 for V = 49152 (39 to 52 MB).
    With a teacher one line of each: two would spill.
    """
    warps = min(max(next_power_of_2(ceil_div(vocabulary, 4096)), 4), 32)
    return {"LINES": warps * (32 if soft else 64), "num_warps": warps}


@triton.jit
def _exp(x):
    """e^x; a result below 2^-126 is 0, which saves three of its five instructions."""
    return tl.exp2(x * _LOG2E)


@triton.jit
def _read(row_ptr, v, limit, vocabulary, EVEN: tl.constexpr, FINITE: tl.constexpr, EVICT: tl.constexpr):
    """Logits of a row in fp32. Outside the vocabulary: -inf, or with FINITE _LOWEST, as all below that. NaN stays."""
    x = tl.load(row_ptr + v, mask=v < limit, other=float("-inf"), eviction_policy=EVICT).to(tl.float32)
    if not EVEN:  # the row goes on behind the vocabulary, with anything
        x = tl.where(v < vocabulary, x, float("-inf"))
    return tl.where(x < _LOWEST, _LOWEST, x) if FINITE else x


@triton.jit
def _scan(
    row_ptr,
    teacher_ptr,
    vocabulary,
    padded,
    teacher_limit,
    inverse_t,
    SMOOTH: tl.constexpr,
    SOFT: tl.constexpr,
    EVEN: tl.constexpr,
    LINES: tl.constexpr,
):
    """One reading: maximum, sum of exponentials, sum; with SOFT those of z / T and t / T and sum of exp(t / T) (t - z).

    Each thread keeps its own maxima and sums over the lines it reads, so the loop has no exchange between threads.
    """
    at = tl.arange(0, LINES)[:, None] * 8 + tl.arange(0, 8)[None, :]
    peak = tl.full((LINES,), _LOWEST, tl.float32)
    total = tl.zeros((LINES,), tl.float32)
    linear = tl.zeros((LINES,), tl.float32)
    warm = tl.zeros((LINES,), tl.float32)
    t_peak = tl.full((LINES,), _LOWEST, tl.float32)
    t_total = tl.zeros((LINES,), tl.float32)
    cross = tl.zeros((LINES,), tl.float32)
    for start in range(0, padded, LINES * 8):
        v = start + at
        z = _read(row_ptr, v, padded, vocabulary, EVEN, SOFT, "evict_last")
        higher = tl.maximum(peak, tl.max(z, 1))
        total = total * _exp(peak - higher) + tl.sum(_exp(z - higher[:, None]), 1)
        if SMOOTH:
            linear += tl.sum(tl.where(v < vocabulary, z, 0.0), 1)
        if SOFT:
            warm = warm * _exp((peak - higher) * inverse_t)
            warm += tl.sum(_exp((z - higher[:, None]) * inverse_t), 1)
            t = _read(teacher_ptr, v, teacher_limit, vocabulary, False, True, "evict_last")
            t_higher = tl.maximum(t_peak, tl.max(t, 1))
            fade = _exp((t_peak - t_higher) * inverse_t)
            e = _exp((t - t_higher[:, None]) * inverse_t)
            t_total = t_total * fade + tl.sum(e, 1)
            cross = cross * fade + tl.sum(e * (t - z), 1)
            t_peak = t_higher
        peak = higher
    top = tl.max(peak, 0)
    t_top = tl.max(t_peak, 0)
    fade = _exp((t_peak - t_top) * inverse_t)  # 0 for a thread that met no logit
    total = tl.sum(total * _exp(peak - top), 0)
    warm = tl.sum(warm * _exp((peak - top) * inverse_t), 0)
    return top, total, tl.sum(linear, 0), warm, t_top, tl.sum(t_total * fade, 0), tl.sum(cross * fade, 0)


@triton.jit
def _row_losses(
    logits_ptr,
    labels_ptr,
    losses_ptr,
    teacher_ptr,
    teacher_rows_ptr,
    vocabulary,
    padded,
    teacher_stride,
    teacher_limit,
    label_smoothing,
    z_loss,
    inverse_t,
    mix,
    scale,
    GRADIENT: tl.constexpr,
    SMOOTH: tl.constexpr,
    SOFT: tl.constexpr,
    GATHER: tl.constexpr,
    EVEN: tl.constexpr,
    LINES: tl.constexpr,
):
    """One row a program: its loss, and with GRADIENT the logits replaced by scale * dloss/dz.

    The second reading goes from the end of the row to its start: what was read last is the likeliest to be cached.
    """
    row = tl.program_id(0).to(tl.int64)
    teacher_row = tl.load(teacher_rows_ptr + row) if GATHER else row
    row_ptr = logits_ptr + row * padded
    teacher_ptr += teacher_row * teacher_stride
    smoothing, inverse_t, mix, scale = fp32(label_smoothing), fp32(inverse_t), fp32(mix), fp32(scale)
    label = tl.load(labels_ptr + row)
    valid = (label >= 0) & (label < vocabulary)
    poison = tl.where(valid, 0.0, float("nan"))
    place = label.to(tl.int32)
    # Read before any thread writes: the reductions at the end of _scan are a barrier for the whole program.
    z_label = tl.load(row_ptr + label, mask=valid, other=0.0).to(tl.float32)
    top, total, linear, warm, t_top, t_total, cross = _scan(
        row_ptr, teacher_ptr, vocabulary, padded, teacher_limit, inverse_t, SMOOTH, SOFT, EVEN, LINES
    )
    # Differences to the maximum first: log-sum-exp itself has lost the digits that matter where logits are large.
    hard = tl.log(total) + (1.0 - smoothing) * (top - z_label)
    if SMOOTH:
        hard += smoothing * (top - linear / vocabulary)
    lse = top + tl.log(total)
    loss = (1.0 - mix) * hard + fp32(z_loss) * lse * lse
    if SOFT:
        kl = tl.log(warm) - tl.log(t_total) + (cross / t_total - (t_top - top)) * inverse_t
        loss += mix * kl / (inverse_t * inverse_t)
    tl.store(losses_ptr + row, loss + poison)
    if GRADIENT:
        of_p = scale * (1.0 - mix + 2.0 * fp32(z_loss) * lse) / total + poison
        of_label = scale * (1.0 - mix) * (1.0 - smoothing)
        of_all = scale * (1.0 - mix) * smoothing / vocabulary
        if SOFT:
            of_warm = scale * mix / (inverse_t * warm)
            of_teacher = scale * mix / (inverse_t * t_total)
        at = tl.arange(0, LINES)[:, None] * 8 + tl.arange(0, 8)[None, :]
        blocks = tl.cdiv(padded, LINES * 8)
        for index in range(blocks):
            v = (blocks - 1 - index) * (LINES * 8) + at
            z = _read(row_ptr, v, padded, vocabulary, EVEN, SOFT, "evict_first") - top
            g = _exp(z) * of_p
            if SMOOTH:
                g -= of_all
            if SOFT:
                t = _read(teacher_ptr, v, teacher_limit, vocabulary, False, True, "evict_first") - t_top
                g += _exp(z * inverse_t) * of_warm - _exp(t * inverse_t) * of_teacher
            g = tl.where(v == place, g - of_label, g)  # before rounding: p - 1 keeps its digits where p is near 1
            tl.store(row_ptr + v, cast(g, logits_ptr.dtype.element_ty), mask=v < padded)


def _scaled(x: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """x * upstream, rounded once to dtype; torch would round a scalar on the device to x's dtype first."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.numel():
        _scale[(ceil_div(x.numel(), SCALE_OPTIONS["BLOCK"]),)](x, out, upstream, x.numel(), **SCALE_OPTIONS)
    return out


@triton.jit
def _scale(x_ptr, out_ptr, upstream_ptr, count, BLOCK: tl.constexpr):
    """out = x * upstream for contiguous x."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    y = x * tl.load(upstream_ptr).to(tl.float32)
    tl.store(out_ptr + at, cast(y, out_ptr.dtype.element_ty), mask=inside)


def shipped() -> list[Shipped]:
    """What is compiled ahead of time: the row kernel for even and odd vocabularies, and the scaling.

    The products are torch's, so no tensor core instruction stands here; MUFU makes the exponentials.
    """
    integers = ("vocabulary", "padded", "teacher_stride", "teacher_limit")
    numbers = ("label_smoothing", "z_loss", "inverse_t", "mix", "scale")
    plain = {"GRADIENT": True, "SMOOTH": False, "SOFT": False, "GATHER": False}
    variants: list[tuple[str, str, int, dict[str, bool]]] = [
        ("gradient", "bf16", 128256, {}),
        ("gradient", "fp16", 128256, {}),
        ("gradient", "fp32", 128256, {}),
        ("loss only", "bf16", 128256, {"GRADIENT": False}),
        ("smoothed", "bf16", 128256, {"SMOOTH": True}),
        ("distilled", "bf16", 128256, {"SMOOTH": True, "SOFT": True, "GATHER": True}),
        ("gradient", "bf16", 49152, {}),
        ("distilled", "bf16", 49152, {"SOFT": True}),
        ("gradient", "bf16", 50257, {}),
        ("distilled", "bf16", 50257, {"SOFT": True}),
        ("gradient", "bf16", 32000, {}),
        ("distilled", "bf16", 151643, {"SMOOTH": True, "SOFT": True, "GATHER": True}),
        ("gradient", "bf16", 4099, {}),
    ]
    rows = [
        Shipped(
            name=f"linear cross entropy {name}, {dtype}, V = {vocabulary}",
            kernel=_row_losses,
            types={"labels_ptr": "*i64", "losses_ptr": "*fp32", "teacher_rows_ptr": "*i64"}
            | dict.fromkeys(("logits_ptr", "teacher_ptr"), f"*{dtype}")
            | dict.fromkeys(integers, "i32")
            | dict.fromkeys(numbers, "fp32"),
            constants={**plain, **changes, "EVEN": vocabulary % ALIGN == 0},
            options=_options(vocabulary, "SOFT" in changes),
            # A given teacher's rows are V long, and read one element at a time where that is odd.
            divisible=integers if vocabulary % ALIGN == 0 else ("padded",),
            expects={arch: [("LDG",), ("MUFU",)] for arch in ARCHITECTURES},
        )
        for name, dtype, vocabulary, changes in variants
    ]
    scaling = [
        Shipped(
            name=f"linear cross entropy scale, {source} to {target}",
            kernel=_scale,
            types={"x_ptr": f"*{source}", "out_ptr": f"*{target}", "upstream_ptr": "*fp32", "count": "i32"},
            constants={},
            options=SCALE_OPTIONS,
            divisible=("count",),
            expects={arch: [("LDG",), ("STG",)] for arch in ARCHITECTURES},
        )
        for source, target in (("bf16", "bf16"), ("fp32", "bf16"), ("fp32", "fp32"))
    ]
    return rows + scaling
