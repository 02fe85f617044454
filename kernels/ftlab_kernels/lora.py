"""Linear layers with low-rank updates (LoRA, arXiv 2106.09685; DoRA, 2402.09353), one pass over x for their adapters.

Letters: M rows (all leading dimensions), K columns of x, N of y, r rank of a layer, R of all layers together.

    s = drop(x) A^T             y = out_scale * (x W^T + scale * s B^T) + bias
    t = scale * (dy' B)         dB = scale * dy'^T s       dA = t^T drop(x)       dx = dy' W + drop'(t A)

with dy' = out_scale * dy, drop' the same mask and scale as drop. The graph is split at s (LoRAFusion, 2510.00206): one
pass over x draws the bit-packed mask of `random` and gives s for all layers that read this x; one pass over dy gives t
and dB; one over x and the mask gives dA; the large products are the rest. Products accumulate in fp32; s and t, which
hold the 1 / (1 - p), are rounded to x's dtype once; dA and dB are never rounded below their parameters' dtype.

Kept for the backward pass beyond x: the mask, M K / 8 bytes, and s, M R elements; with p = 0 only s. A gradient of
out_scale needs x W^T + scale * s B^T too, M N elements.

Memory beyond the two large products, M = 8192, K = N = 4096, r = 16 in bf16: x and mask 71 MB, dy 67 MB and some 25 MB
of parts, x and mask 71 MB: 24 + 22 + 24 us at 3.0 TB/s, and what the way of the products adds (`lora_plan` chooses):

    cublas     scale * s B^T is written first and the product of cuBLAS is added to it: 67 MB written and read, each way
    triton     a kernel that begins its sum with the adapter's term: nothing more; the product itself may be slower
    augmented  [x | s] [W | scale B]^T by cuBLAS, K + R columns: nothing more if W and x are kept in buffers with room
               (AugmentedWeight, `room_for`); otherwise W and x are copied in every call, 134 MB. Backward as cublas.

Differs from LoRAFusion: a mask of bits and no copy of the dropped x, no atomics (the same bits in every run), and
run-time scales. Differs from PEFT: one mask for layers that share x.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ftlab_kernels import dropout, lora_launch
from ftlab_kernels.adapted import Adapted
from ftlab_kernels.common import ceil_div, require_triton
from ftlab_kernels.lora_launch import shipped
from ftlab_kernels.lora_plan import Product, chosen, plan, requested
from ftlab_kernels.random import GROUP, draw_seed, keep_scale, threshold

__all__ = ["Adapted", "Augmented", "AugmentedWeight", "chosen", "lora_linear", "lora_linears", "reference", "room_for"]
__all__ += ["shipped"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ALIGNMENT = 8  # columns: rows of 16 bytes in 16-bit dtypes, without which cuBLAS and TMA take slower ways


def reference(
    x: Tensor, adapted: Sequence[Adapted], *, p: float = 0.0, seed: Tensor | None = None, training: bool = True
) -> tuple[Tensor, ...]:
    """The same in plain torch, with gradients by autograd. seed: int64 [1], or None to draw one."""
    x = _autocast(x)
    dropped = x
    if p > 0 and training and x.numel():
        dropped = dropout.reference(x, p, draw_seed(x.device) if seed is None else seed)
    outputs = []
    for layer in adapted:
        low = F.linear(dropped, layer.lora_A.to(x.dtype))
        y = F.linear(x, layer.weight.to(x.dtype)) + layer.scale * F.linear(low, layer.lora_B.to(x.dtype))
        if layer.out_scale is not None:
            y = y * layer.out_scale.to(x.dtype)
        outputs.append(y if layer.bias is None else y + layer.bias.to(x.dtype))
    return tuple(outputs)


def lora_linears(
    x: Tensor,
    adapted: Sequence[Adapted],
    *,
    p: float = 0.0,
    seed: Tensor | None = None,
    training: bool = True,
    path: str | None = None,
    augmented: Augmented | None = None,
) -> tuple[Tensor, ...]:
    """The outputs [..., N] of layers that read the same x [..., K], whose adapters see it through one dropout mask.

    Computed in x's dtype, under autocast in the autocast dtype; gradients have the dtype of their parameter.
    seed: int64 [1] on x's device; None draws one from torch's generator. path: cublas, triton or augmented, instead of
    the way that `lora_plan` finds the fastest. augmented: buffers with room for the adapters, whose way is then taken.
    Differentiable once. Errors: ValueError for shapes, dtypes and p; KernelUnavailableError where Triton cannot run.
    """
    x = _autocast(x)
    wanted = requested("augmented" if augmented is not None and path is None else path)
    _check(x, adapted, augmented, p)
    if x.numel() == 0:
        return reference(x, adapted)
    tensors = [tensor for layer in adapted for tensor in _tensors(layer)]
    require_triton(x, *(tensor for tensor in tensors if tensor is not None))
    p = p if training else 0.0
    if threshold(p) == 0:  # p rounded to 2^-16
        p, seed = 0.0, None
    elif seed is None:
        seed = draw_seed(x.device)
    call = _Call(tuple(float(layer.scale) for layer in adapted), p, seed, wanted, augmented)
    outputs: tuple[Tensor, ...] = _LoRA.apply(x, call, *tensors)
    return outputs


def lora_linear(
    x: Tensor,
    adapted: Adapted,
    *,
    p: float = 0.0,
    seed: Tensor | None = None,
    training: bool = True,
    path: str | None = None,
) -> Tensor:
    """`lora_linears` of one layer: x [..., K] -> [..., N]."""
    return lora_linears(x, [adapted], p=p, seed=seed, training=training, path=path)[0]


# --- buffers with room for the adapters -------------------------------------------------------------------------------


class AugmentedWeight:
    """A frozen weight in a buffer [W | scale * B] of K + R columns, R rounded up to a multiple of 8.

    weight: the [N, K] view that a layer keeps in the place of its own weight. The columns of B are written anew in
    every call, on the call's stream. Layers that share x have columns side by side: `ranks` are all of them, `first` is
    where this layer's begin.
    """

    def __init__(self, weight: Tensor, ranks: int, first: int = 0) -> None:
        features, columns = weight.shape
        self.ranks, self.first = ranks, first
        self.buffer = torch.zeros(features, columns + _padded(ranks), dtype=weight.dtype, device=weight.device)
        self.buffer[:, :columns] = weight.detach()
        # .data has a version counter of its own: writing B's columns is no change of a weight that autograd keeps.
        self.weight = self.buffer.data[:, :columns]

    def refresh(self, lora_B: Tensor, scale: float) -> Tensor:
        """Write scale * B into its columns and return the buffer."""
        columns = self.weight.shape[1] + self.first
        torch.mul(lora_B.detach(), scale, out=self.buffer[:, columns : columns + lora_B.shape[1]])
        return self.buffer


@dataclass(frozen=True)
class Augmented:
    """Buffers for `lora_linears`: the weight of every layer, and whether x is a view made by `room_for`."""

    weights: Sequence[AugmentedWeight]
    x_has_room: bool = False


def room_for(x: Tensor, ranks: int) -> Tensor:
    """An uninitialised tensor of x's shape [..., K] whose rows have room for `ranks` more columns, to be filled with x.

    One for each call: s is written beside x, and both are kept for the backward pass.
    """
    *leading, columns = x.shape
    return torch.empty(*leading, columns + _padded(ranks), dtype=x.dtype, device=x.device)[..., :columns]


def _padded(ranks: int) -> int:
    return ceil_div(ranks, ALIGNMENT) * ALIGNMENT


# --- checks -----------------------------------------------------------------------------------------------------------


def _autocast(x: Tensor) -> Tensor:
    """x as autocast has it in a linear layer."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


