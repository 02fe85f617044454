"""A linear head and the cross entropy of its rows, without ever building all logits.

Letters: N rows, C rows in one chunk, R rows in one row block, V vocabulary, D hidden width.

    loss = sum_n [ log sum_v exp(z_nv) - sum_v q_nv z_nv ],    z = h W^T,    dloss/dz = softmax(z) - q
    q_n = (1 - e) onehot(label(n)) + e / V

e is the label smoothing (arXiv 1512.00567, section 7); with 0 the loss is log sum_v exp(z_nv) - z_n,label(n).

Each chunk's logits turn into their own gradient in place while they are at hand, and from that into the gradients of h
and W; the backward pass only scales those. Nothing of size V outlives a chunk except W's gradient, when W trains.

Dtypes: the matrix products run in the autocast dtype where autocast is on, else in h's dtype. Softmax, the sum and W's
gradient are fp32 (fp64 for fp64 input).

Differs from Liger's fused linear cross entropy (arXiv 2410.10989): a sum rather than a mean, every row has a label, and
the fp32 softmax of torch goes through a few rows at a time, since on a CPU a fresh fp32 copy of a chunk's logits costs
more than the arithmetic on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["IGNORED", "Rows", "linear_cross_entropy", "reference_cross_entropy", "rows_in_torch"]

IGNORED = -100  # the label of a position that is not supervised

# Elements of one fp32 row block. 2^20 (4 MiB) stay in a core's cache; a GPU has no use for row blocks.
_BLOCK_ELEMENTS = 1 << 20
_ROW_MULTIPLE = 64  # positions in a product with the head, for few shapes

Rows = Callable[[Tensor, Tensor, bool, float], Tensor]
"""(logits [C, V], labels [C], gradient, smoothing) -> summed loss; with gradient, logits become softmax - q."""


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    chunk: int,
    smoothing: float = 0.0,
    rows: Rows | None = None,
) -> Tensor:
    """Sum over n of the cross entropy of softmax(weight @ hidden[n]) against labels[n], `chunk` positions at a time.

    Labels are in [0, V). smoothing: e in [0, 1). rows: what turns a chunk's logits into loss and gradient; torch's own
    if None. Returns an fp32 scalar (fp64 if `hidden_ND` is fp64), differentiable once with respect to
    `hidden_ND` and `weight_VD`.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, not {chunk}")
    device_type = hidden_ND.device.type
    autocast = torch.is_autocast_enabled(device_type)
    compute = torch.get_autocast_dtype(device_type) if autocast else hidden_ND.dtype
    # Inside a Function gradients are always off, so whether they are wanted has to be asked here.
    wanted = (hidden_ND.requires_grad, weight_VD.requires_grad) if torch.is_grad_enabled() else (False, False)
    how = (chunk, compute, rows or rows_in_torch, smoothing)
    loss: Tensor = _LinearCrossEntropy.apply(hidden_ND, weight_VD, labels_N, how, wanted)  # type: ignore[no-untyped-call]
    return loss


