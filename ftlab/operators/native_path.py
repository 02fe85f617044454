"""The operations with compiled C between the matrix products, for a CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from ftlab_kernels import cpu, nf4
from ftlab_kernels.adapted import Adapted
from torch import Tensor

from ftlab.errors import FtlabError
from ftlab.operators import torch_path
from ftlab.operators.base import Operators
from ftlab.operators.linear_cross_entropy import linear_cross_entropy, rows_in_torch

__all__ = ["native_operators"]


def native_operators(*, required: bool = False) -> Operators:
    """Each operation in C where its tensors allow it (`cpu.takes`), else in torch; `taken` tells which.

    required: an operation that has to be left to torch raises FtlabError instead.
    """
    taken: Counter[tuple[str, str]] = Counter()

    def fits(name: str, tensors: Sequence[Tensor], count: int = 1) -> bool:
        """Whether these tensors go through C; counted either way."""
        native = cpu.takes(*tensors)
        if required and not native:
            raise FtlabError(f"kernels=native: {name} has no C for {_kinds(tensors)}; use kernels=auto or other dtypes")
        taken[name, "native" if native else f"torch, for {_kinds(tensors)}"] += count
        return native

    def route(name: str, fused: Callable[..., Any], plain: Callable[..., Any], tensors: int) -> Callable[..., Any]:
        """`fused` if the first `tensors` arguments suit it."""

        def operation(*arguments: Any) -> Any:
            return (fused if fits(name, arguments[:tensors]) else plain)(*arguments)

        return operation

    def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, residual.dtype)  # under autocast a full model's stream is fp32, x is bf16
        return fused_add(x.to(wide), residual.to(wide), weight, eps)  # type: ignore[no-any-return]

    def lora_linears(x: Tensor, adapted: Sequence[Adapted], p: float, seed: Tensor | None = None) -> tuple[Tensor, ...]:
        if fits("lora_linears", (x,), len(adapted)):
            return cpu.lora_linears(x, adapted, p=p, seed=seed)
        return torch_path.lora_linears(x, adapted, p)

    def rows(logits: Tensor, labels: Tensor, gradient: bool, smoothing: float) -> Tensor:
        if smoothing:
            if required:
                raise FtlabError("kernels=native: there is no C for label smoothing; use kernels=auto")
            taken["linear_cross_entropy", "torch, for label smoothing"] += 1
            return rows_in_torch(logits, labels, gradient, smoothing)
        if fits("linear_cross_entropy", (logits,)):
            return cpu.cross_entropy_(logits, labels, gradient=gradient).sum()
        return rows_in_torch(logits, labels, gradient)

    def head(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, smoothing: float = 0.0) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels, chunk, smoothing, rows)

    def nf4_dequantise(codes: Tensor, magnitudes: Tensor, dtype: torch.dtype) -> Tensor:
        fitting = fits("nf4_dequantise", (magnitudes.new_empty(0, dtype=dtype),))
        return (cpu.nf4_dequantise if fitting else nf4.reference)(codes, magnitudes, dtype)

    fused_add = route("add_rms_norm", cpu.add_rms_norm, torch_path.add_rms_norm, 2)
    return Operators(
        path="native",
        rms_norm=route("rms_norm", cpu.rms_norm, torch_path.rms_norm, 1),
        add_rms_norm=add_rms_norm,
        rope=route("rope", cpu.rope, torch_path.rope, 2),
        swiglu=route("swiglu", cpu.swiglu, torch_path.swiglu, 2),
        lora_linears=lora_linears,
        linear_cross_entropy=head,
        causal_attention=route("causal_attention", cpu.causal_attention, torch_path.causal_attention, 3),
        nf4_dequantise=nf4_dequantise,
        taken=taken,
    )


def _kinds(tensors: Sequence[Tensor]) -> str:
    return " and ".join(sorted({f"{str(x.dtype).removeprefix('torch.')} on {x.device.type}" for x in tensors}))
