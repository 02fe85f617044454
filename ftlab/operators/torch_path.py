"""The operations in plain torch: what every other path is compared with, and what runs where no kernel does.

Letters: B rows, T positions, S = P + T key positions, H query heads, K key/value heads, E width of a head, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from ftlab_kernels.adapted import Adapted
from torch import Tensor

from ftlab.operators.dropout import dropout

__all__ = ["add_rms_norm", "causal_attention", "lora_linears", "rms_norm", "rope", "rotate", "swiglu"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467) of [..., D], in fp32 or wider, rounded once to x's type."""
    precise = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(precise), weight.shape, weight.to(precise), eps).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(s), s) with s = x + residual in the wider of their dtypes, [..., D] each."""
    total = residual + x
    return rms_norm(total, weight, eps), total


def rotate(x_BTHE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + E/2) by their angle, in fp32; returns x's dtype."""
    first, second = x_BTHE.to(torch.promote_types(x_BTHE.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BTHE.dtype)


def rope(q_BTHE: Tensor, k_BTKE: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary positions (arXiv 2104.09864) of queries and keys; cos, sin: fp32 [B or 1, T, 1, E/2]."""
    return rotate(q_BTHE, cos, sin), rotate(k_BTKE, cos, sin)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202), of one shape."""
    return F.silu(gate) * up


def lora_linears(x: Tensor, adapted: Sequence[Adapted], p: float) -> tuple[Tensor, ...]:
    """Each layer's W x + b + scale * B A dropout(x) for layers that read the same x [..., in]; one dropout for all.

    With an out_scale all but b is multiplied by it. The adapters are computed in x's dtype. s multiplies the r-wide A x
    instead of the out-wide product, which is then added to W x in one call.
    """
    rows = x.reshape(-1, x.shape[-1])
    low = F.linear(dropout(rows, p), torch.cat([layer.lora_A for layer in adapted]).to(x.dtype))
    outputs = []
    for layer, part in zip(adapted, torch.split(low, [len(layer.lora_A) for layer in adapted], -1), strict=True):
        bias = None if layer.bias is None or layer.out_scale is not None else layer.bias.to(x.dtype)
        out = F.linear(rows, layer.weight.to(x.dtype), bias)
        out.addmm_(part * layer.scale, layer.lora_B.to(x.dtype).t())
        if layer.out_scale is not None:  # in its own dtype, fp32: rounded to bf16 a small change of it would be lost
            out = out * layer.out_scale
            out = (out if layer.bias is None else out + layer.bias).to(x.dtype)
        outputs.append(out.view(*x.shape[:-1], out.shape[-1]))
    return tuple(outputs)


def causal_attention(q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor) -> Tensor:
    """Causal grouped attention with its T x S scores in memory, softmax in fp32. Query t sees the keys 0 .. P + t.

    Returns [B, H, T, E]. For training on a CPU, where on short documents the backward of torch's flash kernel costs
    many times its arithmetic (20 documents of 25 tokens in bf16 on 2 cores: 28 times this one's).
    """
    B, H, T, E = q_BHTE.shape
    K, S = k_BKSE.shape[1:3]
    precise = torch.promote_types(q_BHTE.dtype, torch.float32)
    with torch.autocast(q_BHTE.device.type, enabled=False):  # scores rounded to bf16 would double the error
        q = q_BHTE.reshape(B, K, H // K * T, E).to(precise) * E**-0.5
        scores = torch.matmul(q, k_BKSE.to(precise).transpose(-1, -2))
    later_TS = torch.ones(T, S, dtype=torch.bool, device=q_BHTE.device).triu(1 + S - T)
    scores = scores.view(B, H, T, S).masked_fill(later_TS, -torch.inf)
    weights = scores.softmax(-1).to(v_BKSE.dtype).view(B, K, H // K * T, S)
    return torch.matmul(weights, v_BKSE).view(B, H, T, E)
