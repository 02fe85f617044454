"""The operations by Triton kernels, for a GPU (or Triton's interpreter)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from ftlab_kernels import attention, lora, nf4
from ftlab_kernels import linear_cross_entropy as head
from ftlab_kernels.adapted import Adapted
from ftlab_kernels.glu import swiglu
from ftlab_kernels.norm import add_rms_norm, rms_norm
from ftlab_kernels.rope import rope
from torch import Tensor

from ftlab.errors import FtlabError
from ftlab.operators import torch_path
from ftlab.operators.base import Operators
from ftlab.operators.linear_cross_entropy import linear_cross_entropy

__all__ = ["triton_operators"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_RANK = 256


def triton_operators(*, required: bool = False) -> Operators:
    """Each operation by its kernel where that takes the tensors, else in torch; `taken` tells which.

    required: an operation that has to be left to torch raises FtlabError instead.
    """
    taken: Counter[tuple[str, str]] = Counter()

    def fits(name: str, tensors: Sequence[Tensor], count: int = 1, why: str = "") -> bool:
        """Whether there is a kernel for these tensors; counted either way. why: another reason against it."""
        kinds = " and ".join(sorted({str(x.dtype).removeprefix("torch.") for x in tensors}))
        reason = why or ("" if all(x.dtype in _DTYPES for x in tensors) else kinds)
        if reason and required:
            raise FtlabError(f"kernels=triton: there is no kernel of {name} for {reason}; use kernels=auto")
        taken[name, f"torch, for {reason}" if reason else "triton"] += count
        return not reason

    def route(name: str, kernel: Callable[..., Any], plain: Callable[..., Any], tensors: int) -> Callable[..., Any]:
        """`kernel` if there is one for the first `tensors` arguments."""

        def operation(*arguments: Any) -> Any:
            return (kernel if fits(name, arguments[:tensors]) else plain)(*arguments)

        return operation

    def add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, residual.dtype)  # under autocast a full model's stream is fp32, x is bf16
        return fused_add(x.to(wide), residual.to(wide), weight, eps)  # type: ignore[no-any-return]

    def lora_linears(x: Tensor, adapted: Sequence[Adapted], p: float, seed: Tensor | None = None) -> tuple[Tensor, ...]:
        rank = max(len(layer.lora_A) for layer in adapted)
        why = f"rank {rank}, over {_MAX_RANK}" if rank > _MAX_RANK else ""
        if fits("lora_linears", (x,), len(adapted), why):
            return lora.lora_linears(x, adapted, p=p, seed=seed)
        return torch_path.lora_linears(x, adapted, p)

    def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, smoothing: float = 0.0) -> Tensor:
        if fits("linear_cross_entropy", (hidden,)):
            return head.linear_cross_entropy(hidden, weight, labels, ignore_index=None, label_smoothing=smoothing)
        return linear_cross_entropy(hidden, weight, labels, chunk, smoothing)

    def packed(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
        taken["packed_attention", f"torch's {attention.choose_backend(q.device, q.dtype, q.shape[-1])}"] += 1
        return attention.packed_attention(q, k, v, lengths)

    def nf4_dequantise(codes: Tensor, magnitudes: Tensor, dtype: torch.dtype) -> Tensor:
        fitting = fits("nf4_dequantise", (magnitudes.new_empty(0, dtype=dtype),))
        return (nf4.nf4_dequantise if fitting else nf4.reference)(codes, magnitudes, dtype)

    fused_add = route("add_rms_norm", add_rms_norm, torch_path.add_rms_norm, 2)
    return Operators(
        path="triton",
        rms_norm=route("rms_norm", rms_norm, torch_path.rms_norm, 1),
        add_rms_norm=add_norm,
        rope=route("rope", rope, torch_path.rope, 2),
        swiglu=route("swiglu", swiglu, torch_path.swiglu, 2),
        lora_linears=lora_linears,
        linear_cross_entropy=cross_entropy,
        packed_attention=packed,
        nf4_dequantise=nf4_dequantise,
        taken=taken,
    )