def _tensors(layer: Adapted) -> tuple[Tensor | None, ...]:
    return layer.weight, layer.bias, layer.lora_A, layer.lora_B, layer.out_scale


def _check(x: Tensor, adapted: Sequence[Adapted], augmented: Augmented | None, p: float) -> None:
    threshold(p)
    if not adapted:
        raise ValueError("at least one adapted layer is needed")
    if x.dtype not in DTYPES or x.dim() == 0:
        raise ValueError(f"x must be fp32, fp16 or bf16 of at least one dimension, not {x.dtype} {tuple(x.shape)}")
    for layer in adapted:
        columns, rank = x.shape[-1], len(layer.lora_A)
        if layer.weight.dim() != 2 or layer.weight.shape[1] != columns or rank == 0:
            raise ValueError(f"x has {columns} columns, weight is {tuple(layer.weight.shape)}, rank is {rank}")
        features = layer.weight.shape[0]
        expected = ((features, columns), (features,), (rank, columns), (features, rank), (features,))
        for tensor, shape in zip(_tensors(layer), expected, strict=True):
            if tensor is not None and (tuple(tensor.shape) != shape or not tensor.is_floating_point()):
                raise ValueError(f"weight, bias, lora_A, lora_B, out_scale must be floating and {expected}")
    if augmented is not None and [tuple(held.weight.shape) for held in augmented.weights] != [
        tuple(layer.weight.shape) for layer in adapted
    ]:
        raise ValueError("every adapted layer needs an augmented weight of its shape")


