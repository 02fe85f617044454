"""Each function of the compiled C with inputs and reference, for its tests and for the tests on broken copies of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from ftlab_kernels import cpu, dropout
from ftlab_kernels.adapted import Adapted
from ftlab_kernels.random import keep_scale, mask_bytes, unpack_mask
from torch import Tensor

from ftlab.operators import torch_path
from ftlab.operators.checked_path import rounded_attention
from tests.kernels import harness
from tests.kernels.harness import random

DTYPES = (torch.float32, torch.bfloat16)
EPS = 1e-5
SEED = torch.tensor([0x1234_5678_9ABC_DEF0], dtype=torch.int64)
LAYERS = ((24, 3), (11, 8), (50, 4))  # (N, r) of each
Layout = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """kernel and reference take `inputs` by name; `wanted` have gradients, under `upstream`."""

    kernel: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: Mapping[str, Tensor]
    upstream: Sequence[Tensor] = ()
    wanted: Sequence[str] = ()

    def judge(self, absolute: float | None = None) -> None:
        harness.judge(self.kernel, self.reference, self.inputs, self.upstream, self.wanted, absolute=absolute)

    def run(self) -> dict[str, Tensor]:
        """Outputs and gradients of the kernel."""
        return harness.run(self.kernel, self.inputs, self.upstream, self.wanted)


def as_it_is(x: Tensor) -> Tensor:
    """The layout of what was just made."""
    return x


def norm_case(
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, ...] = (17, 37),
    added: bool = True,
    trains: bool = True,
    layout: Layout = as_it_is,
) -> Case:
    """Rows of very different sizes, the smallest of them near sqrt(eps)."""
    size = torch.logspace(-2, 1, shape[0]).view(-1, *[1] * (len(shape) - 1)) if shape[0] else 1.0
    inputs = {"x": layout((random(*shape) * size).to(dtype)), "weight": random(shape[-1], seed=1)}
    if added:
        inputs["residual"] = layout((random(*shape, seed=2) * size).to(dtype))
    ups = [random(*shape, dtype=dtype, seed=3), random(*shape, dtype=dtype, seed=4)]

    def by(path: Any) -> Callable[..., Any]:
        def norm(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Any:
            return path.rms_norm(x, weight, EPS) if residual is None else path.add_rms_norm(x, residual, weight, EPS)

        return norm

    wanted = [name for name in inputs if trains or name != "weight"]
    return Case(by(cpu), by(torch_path), inputs, ups if added else ups[:1], wanted)


def rope_case(
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, int, int, int, int] = (2, 9, 4, 2, 10),
    layout: Layout = as_it_is,
    rows: int | None = None,
) -> Case:
    """shape: B, T, H, K, E. rows: of cos and sin; B if None, or 1."""
    B, T, H, K, E = shape
    angles = random(B if rows is None else rows, T, 1, E // 2, scale=3.0, seed=5)
    inputs = {
        "q": layout(random(B, T, H, E, dtype=dtype)),
        "k": layout(random(B, T, K, E, dtype=dtype, seed=1)),
        "cos": angles.cos(),
        "sin": angles.sin(),
    }
    ups = [random(B, T, H, E, dtype=dtype, seed=2), random(B, T, K, E, dtype=dtype, seed=3)]

    def by(path: Any) -> Callable[..., Any]:
        return lambda q, k, cos, sin: path.rope(q, k, cos, sin)

    return Case(by(cpu), by(torch_path), inputs, ups, ["q", "k"])


def swiglu_case(
    dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (17, 37), layout: Layout = as_it_is
) -> Case:
    inputs = {"gate": layout(random(*shape, dtype=dtype, scale=4.0)), "up": layout(random(*shape, dtype=dtype, seed=1))}
    return Case(cpu.swiglu, torch_path.swiglu, inputs, [random(*shape, dtype=dtype, seed=2)], ["gate", "up"])


def dropout_case(
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, ...] = (17, 37),
    p: float = 0.3,
    layout: Layout = as_it_is,
) -> Case:
    return Case(
        lambda x: cpu.dropout(x, p, seed=SEED),
        lambda x: dropout.reference(x, p, SEED),
        {"x": layout(random(*shape, dtype=dtype))},
        [random(*shape, dtype=dtype, seed=1)],
        ["x"],
    )


def lora_reference(x: Tensor, adapted: Sequence[Adapted], p: float) -> tuple[Tensor, ...]:
    """With the mask that `mask_bytes` says."""
    # Of rows with something between them torch's bf16 product reads that too, and a NaN there times 0 is NaN.
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    keep = unpack_mask(mask_bytes(SEED, *rows.shape, p), x.shape[-1]) if p else torch.ones_like(rows)
    dropped = rows * keep * keep_scale(p)
    outputs = []
    for layer in adapted:
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        plain = F.linear(rows, layer.weight.to(x.dtype), bias)
        low = F.linear(dropped, layer.lora_A.to(x.dtype)) * layer.scale
        y = torch.addmm(plain, low, layer.lora_B.to(x.dtype).t())
        outputs.append(y.view(*x.shape[:-1], len(layer.weight)))
    return tuple(outputs)


def lora_tensors(
    K: int, layers: Sequence[tuple[int, int]] = LAYERS, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Weights in `dtype` and adapters in fp32; a bias for every second layer."""
    tensors = {}
    for i, (N, r) in enumerate(layers):
        tensors[f"W{i}"] = random(N, K, dtype=dtype, scale=K**-0.5, seed=10 * i)
        tensors[f"A{i}"] = random(r, K, scale=K**-0.5, seed=10 * i + 1)
        tensors[f"B{i}"] = random(N, r, scale=0.5, seed=10 * i + 2)
        if i % 2 == 0:
            tensors[f"b{i}"] = random(N, dtype=dtype, seed=10 * i + 3)
    return tensors


