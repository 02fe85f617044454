"""What the kernels are compared with: PEFT, compositions in the manner of Unsloth, Liger.

Where a package is missing, its composition is written by hand with the same operations, and the record says so.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from ftlab_kernels.common import cast
from torch import Tensor, nn

from gpu.measure import Unavailable

__all__ = ["Adapter", "adapted_by_peft", "compiled", "has", "liger", "peft_linear", "peft_mlp", "unsloth_linear"]
__all__ += ["unsloth_mlp"]

ALPHA = 32.0


def has(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


@dataclass(frozen=True)
class Adapter:
    """A frozen weight [N, K] and its update: A [r, K], B [N, r], scale."""

    weight: Tensor
    A: Tensor
    B: Tensor
    scale: float


def compiled(module: Callable[..., Any], *, smoke: bool) -> Callable[..., Any]:
    """torch.compile as it comes; in a smoke run its tracing alone, without generated code."""
    result: Callable[..., Any] = torch.compile(module, dynamic=False, backend="eager" if smoke else "inductor")
    return result


# --- PEFT -------------------------------------------------------------------------------------------------------------


class HandPeft(nn.Module):
    """PEFT's LoRA layer, operation by operation (peft/tuners/lora/layer.py, Linear.forward)."""

    def __init__(self, base: nn.Linear, rank: int, p: float) -> None:
        super().__init__()
        self.base_layer, self.scaling = base, ALPHA / rank
        like = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, **like)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, **like)
        self.dropout = nn.Dropout(p) if p else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x) + self.lora_B(self.lora_A(self.dropout(x))) * self.scaling
        return out


def adapted_by_peft(model: nn.Module, names: list[str], rank: int, p: float, *, wide: bool = False) -> str:
    """Put PEFT's LoRA on the linear layers `names` of a model, in place. wide: adapters in fp32, PEFT's default.

    Returns how it was done.
    """
    if has("peft"):
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(r=rank, lora_alpha=int(ALPHA), lora_dropout=p, target_modules=names)
        inject_adapter_in_model(config, model)
        how = "peft"
    else:
        for name in names:
            parent, _, child = name.rpartition(".")
            base = model.get_submodule(name)
            assert isinstance(base, nn.Linear)
            setattr(model.get_submodule(parent), child, HandPeft(base, rank, p))
        how = "the same operations by hand: peft is not installed"
    dtype = next(parameter.dtype for name, parameter in model.named_parameters() if "lora_" not in name)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            # B is 0 in a new adapter; random values cost what trained ones do.
            values = torch.empty_like(parameter, dtype=torch.float32).normal_(0.0, 0.02)
            parameter.data = values.to(torch.float32 if wide else dtype)
    return how


def peft_linear(weight: Tensor, rank: int, p: float, *, wide: bool = False) -> tuple[nn.Module, list[Tensor], str]:
    """PEFT's layer around a frozen weight, the adapter's parameters, and how it was made."""
    features, columns = weight.shape
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(columns, features, bias=False))
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    how = adapted_by_peft(model, ["0"], rank, p, wide=wide)
    model.train()
    return model, [each for each in model.parameters() if each.requires_grad], how


class HandMLP(nn.Module):
    """The MLP of a llama in transformers."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


def peft_mlp(gate: Tensor, up: Tensor, down: Tensor, rank: int) -> tuple[nn.Module, list[Tensor], str]:
    """An eager MLP with PEFT's LoRA on its three layers, p = 0."""
    with torch.device("meta"):
        model: nn.Module = HandMLP(gate.shape[1], gate.shape[0])
    how = "the operations of transformers' LlamaMLP"
    for name, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
        model.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
    how += f"; LoRA: {adapted_by_peft(model, ['gate_proj', 'up_proj', 'down_proj'], rank, 0.0)}"
    return model, [each for each in model.parameters() if each.requires_grad], how


# --- in the manner of Unsloth (p = 0): in-place additions to the products of cuBLAS, a derived backward pass ----------


def added_product(out: Tensor, x: Tensor, adapter: Adapter) -> Tensor:
    """out += scale * x A^T B^T, reading and writing out once more."""
    return out.addmm_(x @ adapter.A.t(), adapter.B.t(), alpha=adapter.scale)


