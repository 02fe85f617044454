"""The operations of a training step on a CPU: torch's matrix products with compiled C between them (native.c).

Letters: M rows (all leading dimensions), D width, H query heads, K key/value heads, E width of a head, T positions,
S = P + T key positions, R rank of all adapters together.

Each function has the signature and the mathematics of the Triton kernel of the same name, and its reference. Storage is
fp32 or bf16, sums and functions are fp32, and every result is rounded once. What the C computes does not depend on the
number of threads; torch's products may in their last bits. Where a dtype or layout is not one of these, the caller
takes the reference (`takes`).

Why C: between the matrix products of a step lie some forty passes over small tensors, and on a processor with matrix
units torch's own passes take several times as long as the products. Fused, each tensor is read once and written once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ftlab_kernels import nf4
from ftlab_kernels.native import SUFFIXES, call
from ftlab_kernels.random import GROUP, draw_seed, keep_scale, threshold

__all__ = [
    "add_rms_norm",
    "causal_attention",
    "cross_entropy_",
    "dropout",
    "lora_linears",
    "nf4_dequantise",
    "rms_norm",
    "rope",
    "swiglu",
    "takes",
]


def _exact(function: Callable[..., Any]) -> Callable[..., Any]:
    """Inside a Function every dtype is chosen by hand: autocast must not change it."""

    @functools.wraps(function)
    def without_autocast(*arguments: Any) -> Any:
        if not torch.is_autocast_enabled("cpu"):
            return function(*arguments)
        with torch.autocast("cpu", enabled=False):
            return function(*arguments)

    return without_autocast


def takes(*tensors: Tensor) -> bool:
    """Whether these tensors are of one dtype that the library knows, and on the CPU."""
    dtype = tensors[0].dtype
    return dtype in SUFFIXES and all(x.dtype == dtype and x.device.type == "cpu" for x in tensors)


def _check(name: str, *tensors: Tensor, fit: bool = True) -> None:
    """Refuse what the library would misread: it is told addresses and sizes, and sees neither dtypes nor shapes."""
    if not takes(*tensors):
        kinds = sorted({f"{str(x.dtype).removeprefix('torch.')} on {x.device.type}" for x in tensors})
        raise ValueError(f"{name} takes tensors of fp32, or of bf16, on a CPU, not {' and '.join(kinds)}")
    if not fit:
        raise ValueError(f"{name}: shapes that do not fit together: {', '.join(str(tuple(x.shape)) for x in tensors)}")


# --- norm -------------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight: [..., D] -> [..., D]."""
    _check("rms_norm", x, fit=weight.shape == x.shape[-1:])
    y: Tensor = _RMSNorm.apply(x, None, weight, eps)[0]
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(s), s) with s = x + residual, rounded to their dtype: [..., D] each."""
    _check("add_rms_norm", x, residual, fit=residual.shape == x.shape and weight.shape == x.shape[-1:])
    both: tuple[Tensor, Tensor] = _RMSNorm.apply(x, residual, weight, eps)
    return both


class _RMSNorm(torch.autograd.Function):
    """Keeps the normalised tensor's input and 1 / rms of each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        rows, width = x.numel() // x.shape[-1], x.shape[-1]
        scale = weight.detach().float().contiguous()
        y = torch.empty_like(x)
        rstd = torch.empty(rows, dtype=torch.float32)
        total = x
        if residual is not None:
            residual, total = residual.contiguous(), torch.empty_like(x)
        call("rms_norm", x.dtype, x, residual, scale, total, y, rstd, rows, width, float(eps))
        ctx.save_for_backward(total, scale, rstd)
        ctx.added, ctx.weight_dtype = residual is not None, weight.dtype
        if residual is None:
            ctx.mark_non_differentiable(total := total.detach())
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        total, scale, rstd = ctx.saved_tensors
        dy = dy.contiguous()
        rows, width = len(rstd), scale.shape[0]
        dx = dweight = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            dx = torch.empty_like(total)
            direct = dtotal.contiguous() if ctx.added else None
            call("rms_norm_backward", total.dtype, dy, direct, total, scale, rstd, dx, rows, width)
        if ctx.needs_input_grad[2]:
            dweight = torch.empty_like(scale)
            call("rms_norm_weight", total.dtype, dy, total, rstd, dweight, rows, width)
            dweight = dweight.to(ctx.weight_dtype)
        return dx, dx if ctx.added else None, dweight, None


