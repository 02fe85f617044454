"""The LoRA layer: a linear layer that carries its low-rank update (arXiv 2106.09685).

    y = W x + b + s B A dropout(x),    s = alpha / r, or alpha / sqrt(r) with rslora (arXiv 2312.03732)

A [r, in] is drawn as in PEFT, uniform in +-1/sqrt(in), and B [out, r] is 0, so a new layer computes exactly what its
base computes. A and B are stored in fp32 whatever the dtype of W. Two variants of the same layer:

PiSSA (arXiv 2404.02948), `take_principal`: of the pretrained W0 = U S V^T

    A = sqrt(S_r / s) V_r^T,    B = U_r sqrt(S_r / s),    W = W0 - s B A

so that the r largest singular values train and the rest is frozen. The first A and B are kept: the update, what is
exported and what a penalty measures, is s (B A - B0 A0). The singular vectors come from fp64, so that another machine
finds the same ones; W is rounded once, which is all that a new layer differs from its base: in each element at most
half an ulp of W (2^-24 |W| in fp32, 2^-8 |W| in bf16).

DoRA (arXiv 2402.09353), `add_magnitude`: with V = W + s B A, and m [out] that trains and starts as ||W|| of each row

    y = m / ||V|| * (W x + s B A dropout(x)) + b

The norm of each row is detached, as in the paper's section 4.3: a constant for the gradient, made anew in every call.

QLoRA (arXiv 2305.14314), `quantise`: W in 4 bits (`ftlab.methods.nf4`), made again by a kernel; A and B beside it by
torch.

Differs from PEFT: the base weight keeps its own name (`....q_proj.weight`), s multiplies the r-wide A x instead of the
out-wide product, and the product is added to W x in the same call; with DoRA's dropout W x and the update are scaled
together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from ftlab_kernels.adapted import Adapted
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ftlab.errors import ConfigError, FtlabError
from ftlab.methods.nf4 import NF4Weight, nf4_linear
from ftlab.operators import TORCH
from ftlab.operators.dropout import dropout

__all__ = ["LoRALinear", "sample"]

_SAMPLES = 16  # numbers of each adapted weight that are kept to know the base again


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
        self.register_parameter("lora_magnitude_vector", None)  # DoRA's m [out]
        self.principal_A: Tensor | None
        self.principal_B: Tensor | None
        self.register_buffer("principal_A", None, persistent=False)  # PiSSA's first A and B
        self.register_buffer("principal_B", None, persistent=False)
        self.packed: NF4Weight | None
        self.register_module("packed", None)  # QLoRA's weight; `weight` is then there while merged only
        self.scale = alpha / math.sqrt(rank) if rslora else alpha / rank
        self.dropout_p = dropout_p
        self.operators = TORCH
        self.enabled = True
        self.base_sample = sample(base.weight)  # of the pretrained weight, by which it is known again
        self._base_weight: Tensor | None = None  # a copy of the untouched weight while merged
        self.train(base.training)

    @torch.no_grad()
    def take_principal(self) -> None:
        """Move the r principal components of the weight into A and B (PiSSA)."""
        rank = len(self.lora_A)
        if rank > min(self.weight.shape):
            raise ConfigError(
                f"method.rank: {rank} is more than the {min(self.weight.shape)} singular values of a layer of "
                f"{self.out_features} x {self.in_features}; lower it"
            )
        left, values, right = torch.linalg.svd(self.weight.double(), full_matrices=False)
        if values[0] == 0:
            raise ConfigError(
                f"method.init: a layer of {self.out_features} x {self.in_features} is all zero, so pissa finds no "
                "direction in it and A = B = 0 would never move; leave it out of method.targets, or give "
                "method.init=default"
            )
        root = (values[:rank] / self.scale).sqrt()
        self.lora_A.copy_(root[:, None] * right[:rank])
        self.lora_B.copy_(left[:, :rank] * root)
        self._subtract(self.lora_A, self.lora_B)

    @torch.no_grad()
    def add_magnitude(self) -> None:
        """Give the layer DoRA's magnitudes: the norms of the rows of its weight."""
        self.lora_magnitude_vector = nn.Parameter(self._norms())

    @torch.no_grad()
    def quantise(self) -> None:
        """Keep the weight in NF4 alone (QLoRA)."""
        self.packed = NF4Weight(self.weight)
        self.register_parameter("weight", None)

    def _subtract(self, first_A: Tensor, first_B: Tensor) -> None:
        """Make the frozen weight what is left of the pretrained one beside s first_B first_A; one rounding."""
        kept = self.weight.double() - self.scale * (first_B.double() @ first_A.double())
        if self.principal_A is not None and self.principal_B is not None:
            kept += self.scale * (self.principal_B.double() @ self.principal_A.double())
        self.weight.copy_(kept)
        self.principal_A, self.principal_B = first_A.detach().clone(), first_B.detach().clone()

    @property
    def merged(self) -> bool:
        """Whether the update is folded into the weight."""
        return self._base_weight is not None or (self.packed is not None and self.weight is not None)

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
        fused = [layer for layer in active if layer.packed is None]
        outputs = iter(first.operators.lora_linears(x, [layer.adapted() for layer in fused], p) if fused else ())
        dropped = dropout(x, p) if len(fused) < len(active) else x
        return tuple(
            next(outputs) if layer in fused else layer._apart(x, dropped if layer in active else None)
            for layer in layers
        )

    def _apart(self, x: Tensor, dropped: Tensor | None) -> Tensor:
        """The output of a layer that no fused operation takes; dropped: what enters A, None: no update."""
        if self.packed is None or self.merged:
            return self._without(x)
        out = nf4_linear(x, self.packed, self.bias, self.operators)
        if dropped is None:
            return out
        if self.operators.path != "torch":
            self.operators.taken["lora_linears", "torch, for nf4 weights"] += 1
        low = F.linear(dropped.reshape(-1, self.in_features), self.lora_A.to(x.dtype)) * self.scale
        return torch.addmm(out.reshape(-1, self.out_features), low, self.lora_B.to(x.dtype).t()).view(out.shape)

    def _without(self, x: Tensor) -> Tensor:
        """The output of a layer whose update is left out, or merged."""
        if self.merged or self.principal_A is None or self.principal_B is None:
            return F.linear(x, self.weight, self.bias)
        pretrained = Adapted(self.weight, self.bias, self.principal_A, self.principal_B, self.scale)
        return self.operators.lora_linears(x, [pretrained], 0.0)[0]

    def adapted(self) -> Adapted:
        """The tensors of this layer, as the fused operations take them."""
        out_scale = (
            None if self.lora_magnitude_vector is None else self.lora_magnitude_vector / _positive(self._norms())
        )
        return Adapted(self.weight, self.bias, self.lora_A, self.lora_B, self.scale, out_scale)

    def adapter_parameters(self) -> list[nn.Parameter]:
        """A and B, and DoRA's magnitudes."""
        magnitudes = [] if self.lora_magnitude_vector is None else [self.lora_magnitude_vector]
        return [self.lora_A, self.lora_B, *magnitudes]

    def _base(self) -> Tensor:
        """The frozen weight, merged or not: fp32 [out, in]."""
        if self.packed is not None:
            return self.packed.dequantise()
        return _wide(self.weight if self._base_weight is None else self._base_weight).detach()

    @torch.no_grad()
    def _norms(self) -> Tensor:
        """||W + s B A|| of each row: fp32 [out], without a gradient."""
        with torch.autocast(self.lora_A.device.type, enabled=False):
            moved = torch.addmm(self._base(), _wide(self.lora_B), _wide(self.lora_A), alpha=self.scale)
            norms: Tensor = torch.linalg.vector_norm(moved, dim=1)
            return norms

    @torch.no_grad()
    def pretrained_weight(self) -> Tensor:
        """What `delta_weight` is the distance from: fp32 [out, in]."""
        if self.principal_A is None or self.principal_B is None:
            return self._base()
        with torch.autocast(self.lora_A.device.type, enabled=False):
            return torch.addmm(self._base(), self.principal_B, self.principal_A, alpha=self.scale)

    def product(self) -> tuple[Tensor, Tensor, float] | None:
        """P [out, k], Q [k, in] and s of the update s P Q: fp32, with gradients; None with DoRA: it is no product."""
        return None if self.lora_magnitude_vector is not None else (*self._factors(), self.scale)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """P [out, k] and Q [k, in] whose product is the update over s.

        PiSSA's B A - B0 A0 as [B - B0 | B0] [A; A - A0], in which nothing large cancels near the start.
        """
        a, b = _wide(self.lora_A), _wide(self.lora_B)
        if self.principal_A is None or self.principal_B is None:
            return b, a
        return torch.cat((b - self.principal_B, self.principal_B), 1), torch.cat((a, a - self.principal_A))

    def delta_weight(self) -> Tensor:
        """The effective weight minus the pretrained one: fp32 [out, in], with a gradient.

        s B A; with PiSSA s (B A - B0 A0); with DoRA m / ||V|| V - W, through the norm too.
        """
        with torch.autocast(self.lora_A.device.type, enabled=False):
            b, a = self._factors()
            if self.lora_magnitude_vector is None:
                return self.scale * (b @ a)
            base = self._base()
            moved = torch.addmm(base, b, a, alpha=self.scale)
            factors: Tensor = self.lora_magnitude_vector / _positive(torch.linalg.vector_norm(moved, dim=1))
            return factors[:, None] * moved - base

    def delta_squared_norm(self) -> Tensor:
        """||update||_F^2: fp32 scalar, with a gradient.

        ||s P Q||_F^2 = s^2 sum_ij (P^T P)_ij (Q Q^T)_ij from small matrices; with DoRA from the update itself, which is
        made in both passes.
        """
        if self.lora_magnitude_vector is not None:
            total: Tensor = checkpoint(_squared, self, use_reentrant=False, preserve_rng_state=False)
            return total
        with torch.autocast(self.lora_A.device.type, enabled=False):
            b, a = self._factors()
            return self.scale**2 * ((b.t() @ b) * (a @ a.t())).sum()

    def peft_tensors(self) -> dict[str, Tensor]:
        """What makes the update on the pretrained weight, by PEFT's names: fp32, detached.

        With PiSSA [B | -B0] and [A; A0], of twice the rank.
        """
        a, b = self.lora_A.detach(), self.lora_B.detach()
        if self.principal_A is not None and self.principal_B is not None:
            a, b = torch.cat((a, self.principal_A)), torch.cat((b, -self.principal_B), 1)
        named = {"lora_A.weight": a, "lora_B.weight": b}
        if self.lora_magnitude_vector is not None:
            named["lora_magnitude_vector"] = self.lora_magnitude_vector.detach()
        return {name: tensor.float() for name, tensor in named.items()}

    @torch.no_grad()
    def load_peft_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over tensors of the shapes of `peft_tensors`."""
        rank = len(self.lora_A)
        a, b = (tensors[f"lora_{letter}.weight"].to(self.lora_A) for letter in "AB")
        self.lora_A.copy_(a[:rank])
        self.lora_B.copy_(b[:, :rank])
        if self.lora_magnitude_vector is not None:
            self.lora_magnitude_vector.copy_(tensors["lora_magnitude_vector"])
        if self.principal_A is not None and self.principal_B is not None:
            first_A, first_B = a[rank:], -b[:, rank:]
            if not (torch.equal(first_A, self.principal_A) and torch.equal(first_B, self.principal_B)):
                self._subtract(first_A, first_B)  # found by another machine

    @torch.no_grad()
    def merge(self) -> float:
        """W <- W + s B A, or DoRA's m / ||V|| V, in fp32 and rounded once. Returns ||rounding|| / ||what was added||.

        A quantised weight is dequantised for it, and the merged one is fp32.
        The untouched weight is kept, since subtracting the update again would not give it back bit for bit.
        """
        if self.merged:
            raise FtlabError("the adapter is already merged into its weight; unmerge it first")
        if self.lora_magnitude_vector is not None:
            delta = self.delta_weight()
        else:
            delta = self.scale * (self.lora_B.float() @ self.lora_A.float())
        exact = self._base() + delta
        if self.packed is not None:
            self.weight = nn.Parameter(exact, requires_grad=False)
            return 0.0
        self._base_weight = self.weight.detach().clone()
        self.weight.copy_(exact)
        rounding = torch.linalg.vector_norm(self.weight.float() - exact)
        return float(rounding / torch.linalg.vector_norm(delta).clamp_min(torch.finfo(torch.float32).tiny))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the untouched weight back, bit for bit."""
        if not self.merged:
            raise FtlabError("the adapter is not merged, so there is nothing to unmerge")
        if self._base_weight is None:
            self.register_parameter("weight", None)
            return
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


def sample(weight: Tensor) -> Tensor:
    """A few evenly spaced numbers of a weight: fp32 [16] on the CPU, or fewer of a smaller weight."""
    flat = weight.detach().reshape(-1)
    index = torch.arange(min(_SAMPLES, len(flat)), device=flat.device) * max(len(flat) // _SAMPLES, 1)
    return flat[index].float().cpu()


def _wide(x: Tensor) -> Tensor:
    """In fp32, or in fp64 if it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _positive(norms: Tensor) -> Tensor:
    """1 for 0: a row of zeros has no direction, and its m of 0 keeps it one."""
    return norms.masked_fill(norms == 0, 1.0)


def _squared(leaf: LoRALinear) -> Tensor:
    return leaf.delta_weight().square().sum()