def adapter_gradients(dy: Tensor, x: Tensor, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """dA and dB; x A^T is formed again, dy B once here and once for dx."""
    dA = (dy @ adapter.B).t() @ x
    dB = dy.t() @ (x @ adapter.A.t())
    return dA.mul_(adapter.scale), dB.mul_(adapter.scale)


def added_gradient(dx: Tensor, dy: Tensor, adapter: Adapter) -> Tensor:
    """dx += scale * dy B A."""
    return dx.addmm_(dy @ adapter.B, adapter.A, alpha=adapter.scale)


class _UnslothLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, W, A, B)
        ctx.scale = scale
        return added_product(x @ W.t(), x, Adapter(W, A, B, scale))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B = ctx.saved_tensors
        adapter = Adapter(W, A, B, ctx.scale)
        dA, dB = adapter_gradients(dy, x, adapter)
        return added_gradient(dy @ W, dy, adapter), None, dA, dB, None


def unsloth_linear(x: Tensor, adapter: Adapter) -> Tensor:
    """x [M, K] -> [M, N]."""
    out: Tensor = _UnslothLinear.apply(x, adapter.weight, adapter.A, adapter.B, adapter.scale)
    return out


def adapters(parts: Sequence[Tensor], scale: float) -> list[Adapter]:
    """From weight, A, B of one after the other."""
    return [Adapter(W, A, B, scale) for W, A, B in zip(parts[0::3], parts[1::3], parts[2::3], strict=True)]


class _UnslothMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, *parts: Tensor) -> Tensor:
        gate, up, down = adapters(parts, scale)
        e = added_product(x @ gate.weight.t(), x, gate)
        g = added_product(x @ up.weight.t(), x, up)
        h = torch.empty_like(e)
        launch(swiglu_forward, e, g, h)
        ctx.save_for_backward(x, e, g, *parts)
        ctx.scale = scale
        return added_product(h @ down.weight.t(), h, down)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, e, g, *parts = ctx.saved_tensors
        gate, up, down = adapters(parts, ctx.scale)
        # Unsloth writes over e and g; a call that is timed again and again needs them, so it writes elsewhere: the
        # same bytes.
        dh = added_gradient(dy @ down.weight, dy, down)
        h, de, dg = torch.empty_like(e), torch.empty_like(e), torch.empty_like(e)
        launch(swiglu_backward, dh, e, g, h, de, dg)
        of_down = adapter_gradients(dy, h, down)
        of_up, of_gate = adapter_gradients(dg, x, up), adapter_gradients(de, x, gate)
        dx = added_gradient(dg @ up.weight, dg, up)
        dx.addmm_(de, gate.weight)
        added_gradient(dx, de, gate)
        return dx, None, None, *of_gate, None, *of_up, None, *of_down


def unsloth_mlp(x: Tensor, gate: Adapter, up: Adapter, down: Adapter) -> Tensor:
    """down(silu(gate(x)) * up(x)) with adapters of one scale."""
    parts = [tensor for each in (gate, up, down) for tensor in (each.weight, each.A, each.B)]
    out: Tensor = _UnslothMLP.apply(x, gate.scale, *parts)
    return out


def launch(kernel: Any, first: Tensor, *others: Tensor) -> None:
    kernel[(triton.cdiv(first.numel(), 1024),)](first, *others, first.numel(), BLOCK=1024)


@triton.jit
def swiglu_forward(e_ptr, g_ptr, h_ptr, count, BLOCK: tl.constexpr):
    """h = silu(e) g."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    e = tl.load(e_ptr + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(h_ptr + at, cast(e * tl.sigmoid(e) * g, h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward(dh_ptr, e_ptr, g_ptr, h_ptr, de_ptr, dg_ptr, count, BLOCK: tl.constexpr):
    """h again, and the gradients of e and g."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    dh = tl.load(dh_ptr + at, mask=inside, other=0.0).to(tl.float32)
    e = tl.load(e_ptr + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(e)
    f = e * s
    tl.store(h_ptr + at, cast(f * g, h_ptr.dtype.element_ty), mask=inside)
    tl.store(dg_ptr + at, cast(dh * f, h_ptr.dtype.element_ty), mask=inside)
    tl.store(de_ptr + at, cast(dh * g * s * (1 + e * (1 - s)), h_ptr.dtype.element_ty), mask=inside)


# --- Liger ------------------------------------------------------------------------------------------------------------


def liger(name: str) -> Callable[..., Any]:
    """A function of liger_kernel.transformers.functional. Raises Unavailable where Liger is not installed."""
    if not has("liger_kernel"):
        raise Unavailable("liger-kernel is not installed")
    functional = importlib.import_module("liger_kernel.transformers.functional")
    found: Callable[..., Any] = getattr(functional, name)
    return found
