"""The table of operations that a model is given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from ftlab_kernels import nf4
from ftlab_kernels.adapted import Adapted
from torch import Tensor

from ftlab.operators import torch_path
from ftlab.operators.linear_cross_entropy import linear_cross_entropy

__all__ = ["NAMES", "TORCH", "Operators"]

Norm = Callable[[Tensor, Tensor, float], Tensor]
AddNorm = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
Rope = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Gate = Callable[[Tensor, Tensor], Tensor]
LoRALinears = Callable[[Tensor, Sequence[Adapted], float], tuple[Tensor, ...]]
LinearCrossEntropy = Callable[..., Tensor]  # hidden, weight, labels, chunk, and a smoothing that may be left out
NF4Dequantise = Callable[[Tensor, Tensor, torch.dtype], Tensor]
CausalAttention = Callable[[Tensor, Tensor, Tensor], Tensor]
PackedAttention = Callable[[Tensor, Tensor, Tensor, tuple[int, ...]], Tensor]

# What every model with adapters goes through; nf4_dequantise serves quantised weights alone.
NAMES = ("rms_norm", "add_rms_norm", "rope", "swiglu", "lora_linears", "linear_cross_entropy", "causal_attention")


@dataclass(frozen=True)
class Operators:
    """The operations between a model's matrix products; their contracts stand in `torch_path`, which is the reference.

    causal_attention serves short documents on a CPU; packed_attention takes all documents of a batch in one call, where
    there is such a kernel. taken: how often each operation went which way, for the run's summary (torch alone counts
    nothing). log: what `kernels=check` found.
    """

    path: str = "torch"
    rms_norm: Norm = torch_path.rms_norm
    add_rms_norm: AddNorm = torch_path.add_rms_norm
    rope: Rope = torch_path.rope
    swiglu: Gate = torch_path.swiglu
    lora_linears: LoRALinears = torch_path.lora_linears
    linear_cross_entropy: LinearCrossEntropy = linear_cross_entropy
    causal_attention: CausalAttention = torch_path.causal_attention
    nf4_dequantise: NF4Dequantise = nf4.reference
    packed_attention: PackedAttention | None = None
    taken: Counter[tuple[str, str]] = field(default_factory=Counter, compare=False)
    log: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Operators:
        """Functions have no copies: a copied model shares its operations with the original."""
        return self


TORCH = Operators()