# --- autograd ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """What a call has beside its tensors."""

    scales: tuple[float, ...]
    p: float
    seed: Tensor | None
    path: str | None
    augmented: Augmented | None


def _exact(function: Callable[..., Any]) -> Callable[..., Any]:
    """Inside a Function every dtype is chosen by hand: autocast must not change it. The second argument is a tensor."""

    @functools.wraps(function)
    def without_autocast(*arguments: Any) -> Any:
        with torch.autocast(arguments[1].device.type, enabled=False):
            return function(*arguments)

    return without_autocast


def _rows(x: Tensor) -> Tensor:
    """[..., L] as [M, L] whose rows are contiguous, if they may be apart."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _layers(scales: Sequence[float], tensors: Sequence[Tensor]) -> list[Adapted]:
    return [
        Adapted(weight, bias, down, up, scale, out_scale)
        for weight, bias, down, up, out_scale, scale in zip(*(tensors[i::5] for i in range(5)), scales, strict=True)
    ]


def _downs(layers: Sequence[Adapted], dtype: torch.dtype) -> Tensor:
    """The A of all layers, one below the other, in the compute dtype: contiguous [R, K]."""
    downs = [layer.lora_A.detach() for layer in layers]
    return (downs[0] if len(downs) == 1 else torch.cat(downs)).to(dtype).contiguous()


class _LoRA(torch.autograd.Function):
    """Keeps x, the mask, s and the parameters as they are, and z where out_scale needs a gradient."""

    @staticmethod
    @_exact
    def forward(ctx: Any, x: Tensor, call: _Call, *tensors: Any) -> Any:
        """One pass over x, then a product for each layer."""
        layers = _layers(call.scales, tensors)
        rows = _rows(x)
        A = _downs(layers, x.dtype)
        mask = None
        if call.p > 0:
            groups = ceil_div(rows.shape[1], GROUP)
            mask = torch.empty(rows.shape[0], groups, dtype=torch.uint8, device=x.device)
        wide = _with_room(rows, A.shape[0], call) if call.path == "augmented" else None
        if wide is None:
            s = torch.empty(rows.shape[0], A.shape[0], dtype=x.dtype, device=x.device)
        else:
            s = wide[:, rows.shape[1] : rows.shape[1] + A.shape[0]]
        lora_launch.project(rows, A, s, factor=keep_scale(call.p), mask=mask, seed=call.seed, p=call.p)
        outputs, kept = [], []
        for index, (layer, part) in enumerate(zip(layers, s.split(_ranks(layers), 1), strict=True)):
            keep_z = layer.out_scale is not None and ctx.needs_input_grad[2 + 5 * index + 4]
            if wide is None:
                y, z = _product(rows, part, layer, keep_z, call)
            else:
                y, z = _augmented_product(wide, index, layers, keep_z, call)
            outputs.append(y.view(*x.shape[:-1], y.shape[1]))
            kept.append(z)
        ctx.save_for_backward(rows, mask, s, *tensors, *kept)
        ctx.call, ctx.shape = call, x.shape
        return tuple(outputs)

    @staticmethod
    @_exact
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """A pass over each dy, one over x and the mask, then the products."""
        x, mask, s, *saved = ctx.saved_tensors
        count = len(ctx.call.scales)
        layers, kept = _layers(ctx.call.scales, saved[: 5 * count]), saved[5 * count :]
        wants = ctx.needs_input_grad[2:]
        found: list[Tensor | None] = [None] * (5 * count)
        t = torch.empty(s.shape, dtype=s.dtype, device=s.device)
        parts = zip(s.split(_ranks(layers), 1), t.split(_ranks(layers), 1), strict=True)
        dys = []
        for i, (layer, dy, (s_part, t_part)) in enumerate(zip(layers, gradients, parts, strict=True)):
            dy = _rows(dy.to(x.dtype))
            if layer.bias is not None and wants[5 * i + 1]:
                found[5 * i + 1] = dy.sum(0, dtype=torch.float32).to(layer.bias.dtype)
            if layer.out_scale is not None:
                dy, d_out_scale = lora_launch.scale_gradient(dy, layer.out_scale, kept[i])
                found[5 * i + 4] = None if d_out_scale is None else d_out_scale.to(layer.out_scale.dtype)
            found[5 * i + 3] = _adapter_gradients(dy, layer, s_part, t_part, wants[5 * i + 3], keep_scale(ctx.call.p))
            if wants[5 * i]:
                found[5 * i] = torch.mm(dy.t(), x).to(layer.weight.dtype)
            dys.append(dy)
        if any(wants[2::5]):
            pieces = lora_launch.outer(x, t, mask).split(_ranks(layers))
            found[2::5] = [piece.to(layer.lora_A.dtype) for piece, layer in zip(pieces, layers, strict=True)]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _input_gradient(dys, layers, t, mask, ctx.call).view(ctx.shape)
        return dx, None, *found


def _ranks(layers: Sequence[Adapted]) -> list[int]:
    return [len(layer.lora_A) for layer in layers]


# --- forward products -------------------------------------------------------------------------------------------------


def _product(x: Tensor, s: Tensor, layer: Adapted, keep_z: bool, call: _Call) -> tuple[Tensor, Tensor | None]:
    """y [M, N], and z = y before out_scale and bias if it is to be kept."""
    weight, B = layer.weight.detach().to(x.dtype), layer.lora_B.detach().to(x.dtype).contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    candidates = {
        "cublas": lambda: _by_cublas(x, s, weight, B, layer, keep_z),
        "triton": lambda: lora_launch.forward(x, weight, s, B, layer.scale, layer.bias, layer.out_scale, keep_z),
    }
    kind = "forward" if layer.out_scale is None else "forward, z kept" if keep_z else "forward, scaled"
    product = Product(kind, len(x), len(B), x.shape[1], B.shape[1], x.dtype, x.device)
    return candidates[plan(product, candidates, call.path)]()


def _by_cublas(
    x: Tensor, s: Tensor, weight: Tensor, B: Tensor, layer: Adapted, keep_z: bool
) -> tuple[Tensor, Tensor | None]:
    """The adapter's term is written first and read in the product; added afterwards, y would be read and written."""
    z = torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device)
    if layer.bias is None or layer.out_scale is not None:
        torch.addmm(z, s, B.t(), beta=0, alpha=layer.scale, out=z)
    else:
        torch.addmm(layer.bias.detach().to(x.dtype), s, B.t(), alpha=layer.scale, out=z)
    torch.addmm(z, x, weight.t(), out=z)
    return _scaled(z, layer, keep_z)