# --- weights of 4 bits ------------------------------------------------------------------------------------------------


def nf4_dequantise(codes: Tensor, magnitudes: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers of 4 bits, uint8 [blocks, 32], times fp32 [blocks]: [blocks, 64] of `dtype`, fp32 or bf16."""
    nf4.check(codes, magnitudes, dtype)
    out = torch.empty(len(codes), nf4.BLOCK, dtype=dtype, device=codes.device)
    _check("nf4_dequantise", out)
    levels = nf4.level_table(codes.device)
    call("nf4_dequantise", dtype, codes.contiguous(), magnitudes.contiguous(), levels, out, len(codes))
    return out


# --- rotary positions -------------------------------------------------------------------------------------------------


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turn q [B, T, H, E] and k [B, T, K, E] by their positions' angles; cos, sin: fp32 [B or 1, T, 1, E / 2]."""
    B, T, _, E = q.shape
    fit = k.shape[:2] == (B, T) and k.shape[3] == E and cos.shape == sin.shape and cos.shape[1:] == (T, 1, E / 2)
    _check("rope", q, k, fit=fit and cos.shape[0] in (1, B))
    cos, sin = (x.squeeze(2).expand(B, T, E // 2).float().contiguous() for x in (cos, sin))
    return _Rope.apply(q, cos, sin), _Rope.apply(k, cos, sin)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(dy, cos, sin, -1.0), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    B, T, H, E = x.shape
    x = x.contiguous()
    y = torch.empty_like(x)
    call("rope", x.dtype, x, cos, sin, y, B * T, H, E, H * E, sign)
    return y


# --- gated unit -------------------------------------------------------------------------------------------------------


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape."""
    _check("swiglu", gate, up, fit=gate.shape == up.shape)
    y: Tensor = _SwiGLU.apply(gate, up)
    return y


class _SwiGLU(torch.autograd.Function):
    """Keeps its inputs; silu is computed again in backward."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        call("swiglu", gate.dtype, gate, up, y, gate.numel())
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        call("swiglu_backward", gate.dtype, dy.contiguous(), gate, up, dgate, dup, gate.numel())
        return dgate, dup


# --- dropout ----------------------------------------------------------------------------------------------------------


def dropout(x: Tensor, p: float, *, seed: Tensor | None = None, training: bool = True) -> Tensor:
    """As `ftlab_kernels.dropout.dropout`, with the same mask for the same seed."""
    threshold(p)
    if p == 0 or not training or x.numel() == 0:
        return x
    _check("dropout", x)
    y: Tensor = _Dropout.apply(x, p, draw_seed(x.device) if seed is None else seed)
    return y


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: Tensor) -> Tensor:
        y, bits = _drop(x.contiguous(), p, seed)
        ctx.save_for_backward(bits)
        ctx.scale = keep_scale(p)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _masked(dy.contiguous(), ctx.saved_tensors[0], ctx.scale), None, None


def _drop(x: Tensor, p: float, seed: Tensor) -> tuple[Tensor, Tensor]:
    """x with a newly drawn mask applied, and the mask: uint8 [M, ceil(D / 8)]."""
    width = x.shape[-1]
    rows = x.numel() // width
    y = torch.empty_like(x)
    bits = torch.empty(rows, -(-width // GROUP), dtype=torch.uint8)
    call("dropout", x.dtype, x, y, bits, int(seed), threshold(p), keep_scale(p), rows, width)
    return y, bits


def _masked(x: Tensor, bits: Tensor, scale: float) -> Tensor:
    y = torch.empty_like(x)
    call("masked", x.dtype, x, y, bits, scale, len(bits), x.shape[-1])
    return y


# --- adapted linear layers --------------------------------------------------------------------------------------------


def lora_linears(
    x: Tensor, adapted: Sequence[Any], *, p: float = 0.0, seed: Tensor | None = None, training: bool = True
) -> tuple[Tensor, ...]:
    """Each layer's x W^T + bias + scale * drop(x) A^T B^T for layers that read the same x [..., D]; one mask for all.

    adapted: objects with weight [N, D], bias [N] or None, lora_A [r, D], lora_B [N, r], scale, and out_scale [N] or
    None: with one (DoRA), all but the bias is multiplied by it, in its dtype, by torch. Computed in x's dtype, the
    adapters' gradients in theirs. Errors: ValueError for another dtype of x, or p.
    """
    _check("lora_linears", x)
    threshold(p)
    p = p if training else 0.0
    if p > 0 and seed is None:
        seed = draw_seed(x.device)
    biases = [layer.bias if layer.out_scale is None else None for layer in adapted]
    tensors = [
        tensor
        for layer, bias in zip(adapted, biases, strict=True)
        for tensor in (layer.weight, bias, layer.lora_A, layer.lora_B)
    ]
    outputs: tuple[Tensor, ...] = _LoRA.apply(x, p, seed, tuple(float(layer.scale) for layer in adapted), *tensors)
    return tuple(_scaled(out, layer) for out, layer in zip(outputs, adapted, strict=True))


def _scaled(out: Tensor, layer: Any) -> Tensor:
    """With an out_scale: out_scale * out + bias, rounded once."""
    if layer.out_scale is None:
        return out
    scaled: Tensor = out * layer.out_scale
    return (scaled if layer.bias is None else scaled + layer.bias).to(out.dtype)


class _LoRA(torch.autograd.Function):
    """Keeps x, the packed mask, scale * drop(x) A^T, the adapters in x's dtype, and the weights as they are."""

    @staticmethod
    @_exact
    def forward(ctx: Any, x: Tensor, p: float, seed: Tensor | None, scales: tuple[float, ...], *tensors: Any) -> Any:
        weights, biases, downs, ups = (tensors[i::4] for i in range(4))
        shape, dtype = x.shape, x.dtype
        x = x.reshape(-1, shape[-1]).contiguous()
        dropped, bits = (x, None) if p == 0 or x.numel() == 0 else _drop(x, p, seed)  # type: ignore[arg-type]
        ranks = [len(down) for down in downs]
        A = torch.cat(downs).to(dtype)
        B = [up.to(dtype) for up in ups]
        s = torch.mm(dropped, A.t())
        parts = s.split(ranks, 1)
        outputs = []
        for weight, bias, up, scale, part in zip(weights, biases, B, scales, parts, strict=True):
            weight = weight.to(dtype)
            y = torch.mm(x, weight.t()) if bias is None else torch.addmm(bias.to(dtype), x, weight.t())
            y.addmm_(part.mul_(scale), up.t())
            outputs.append(y.view(*shape[:-1], y.shape[-1]))
        ctx.save_for_backward(x, bits, s, A, *B, *tensors)
        ctx.p, ctx.scales, ctx.ranks, ctx.shape = p, scales, ranks, shape
        return tuple(outputs)

    @staticmethod
    @_exact
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, bits, s, A, *rest = ctx.saved_tensors
        B, tensors = rest[: len(ctx.ranks)], rest[len(ctx.ranks) :]
        wanted = ctx.needs_input_grad[4:]
        dys = [dy.reshape(-1, dy.shape[-1]).to(x.dtype) for dy in gradients]
        found: list[Tensor | None] = [None] * len(tensors)
        ds_parts = []
        for i, (dy, up, part) in enumerate(zip(dys, B, s.split(ctx.ranks, 1), strict=True)):
            ds_parts.append(torch.mm(dy, up).mul_(ctx.scales[i]))
            if wanted[4 * i]:
                found[4 * i] = torch.mm(dy.t(), x).to(tensors[4 * i].dtype)
            if wanted[4 * i + 1]:
                found[4 * i + 1] = dy.sum(0, dtype=torch.float32).to(tensors[4 * i + 1].dtype)
            if wanted[4 * i + 3]:
                found[4 * i + 3] = torch.mm(dy.t(), part).to(tensors[4 * i + 3].dtype)
        ds = torch.cat(ds_parts, 1)
        if any(wanted[2::4]):
            dropped = x if bits is None else _masked(x, bits, keep_scale(ctx.p))
            for i, d_down in enumerate(torch.mm(ds.t(), dropped).split(ctx.ranks)):
                found[4 * i + 2] = d_down.to(tensors[4 * i + 2].dtype)
        dx = _input_gradient(ctx, dys, tensors[::4], ds, A, bits) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, *found


def _input_gradient(
    ctx: Any, dys: list[Tensor], weights: list[Tensor], ds: Tensor, A: Tensor, bits: Tensor | None
) -> Tensor:
    """sum_i dY_i W_i + keep * (dS A), in the input's shape."""
    dx = torch.mm(dys[0], weights[0].to(A.dtype))
    for dy, weight in zip(dys[1:], weights[1:], strict=True):
        dx.addmm_(dy, weight.to(A.dtype))
    if bits is None:
        dx.addmm_(ds, A)
    else:
        call("masked_add", A.dtype, torch.mm(ds, A), dx, bits, keep_scale(ctx.p), *dx.shape)
    return dx.view(ctx.shape)


# --- attention --------------------------------------------------------------------------------------------------------


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Grouped causal attention of short rows: q [B, H, T, E], k and v [B, K, S, E], S = P + T; returns [B, H, T, E].

    Query t sees the keys 0 .. P + t. The T x S weights are kept in q's dtype; scores and softmax are fp32. The gradient
    of the scores is rounded to q's dtype, as torch's fused kernel does.
    """
    (B, H, T, E), (K, S) = q.shape, k.shape[1:3]
    fit = k.shape == v.shape == (B, K, S, E) and H % K == 0 and S >= T
    _check("causal_attention", q, k, v, fit=fit)
    out: Tensor = _CausalAttention.apply(q, k, v)
    return out


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    @_exact
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, H, T, E = q.shape
        K, S = k.shape[1:3]
        q = q.reshape(B * K, H // K * T, E)
        k, v = k.reshape(B * K, S, E), v.reshape(B * K, S, E)
        scores = torch.bmm(q.float() * E**-0.5, k.float().transpose(1, 2))  # rounded to bf16 they double the error
        weights = torch.empty_like(scores, dtype=q.dtype)
        call("causal_softmax", q.dtype, scores, weights, B * H * T, T, S, S - T)
        ctx.save_for_backward(q, k, v, weights)
        ctx.shape = (B, H, K, T, S, E)
        return torch.bmm(weights, v).view(B, H, T, E)

    @staticmethod
    @_exact
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, weights = ctx.saved_tensors
        B, H, K, T, S, E = ctx.shape
        dout = dout.reshape(B * K, H // K * T, E)
        dv = torch.bmm(weights.transpose(1, 2), dout)
        dweights = torch.bmm(dout, v.transpose(1, 2))
        call("causal_softmax_backward", q.dtype, dweights, weights, dweights, B * H * T, T, S, S - T, E**-0.5)
        dq = torch.bmm(dweights, k)
        dk = torch.bmm(dweights.transpose(1, 2), q)
        return dq.view(B, H, T, E), dk.view(B, K, S, E), dv.view(B, K, S, E)


# --- cross entropy ----------------------------------------------------------------------------------------------------


def cross_entropy_(logits: Tensor, labels: Tensor, *, gradient: bool) -> Tensor:
    """Each row's cross entropy, fp32 [C]; with `gradient`, logits [C, V] are overwritten by softmax - onehot.

    Labels are int64 in [0, V). Errors: ValueError, also for a label outside.
    """
    _check("cross_entropy_", logits, fit=labels.shape == logits.shape[:1] and labels.dtype == torch.int64)
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise ValueError(f"labels {int(labels.min())} to {int(labels.max())} are not all in [0, {logits.shape[1]})")
    losses = torch.empty(len(labels), dtype=torch.float32)
    call("cross_entropy", logits.dtype, logits, labels.contiguous(), losses, *logits.shape, int(gradient))
    return losses