def adapted_of(tensors: Mapping[str, Tensor]) -> list[Adapted]:
    """The layers, each with a scale of its own."""
    count = sum(name.startswith("W") for name in tensors)
    return [
        Adapted(tensors[f"W{i}"], tensors.get(f"b{i}"), tensors[f"A{i}"], tensors[f"B{i}"], (2.0, 0.75, 1.3)[i])
        for i in range(count)
    ]


def lora_case(
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, ...] = (17, 37),
    p: float = 0.3,
    layers: Sequence[tuple[int, int]] = LAYERS,
    frozen: str = "",
    layout: Layout = as_it_is,
) -> Case:
    """frozen: which of W, b, A, B, x have no gradient."""
    inputs = {"x": layout(random(*shape, dtype=dtype)), **lora_tensors(shape[-1], layers, dtype)}
    return Case(
        lambda x, **tensors: cpu.lora_linears(x, adapted_of(tensors), p=p, seed=SEED),
        lambda x, **tensors: lora_reference(x, adapted_of(tensors), p),
        inputs,
        [random(*shape[:-1], N, dtype=dtype, seed=100 + N) for N, _ in layers],
        [name for name in inputs if name[0] not in frozen],
    )


def attention_case(
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, int, int, int, int, int] = (2, 4, 2, 9, 5, 10),
    layout: Layout = as_it_is,
) -> Case:
    """shape: B, H, K, T, prefix, E."""
    B, H, K, T, P, E = shape
    inputs = {
        "q": layout(random(B, H, T, E, dtype=dtype, scale=1.5)),
        "k": layout(random(B, K, P + T, E, dtype=dtype, scale=1.5, seed=1)),
        "v": layout(random(B, K, P + T, E, dtype=dtype, seed=2)),
    }
    ups = [random(B, H, T, E, dtype=dtype, seed=3)]
    return Case(cpu.causal_attention, lambda q, k, v: rounded_attention(q, k, v), inputs, ups, ["q", "k", "v"])


def cross_entropy_case(
    dtype: torch.dtype = torch.float32, shape: tuple[int, int] = (17, 37), scale: float = 3.0
) -> Case:
    """Labels at both ends of the vocabulary and between them. Outputs: the losses, and what becomes of the logits."""
    C, V = shape
    labels = torch.arange(C) * 7 % V
    labels[: C // 3] = 0
    labels[C // 3 : 2 * C // 3] = V - 1

    def kernel(logits: Tensor) -> tuple[Tensor, Tensor]:
        untouched, overwritten = logits.clone(), logits.clone()
        losses = cpu.cross_entropy_(overwritten, labels, gradient=True)
        torch.testing.assert_close(
            cpu.cross_entropy_(untouched, labels, gradient=False), losses, rtol=0, atol=0, equal_nan=True
        )
        torch.testing.assert_close(untouched, logits, rtol=0, atol=0, equal_nan=True)
        return losses, overwritten

    def reference(logits: Tensor) -> tuple[Tensor, Tensor]:
        precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
        gradient = precise.softmax(-1) - F.one_hot(labels, V)
        return F.cross_entropy(precise, labels, reduction="none"), gradient.to(logits.dtype)

    return Case(kernel, reference, {"logits": random(C, V, dtype=dtype, scale=scale)})


CASES: dict[str, Callable[..., Case]] = {
    "norm": norm_case,
    "rope": rope_case,
    "swiglu": swiglu_case,
    "dropout": dropout_case,
    "lora": lora_case,
    "attention": attention_case,
    "cross_entropy": cross_entropy_case,
}