def _scaled(z: Tensor, layer: Adapted, keep_z: bool) -> tuple[Tensor, Tensor | None]:
    """With an out_scale: y = out_scale * z + bias; without one z is y."""
    if layer.out_scale is None:
        return z, None
    y = torch.mul(z, layer.out_scale.detach(), out=torch.empty_like(z) if keep_z else z)
    if layer.bias is not None:
        y += layer.bias.detach()
    return y, z if keep_z else None


def _with_room(x: Tensor, ranks: int, call: _Call) -> Tensor:
    """x [M, K] and columns for s: [M, K + R], R padded with zeros; x's own memory where that has room."""
    rows, columns = x.shape
    shape = (rows, columns + _padded(ranks))
    if call.augmented is not None and call.augmented.x_has_room:
        if x.stride(0) < shape[1]:
            raise ValueError(f"x has no room for {ranks} more columns; take a view made by room_for")
        wide = x.data.as_strided(shape, (x.stride(0), 1))
    else:
        wide = torch.empty(shape, dtype=x.dtype, device=x.device)
        wide[:, :columns] = x
    wide[:, columns + ranks :].zero_()
    return wide


def _augmented_product(
    wide: Tensor, index: int, layers: Sequence[Adapted], keep_z: bool, call: _Call
) -> tuple[Tensor, Tensor | None]:
    """The same as `_product` from [x | s] in one product of cuBLAS."""
    layer = layers[index]
    if call.augmented is not None:
        held = call.augmented.weights[index]
    else:
        ranks = _ranks(layers)
        held = AugmentedWeight(layer.weight.detach().to(wide.dtype), sum(ranks), sum(ranks[:index]))
    weight = held.refresh(layer.lora_B, layer.scale).t()
    if layer.bias is None or layer.out_scale is not None:
        return _scaled(torch.mm(wide, weight), layer, keep_z)
    return torch.addmm(layer.bias.detach().to(wide.dtype), wide, weight), None


