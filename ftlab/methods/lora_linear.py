"""The LoRA layer: a linear layer that carries its low-rank update (arXiv 2106.09685).

    y = W x + b + s B A dropout(x),    s = alpha / r, or alpha / sqrt(r) with rslora (arXiv 2312.03732)

A [r, in] is drawn as in PEFT, uniform in +-1/sqrt(in), and B [out, r] is 0, so a new layer computes exactly what its
base computes. A and B are stored in fp32 whatever the dtype of W.

Differs from PEFT: the base weight keeps its own name (`....q_proj.weight`), s multiplies the r-wide A x instead of the
out-wide product, and the product is added to W x in the same call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from ftlab_kernels.adapted import Adapted
from torch import Tensor, nn

from ftlab.errors import FtlabError
from ftlab.operators import TORCH

__all__ = ["LoRALinear"]


class LoRALinear(nn.Linear):
    """A linear layer with a low-rank update; takes over the weight and bias of `base`.

    `enabled` False leaves the update out. `generator` (of the CPU) draws A, so that A is the same on every device.
    """

    def __init__(
        self, base: nn.Linear, *, rank: int, alpha: float, rslora: bool, dropout_p: float, generator: torch.Generator
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate and draw a second weight
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        bound = 1 / math.sqrt(self.in_features)  # kaiming uniform with a = sqrt(5)
        drawn = torch.empty(rank, self.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(drawn.to(base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=base.weight.device))
        self.scale = alpha / math.sqrt(rank) if rslora else alpha / rank
        self.dropout_p = dropout_p
        self.operators = TORCH
        self.enabled = True
        self._base_weight: Tensor | None = None  # a copy of the untouched weight while merged
        self.train(base.training)

    @property
    def merged(self) -> bool:
        """Whether the update is folded into the weight."""
        return self._base_weight is not None

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the autocast dtype under autocast and in the input's dtype otherwise."""
        return self.together([self], input)[0]

    @staticmethod
    def together(layers: Sequence[LoRALinear], input: Tensor) -> tuple[Tensor, ...]:
        """The outputs of layers that read the same input, whose adapters see it through one dropout mask."""
        x = input
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # once, for all products
        first = layers[0]
        p = first.dropout_p if first.training else 0.0
        active = [layer for layer in layers if layer.enabled and not layer.merged]
        outputs = iter(first.operators.lora_linears(x, [layer.adapted() for layer in active], p) if active else ())
        return tuple(next(outputs) if layer in active else F.linear(x, layer.weight, layer.bias) for layer in layers)

    def adapted(self) -> Adapted:
        """The tensors of this layer, as the fused operations take them."""
        return Adapted(self.weight, self.bias, self.lora_A, self.lora_B, self.scale)

    def adapter_parameters(self) -> list[nn.Parameter]:
        """A and B."""
        return [self.lora_A, self.lora_B]

    def delta_weight(self) -> Tensor:
        """s B A: fp32 [out, in], with a gradient."""
        with torch.autocast(self.lora_A.device.type, enabled=False):
            return self.scale * (self.lora_B.float() @ self.lora_A.float())

    def delta_squared_norm(self) -> Tensor:
        """||s B A||_F^2 = s^2 sum_ij (B^T B)_ij (A A^T)_ij from r x r matrices: fp32 scalar, with a gradient."""
        with torch.autocast(self.lora_A.device.type, enabled=False):
            a, b = self.lora_A.float(), self.lora_B.float()
            return self.scale**2 * ((b.t() @ b) * (a @ a.t())).sum()

    @torch.no_grad()
    def merge(self) -> float:
        """W <- W + s B A, added in fp32 and rounded once. Returns ||rounding|| / ||s B A|| (0 if the update is 0).

        The untouched weight is kept, since subtracting the update again would not give it back bit for bit.
        """
        if self.merged:
            raise FtlabError("the adapter is already merged into its weight; unmerge it first")
        delta = self.delta_weight()
        exact = self.weight.float() + delta
        self._base_weight = self.weight.detach().clone()
        self.weight.copy_(exact)
        rounding = torch.linalg.vector_norm(self.weight.float() - exact)
        return float(rounding / torch.linalg.vector_norm(delta).clamp_min(torch.finfo(torch.float32).tiny))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the untouched weight back, bit for bit."""
        if self._base_weight is None:
            raise FtlabError("the adapter is not merged, so there is nothing to unmerge")
        self.weight.copy_(self._base_weight)
        self._base_weight = None

    def plain(self) -> nn.Linear:
        """A linear layer without adapter that shares weight (as it is now) and bias."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        linear.weight = self.weight
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"{super().extra_repr()}, rank={self.lora_A.shape[0]}, scale={self.scale:g}, dropout={self.dropout_p:g}"
