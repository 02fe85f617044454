"""A linear layer with a low-rank update, as the fused operations take it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Adapted"]


@dataclass(frozen=True)
class Adapted:
    """y = out_scale * (x W^T + scale * drop(x) A^T B^T) + bias.

    weight: [N, K]. bias: [N] or None. lora_A: [r, K]. lora_B: [N, r]. scale: alpha / r, or alpha / sqrt(r).
    out_scale: [N], the magnitudes of DoRA (arXiv 2402.09353) over their norms, or None.
    """

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    scale: float
    out_scale: Tensor | None = None