# --- backward products ------------------------------------------------------------------------------------------------


def _adapter_gradients(dy: Tensor, layer: Adapted, s: Tensor, t: Tensor, wanted: bool, keep: float) -> Tensor | None:
    """Fill t = scale * keep * dy B and return dB = scale * dy^T s if it is wanted."""
    B = layer.lora_B.detach().to(dy.dtype).contiguous()
    factor = layer.scale * keep
    if wanted and B.shape[1] <= lora_launch.PAIRED_RANK:
        return lora_launch.project_and_outer(dy, B, s, t, (factor, layer.scale)).to(layer.lora_B.dtype)
    lora_launch.project(dy, B.t(), t, factor=factor)
    if not wanted:
        return None
    return lora_launch.outer(dy, s, None, factor=layer.scale, transposed=True).to(layer.lora_B.dtype)


def _input_gradient(
    dys: Sequence[Tensor], layers: Sequence[Adapted], t: Tensor, mask: Tensor | None, call: _Call
) -> Tensor:
    """keep * (t A) and the dy W of every layer, [M, K]."""
    A = _downs(layers, t.dtype)
    weights = [layer.weight.detach().to(t.dtype) for layer in layers]
    weights = [weight if weight.stride(1) == 1 else weight.contiguous() for weight in weights]

    def by_cublas() -> Tensor:
        term = torch.mm(t, A) if mask is None else lora_launch.masked_product(t, A, mask)
        return torch.addmm(term, dys[0], weights[0], out=term)

    candidates: dict[str, Callable[[], Tensor]] = {
        "cublas": by_cublas,
        "triton": lambda: lora_launch.input_gradient(dys[0], weights[0], t, A, mask),
    }
    kind = "input gradient" if mask is None else "input gradient, masked"
    product = Product(kind, len(t), len(weights[0]), A.shape[1], A.shape[0], t.dtype, t.device)
    wanted = "cublas" if call.path == "augmented" else call.path
    dx: Tensor = candidates[plan(product, candidates, wanted)]()
    for dy, weight in zip(dys[1:], weights[1:], strict=True):
        torch.addmm(dx, dy, weight, out=dx)
    return dx