def reference_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, smoothing: float = 0.0) -> Tensor:
    """The same sum from all logits at once, by torch's own cross entropy; what the tests compare with."""
    logits_NV = F.linear(hidden_ND, weight_VD)
    precise = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    return F.cross_entropy(precise, labels_N, reduction="sum", ignore_index=IGNORED, label_smoothing=smoothing)


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, where the logits are; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        how: tuple[int, torch.dtype, Rows, float],
        wanted: tuple[bool, bool],
    ) -> Tensor:
        chunk, compute, rows, smoothing = how
        wants_hidden, wants_weight = wanted
        precise = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        with torch.autocast(hidden_ND.device.type, enabled=False):
            weight = weight_VD.to(compute)
            loss = torch.zeros((), dtype=precise, device=hidden_ND.device)
            d_hidden_ND = torch.empty_like(hidden_ND) if wants_hidden else None
            d_weight_VD = torch.zeros_like(weight_VD, dtype=precise) if wants_weight else None
            # A CPU compiles its low-precision product for each shape: zero rows, which add nothing, keep these few.
            compiled = not hidden_ND.is_cuda and compute not in (torch.float32, torch.float64)
            multiple = min(_ROW_MULTIPLE, chunk) if compiled else 1
            size = -(-min(chunk, max(len(labels_N), 1)) // multiple) * multiple
            logits_buffer = torch.empty(size, weight.shape[0], dtype=compute, device=hidden_ND.device)
            for start in range(0, len(labels_N), chunk):
                labels_C = labels_N[start : start + chunk]
                hidden_CD = _fill_rows(hidden_ND[start : start + chunk].to(compute), multiple)
                logits_CV = logits_buffer[: len(hidden_CD)]
                torch.mm(hidden_CD, weight.t(), out=logits_CV)
                loss += rows(logits_CV[: len(labels_C)], labels_C, any(wanted), smoothing)
                if d_hidden_ND is not None:
                    d_hidden_ND[start : start + chunk] = (logits_CV @ weight)[: len(labels_C)]
                if d_weight_VD is not None:
                    _add_product_(d_weight_VD, logits_CV.t(), hidden_CD)
        ctx.weight_dtype = weight_VD.dtype
        ctx.save_for_backward(d_hidden_ND, d_weight_VD)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden_ND, d_weight_VD = ctx.saved_tensors
        if d_hidden_ND is not None:
            d_hidden_ND = (d_hidden_ND * upstream).to(d_hidden_ND.dtype)
        if d_weight_VD is not None:
            d_weight_VD = (d_weight_VD * upstream).to(ctx.weight_dtype)
        return d_hidden_ND, d_weight_VD, None, None, None


def _fill_rows(hidden_CD: Tensor, multiple: int) -> Tensor:
    """Zero rows up to a multiple. Their logits are zero too, and so is what they give to the weight's gradient."""
    missing = -len(hidden_CD) % multiple
    return F.pad(hidden_CD, (0, 0, 0, missing)) if missing else hidden_CD


def rows_in_torch(logits_CV: Tensor, labels_C: Tensor, gradient: bool, smoothing: float = 0.0) -> Tensor:
    """The chunk's summed loss; with `gradient`, logits are overwritten by softmax - q.

    The softmax runs in fp32 (fp64 for fp64 logits), through one buffer of a few rows: the maximum is taken off first,
    and the label's entry is lowered by 1 before rounding, so that p - 1 keeps its relative precision where p is close
    to 1.
    """
    num_rows, vocabulary = logits_CV.shape
    precise = torch.promote_types(logits_CV.dtype, torch.float32)
    rows = num_rows if logits_CV.is_cuda else max(1, _BLOCK_ELEMENTS // vocabulary)
    buffer = torch.empty(min(rows, num_rows), vocabulary, dtype=precise, device=logits_CV.device)
    total = torch.zeros((), dtype=precise, device=logits_CV.device)
    for start in range(0, num_rows, rows):
        logits_RV = logits_CV[start : start + rows]
        label_R1 = labels_C[start : start + rows, None]
        p_RV = buffer[: len(logits_RV)].copy_(logits_RV)
        p_RV -= p_RV.amax(dim=-1, keepdim=True)
        shifted_R1 = p_RV.gather(1, label_R1)
        if smoothing:
            shifted_R1 = (1 - smoothing) * shifted_R1 + smoothing * p_RV.mean(dim=-1, keepdim=True)
        p_RV.exp_()
        sum_R1 = p_RV.sum(dim=-1, keepdim=True)
        total += (sum_R1.log() - shifted_R1).sum()
        if gradient:
            p_RV /= sum_R1
            if smoothing:
                p_RV -= smoothing / vocabulary
            p_RV.scatter_(1, label_R1, p_RV.gather(1, label_R1) - (1 - smoothing))
            logits_RV.copy_(p_RV)
    return total


def _add_product_(total_VD: Tensor, left_VC: Tensor, right_CD: Tensor) -> None:
    """total += left @ right. A product of a lower dtype is added a block of rows at a time, through one buffer."""
    if left_VC.dtype == total_VD.dtype:
        total_VD.addmm_(left_VC, right_CD)
        return
    vocabulary, width = total_VD.shape
    rows = vocabulary if total_VD.is_cuda else max(1, _BLOCK_ELEMENTS // width)
    product = torch.empty(min(rows, vocabulary), width, dtype=left_VC.dtype, device=total_VD.device)
    precise = torch.empty_like(product, dtype=total_VD.dtype)
    for start in range(0, vocabulary, rows):
        part_VC = left_VC[start : start + rows]
        torch.mm(part_VC, right_CD, out=product[: len(part_VC)])
        total_VD[start : start + rows] += precise[: len(part_VC)].copy_(product[: len(part_VC)])
