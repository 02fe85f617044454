"""RMSNorm and LayerNorm, alone and with the addition to the residual stream."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from ftlab_kernels import norm as kernel
from ftlab_kernels.common import INTERPRETED, KernelUnavailableError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.harness import ABSOLUTE, DTYPES, device, judge, mutant, name_of, noticed, random, run, strided

EPS = 1e-5
KINDS = ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm")
REFERENCES = {
    "rms_norm": kernel.reference,
    "add_rms_norm": kernel.add_reference,
    "layer_norm": kernel.layer_norm_reference,
    "add_layer_norm": kernel.add_layer_norm_reference,
}


def inputs_of(kind: str, shape: tuple[int, ...], dtype: torch.dtype, of_weight: torch.dtype) -> dict[str, Tensor]:
    """x (and residual) with a mean of 0.5, weight (and bias)."""
    inputs = {"x": (random(*shape, seed=1) + 0.5).to(dtype)}
    if kind.startswith("add"):
        inputs["residual"] = random(*shape, dtype=dtype, seed=2)
    inputs["weight"] = (random(shape[-1], seed=3) + 1).to(of_weight)
    if kind.endswith("layer_norm"):
        inputs["bias"] = random(shape[-1], dtype=of_weight, seed=4)
    return inputs


def upstream_of(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    return [random(*shape, dtype=dtype, seed=seed) for seed in (5, 6)[: 1 + kind.startswith("add")]]


def check(
    module: ModuleType = kernel,
    kind: str = "rms_norm",
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, ...] = (17, 37),
    of_weight: torch.dtype | None = None,
    eps: float = EPS,
) -> None:
    inputs = inputs_of(kind, shape, dtype, of_weight or dtype)
    judge(
        functools.partial(getattr(module, kind), eps=eps),
        functools.partial(REFERENCES[kind], eps=eps),
        inputs,
        upstream_of(kind, shape, dtype),
        list(inputs),
        # An fp32 sum over M rows is off by about sqrt(M) roundings, and torch's own may be lucky.
        absolute=max(ABSOLUTE[dtype], 1e-6 * math.sqrt(math.prod(shape[:-1]))),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", [(1, 16), (17, 37), (257, 16), (3, 5, 129), (2, 1100)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(kernel, kind, dtype, shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "of_weight"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.bfloat16)],
)
def test_weights_of_another_dtype(kind: str, dtype: torch.dtype, of_weight: torch.dtype) -> None:
    check(kernel, kind, dtype, (7, 100), of_weight)


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(KINDS), st.sampled_from(DTYPES), st.integers(1, 40), st.integers(1, 300))
def test_any_shape(kind: str, dtype: torch.dtype, rows: int, width: int) -> None:
    check(kernel, kind, dtype, (rows, width))


@pytest.mark.parametrize("kind", KINDS)
def test_the_widest_rows(kind: str) -> None:
    """Their sums for the weights have a kernel of their own."""
    check(kernel, kind, torch.bfloat16, (5, kernel.FUSED_WIDTH + 1))
    check(kernel, kind, torch.float32, (1, kernel.MAX_WIDTH))


def test_only_one_of_weight_and_bias_trains() -> None:
    for width in (40, kernel.FUSED_WIDTH + 8):
        inputs = inputs_of("layer_norm", (4, width), torch.float32, torch.float32)
        for wanted in (["x"], ["bias"], ["weight"], ["x", "weight"], ["x", "bias"]):
            arguments = (inputs, upstream_of("layer_norm", (4, width), torch.float32), wanted)
            judge(
                functools.partial(kernel.layer_norm, eps=EPS),
                functools.partial(kernel.layer_norm_reference, eps=EPS),
                *arguments,
            )


def test_without_a_bias() -> None:
    inputs = inputs_of("rms_norm", (9, 48), torch.float32, torch.float32)
    judge(
        lambda x, weight: kernel.layer_norm(x, weight, None, EPS),
        lambda x, weight: kernel.layer_norm_reference(x, weight, None, EPS),
        inputs,
        upstream_of("layer_norm", (9, 48), torch.float32),
        ["x", "weight"],
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["apart", "transposed", "expanded"])
def test_strided_rows_are_read_right(kind: str, layout: str) -> None:
    change: dict[str, Callable[[Tensor], Tensor]] = {
        "apart": strided,
        "transposed": lambda x: x.t().contiguous().t(),
        "expanded": lambda x: x[:1].expand_as(x),
    }
    inputs = inputs_of(kind, (9, 24), torch.float32, torch.float32)
    there = {name: change[layout](x) if x.dim() == 2 else x for name, x in inputs.items()}
    upstream = upstream_of(kind, (9, 24), torch.float32)
    function = functools.partial(getattr(kernel, kind), eps=EPS)
    # Not by run(): it detaches, which keeps the strides.
    found = run(function, there, [change[layout](up) for up in upstream], list(inputs))
    wanted = run(
        function,
        {name: x.contiguous() for name, x in there.items()},
        [change[layout](up).contiguous() for up in upstream],
        list(inputs),
    )
    for name, exact in wanted.items():
        assert torch.equal(found[name], exact), name


def test_a_strided_weight() -> None:
    x, weight = random(3, 16), random(32)[::2]
    assert torch.equal(kernel.rms_norm(x, weight, EPS), kernel.rms_norm(x, weight.contiguous(), EPS))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_the_sum_is_torchs_and_the_norm_is_of_it(dtype: torch.dtype) -> None:
    x, residual, weight = random(9, 40, dtype=dtype, scale=3), random(9, 40, dtype=dtype, seed=1), random(40)
    normed, summed = kernel.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(summed, x + residual)
    assert torch.equal(normed, kernel.rms_norm(summed, weight, EPS))
    normed, summed = kernel.add_layer_norm(x, residual, weight, None, EPS)
    assert torch.equal(summed, x + residual)
    assert torch.equal(normed, kernel.layer_norm(summed, weight, None, EPS))


@pytest.mark.parametrize("kind", ["add_rms_norm", "add_layer_norm"])
@pytest.mark.parametrize("used", [0, 1])
def test_only_one_output_is_used(kind: str, used: int) -> None:
    inputs = inputs_of(kind, (5, 33), torch.float32, torch.float32)
    wanted = list(inputs) if used == 0 else ["x", "residual"]
    judge(
        lambda **named: getattr(kernel, kind)(**named, eps=EPS)[used],
        lambda **named: REFERENCES[kind](**named, eps=EPS)[used],
        inputs,
        upstream_of("rms_norm", (5, 33), torch.float32),
        wanted,
    )


def test_a_stream_that_goes_on_as_it_does_in_a_model() -> None:
    """Leaves whose gradients come from both outputs keep gradients of their own."""
    x, residual = (random(4, 24, seed=seed).requires_grad_() for seed in (0, 1))
    weight = torch.ones(24, device=device())
    normed, summed = kernel.add_rms_norm(x, residual, weight, EPS)
    again, summed = kernel.add_rms_norm(normed * 2, summed, weight, EPS)
    (again.square().sum() + summed.sum()).backward()
    assert x.grad is not None
    assert residual.grad is not None
    assert torch.equal(x.grad, residual.grad)
    before = residual.grad.clone()
    x.grad.zero_()
    assert torch.equal(residual.grad, before)


def test_frozen_weights_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    plain = kernel._partials
    monkeypatch.setattr(kernel, "_partials", lambda *arguments: seen.append(plain(*arguments)) or seen[-1])
    x = random(5, 32).requires_grad_()
    for weight in (random(32), random(32).requires_grad_()):
        kernel.rms_norm(x, weight, EPS).sum().backward()
    assert seen[0] == (None, None)
    assert seen[1][0] is not None
    assert weight.grad is not None


def test_what_is_kept() -> None:
    """s, the weight, and 4 bytes a row (LayerNorm 8)."""
    kept: list[Tensor] = []
    x, residual, weight = (random(*shape).requires_grad_() for shape in ((6, 64), (6, 64), (64,)))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        _, summed = kernel.add_layer_norm(x, residual, weight, None, EPS)
    assert sorted(x.numel() for x in kept) == [6, 6, 64, 6 * 64]
    assert summed.data_ptr() in {x.data_ptr() for x in kept}


def test_nothing_to_do() -> None:
    for kind in KINDS:
        inputs = inputs_of(kind, (0, 24), torch.float32, torch.float32)
        found = run(
            functools.partial(getattr(kernel, kind), eps=EPS),
            inputs,
            upstream_of(kind, (0, 24), torch.float32),
            list(inputs),
        )
        assert found["out0"].shape == (0, 24)
        assert torch.equal(found["d_weight"], torch.zeros_like(inputs["weight"]))


@pytest.mark.parametrize("kind", KINDS)
def test_large_values_and_zero_rows(kind: str) -> None:
    """1e4 is squared to beyond fp16; a row of zeros has no 1 / 0."""
    inputs = inputs_of(kind, (6, 64), torch.float16, torch.float16)
    inputs["x"] = inputs["x"] * 1e4
    inputs["x"][2] = 0
    if "residual" in inputs:
        inputs["residual"][2] = 0
    judge(
        functools.partial(getattr(kernel, kind), eps=EPS),
        functools.partial(REFERENCES[kind], eps=EPS),
        inputs,
        upstream_of(kind, (6, 64), torch.float16),
        list(inputs),
        absolute=1e-2,  # gradients of the row of zeros are about 1 / sqrt(eps)
    )


def test_a_constant_row_has_no_variance() -> None:
    """A mean subtracted before squaring: mean(x^2) - mean^2 would be noise here."""
    x = torch.full((3, 96), 1000.0, device=device())
    y = kernel.layer_norm(x, torch.ones(96, device=device()), None, EPS)
    assert torch.equal(y, torch.zeros_like(y))
    check(kernel, "layer_norm", torch.float32, (4, 96), eps=0.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(41, 72), (5, kernel.FUSED_WIDTH + 8)], ids=str)
def test_twice_the_same(kind: str, shape: tuple[int, int]) -> None:
    inputs = inputs_of(kind, shape, torch.bfloat16, torch.float32)
    function = functools.partial(getattr(kernel, kind), eps=EPS)
    first, second = (run(function, inputs, upstream_of(kind, shape, torch.bfloat16), list(inputs)) for _ in "12")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="13 GB of memory, and hours in the interpreter")
def test_offsets_beyond_31_bits() -> None:
    rows = 2**19 + 3
    x = torch.zeros(rows, 4096, dtype=torch.bfloat16, device=device())
    x[-3:] = random(3, 4096, dtype=torch.bfloat16)
    weight = random(4096, dtype=torch.bfloat16, seed=1)
    leaf, tail = x.requires_grad_(), x[-3:].detach().clone().requires_grad_()
    y, wanted = kernel.rms_norm(leaf, weight, EPS), kernel.rms_norm(tail, weight, EPS)
    assert torch.equal(y[-3:], wanted)
    (dx,) = torch.autograd.grad(y, leaf, y)
    assert torch.equal(dx[-3:], torch.autograd.grad(wanted, tail, wanted)[0])


def test_what_does_not_fit_is_refused() -> None:
    x, weight = random(3, 8), random(8)
    wrong: list[tuple[str, Callable[[], Any]]] = [
        ("rows of 1 to", lambda: kernel.rms_norm(random(3, 0), random(0), EPS)),
        ("rows of 1 to", lambda: kernel.rms_norm(torch.empty(1, kernel.MAX_WIDTH + 1), weight, EPS)),
        ("rows of 1 to", lambda: kernel.rms_norm(torch.tensor(1.0), weight, EPS)),
        ("the weight of rows of 8", lambda: kernel.rms_norm(x, random(9), EPS)),
        ("the bias of rows of 8", lambda: kernel.layer_norm(x, weight, random(8, 1), EPS)),
        ("one shape and dtype", lambda: kernel.add_rms_norm(x, random(2, 8), weight, EPS)),
        ("one shape and dtype", lambda: kernel.add_layer_norm(x, x.half(), weight, None, EPS)),
        ("fp32, fp16 and bf16", lambda: kernel.rms_norm(x.double(), weight, EPS)),
    ]
    for message, attempt in wrong:
        with pytest.raises(ValueError, match=message):
            attempt()
    with pytest.raises((KernelUnavailableError, ValueError)):
        kernel.rms_norm(torch.empty(2, 8, device="meta"), torch.empty(8, device="meta"), EPS)


def test_the_reference_has_the_gradient_of_finite_differences() -> None:
    for kind in KINDS:
        inputs = inputs_of(kind, (3, 7), torch.float64, torch.float64)
        leaves = tuple(x.double().cpu().requires_grad_() for x in inputs.values())
        assert torch.autograd.gradcheck(lambda *x, kind=kind: REFERENCES[kind](*x, EPS), leaves)


def of_the_rounded_sum(module: ModuleType) -> None:
    x, residual, weight = (random(*shape, dtype=torch.bfloat16) for shape in ((5, 40), (5, 40), (40,)))
    normed, summed = module.add_rms_norm(x, residual * 3, weight, EPS)
    assert torch.equal(normed, module.rms_norm(summed, weight, EPS))


def broad(module: ModuleType) -> None:
    """Every kind, several programs with several blocks each, dtypes that differ: what a mutation has to get past."""
    of_the_rounded_sum(module)
    with mock.patch.object(module, "_processors", return_value=1):
        for kind in KINDS:
            check(module, kind, torch.bfloat16, (70, 24))
            check(module, kind, torch.float32, (11, 1030))
    check(module, "layer_norm", torch.float32, (9, 12), eps=1.0)
    with mock.patch.object(module, "SUM_PROGRAMS", 1):
        check(module, "add_layer_norm", torch.bfloat16, (6, kernel.FUSED_WIDTH + 5), torch.float32)


MUTATIONS = {
    "eps left out": ("square + fp32(eps)", "square"),
    "mean not subtracted": ("x = tl.where(inside, x - mean[:, None], 0.0)", "x = tl.where(inside, x, 0.0)"),
    "padding in the variance": ("x = tl.where(inside, x - mean[:, None], 0.0)", "x = x - mean[:, None]"),
    "norm of the sum before rounding": ("x = summed.to(tl.float32)", "x = x"),
    "no weight": ("y = x * rstd[:, None] * w", "y = x * rstd[:, None]"),
    "no bias": ("    if BIAS:", "    if False:"),
    "residual of x's stride": ("m[:, None] * residual_stride", "m[:, None] * 0"),
    "padding in the mean": ("mean = tl.sum(x, 1) / columns", "mean = tl.sum(x, 1) / COLUMNS"),
    "no projection": ("dx = g - xh * (tl.sum(g * xh, 1) / columns)[:, None]", "dx = g"),
    "no mean of g": ("dx -= (tl.sum(g, 1) / columns)[:, None]", "dx = dx"),
    "g without the weight": ("g = dy * w", "g = dy"),
    "ds forgotten": ("dx += tl.load(d_summed_ptr", "dx += 0 * tl.load(d_summed_ptr"),
    "ds scaled": ("        dx *= rstd\n        if ADD:", "        if ADD:"),
    "dw of x, not of xh": ("dw += dy * xh\n        if DB", "dw += dy * x\n        if DB"),
    "dw of the first block only": ("tl.range(tl.program_id(0), tl.cdiv(rows, ROWS)", "tl.range(tl.program_id(0), 1"),
    "one program's dw": ("each.sum(0)", "each[0]"),
    "last row": ("mask=m < rows)\n    y =", "mask=m < rows - 1)\n    y ="),
    "wide dw without the mean": ("xh -= tl.load(mean_ptr", "xh -= 0 * tl.load(mean_ptr"),
    "wide db without its last rows": (
        "tl.range(tl.program_id(1), tl.cdiv(rows, ROWS)",
        "tl.range(tl.program_id(1), rows // ROWS",
    ),
    "wide sums for half the columns": (
        "c = tl.program_id(0) * COLUMNS + tl.arange",
        "c = tl.program_id(0) // 2 * COLUMNS + tl.arange",
    ),
    "dw in another's place": ("at = tl.program_id(0) * columns", "at = 0 * columns"),
}


@pytest.mark.parametrize(("old", "new"), MUTATIONS.values(), ids=MUTATIONS.keys())
def test_a_broken_kernel_is_noticed(old: str, new: str, tmp_path: Path) -> None:
    broken = mutant(kernel, tmp_path, old, new)
    assert noticed(lambda: broad(broken))


def test_the_unbroken_kernel_passes() -> None:
    broad(kernel)
