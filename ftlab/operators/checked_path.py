"""Every kernel with its reference beside it: `kernels=check`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from ftlab_kernels import lora, nf4
from ftlab_kernels.adapted import Adapted
from ftlab_kernels.check import CheckLog, checked
from torch import Tensor

from ftlab.operators import torch_path
from ftlab.operators.base import Operators
from ftlab.operators.linear_cross_entropy import reference_cross_entropy

__all__ = ["checked_operators", "rounded_attention"]


def checked_operators(operators: Operators) -> Operators:
    """The same operators, each of which raises KernelMismatchError where it differs from torch by more than rounding.

    `log` of the result counts the comparisons and keeps the worst of each operation. Packed attention is compared by
    its own tests only: its reference would need the documents' masks in memory.
    """
    log = CheckLog()

    def beside(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
        return checked(name, getattr(operators, name), reference, on_result=log.add)

    def lora_linears(x: Tensor, adapted: Sequence[Adapted], p: float, seed: Tensor | None = None) -> Any:
        return lora.reference(x, adapted, p=p, seed=seed)

    def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, smoothing: float = 0.0) -> Tensor:
        return reference_cross_entropy(hidden, weight, labels, smoothing)

    return replace(
        operators,
        rms_norm=beside("rms_norm", torch_path.rms_norm),
        add_rms_norm=beside("add_rms_norm", torch_path.add_rms_norm),
        rope=beside("rope", torch_path.rope),
        swiglu=beside("swiglu", torch_path.swiglu),
        causal_attention=beside("causal_attention", rounded_attention),
        lora_linears=beside("lora_linears", lora_linears),
        nf4_dequantise=beside("nf4_dequantise", nf4.reference),
        linear_cross_entropy=beside("linear_cross_entropy", cross_entropy),
        log=log,
    )


def rounded_attention(q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor) -> Tensor:
    """`torch_path.causal_attention`; in half precision with the gradients of torch's own fused kernel.

    That one rounds the gradients of the scores to q's dtype, as the compiled C does; the reference keeps them in fp32.
    """
    plain = torch_path.causal_attention(q_BHTE, k_BKSE, v_BKSE)
    if q_BHTE.dtype not in (torch.bfloat16, torch.float16):
        return plain
    (T, S), groups = (q_BHTE.shape[2], k_BKSE.shape[2]), q_BHTE.shape[1] // k_BKSE.shape[1]
    seen_TS = torch.ones(T, S, dtype=torch.bool, device=q_BHTE.device).tril(S - T)
    k_BHSE, v_BHSE = (x.repeat_interleave(groups, 1) for x in (k_BKSE, v_BKSE))
    fused = F.scaled_dot_product_attention(q_BHTE, k_BHSE, v_BHSE, attn_mask=seen_TS)
    return fused + (plain - fused).detach()
