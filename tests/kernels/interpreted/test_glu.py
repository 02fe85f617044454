"""Gated units: SwiGLU and both GEGLUs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from ftlab_kernels import glu as kernel
from ftlab_kernels.common import INTERPRETED, KernelUnavailableError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.harness import DTYPES, device, judge, mutant, name_of, noticed, random, run, strided

OVERFLOWS = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value")  # NumPy's
KINDS = ("swiglu", "tanh", "none")
REFERENCES: dict[str, Callable[..., Tensor]] = {
    "swiglu": kernel.reference,
    "tanh": functools.partial(kernel.geglu_reference, approximate="tanh"),
    "none": functools.partial(kernel.geglu_reference, approximate="none"),
}


def exact_tanh(gate: Tensor, up: Tensor) -> Tensor:
    """The GEGLU whose 1 + tanh u does not cancel, as it does in fp64 too for u below -19."""
    return gate * torch.sigmoid(2 * (2 / math.pi) ** 0.5 * (gate + 0.044715 * gate**3)) * up


EXACT = {**REFERENCES, "tanh": exact_tanh}


def function(kind: str, module: ModuleType = kernel) -> Callable[..., Tensor]:
    found: Callable[..., Tensor] = (
        module.swiglu if kind == "swiglu" else functools.partial(module.geglu, approximate=kind)
    )
    return found


def check(
    module: ModuleType = kernel,
    kind: str = "swiglu",
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, ...] = (17, 37),
    scale: float = 2.0,
) -> None:
    gate, up = random(*shape, dtype=dtype, scale=scale), random(*shape, dtype=dtype, seed=1)
    upstream = [random(*shape, dtype=dtype, seed=2)]
    judge(function(kind, module), REFERENCES[kind], {"gate": gate, "up": up}, upstream, ["gate", "up"])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", [(1, 16), (17, 37), (257, 16), (3, 5, 129), (2, 1100), (31,)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(kernel, kind, dtype, shape)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(KINDS), st.sampled_from(DTYPES), st.integers(1, 50), st.integers(1, 90))
def test_any_shape(kind: str, dtype: torch.dtype, rows: int, width: int) -> None:
    check(kernel, kind, dtype, (rows, width))


@OVERFLOWS
@pytest.mark.parametrize("kind", KINDS)
def test_every_bf16_number(kind: str) -> None:
    """All finite ones up to 1e18, of either sign: the output, and the gradients as far as torch has any."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    numbers = bits.view(torch.bfloat16)
    gate = numbers[numbers.abs() < 1e18].to(device())
    one = torch.ones_like(gate)
    judge(function(kind), REFERENCES[kind], {"gate": gate, "up": one}, [one], ["gate", "up"])
    # And the small results beside the large ones, by their own size. Below 2^-100 a GPU may give 0.
    found = run(function(kind), {"gate": gate, "up": one}, [one], ["gate", "up"])
    exact = run(EXACT[kind], {"gate": gate.double(), "up": one.double()}, [one.double()], ["gate", "up"])
    for name, truth in exact.items():
        # torch's form of erf and its complement loses all digits below about -5; so does the kernel's, as fp32 must.
        floor = 2.0**-100 + 2e-7 * gate.double().abs() * (kind == "none")
        wrong = (found[name].double() - truth).abs() - 2.0**-8 * truth.abs()
        assert bool((wrong <= floor).all()), name


@OVERFLOWS
@pytest.mark.parametrize("kind", KINDS)
def test_the_logistic_function_keeps_its_digits(kind: str) -> None:
    """fp32 over the range where an activation bends: relative to the truth except near a zero of the gradient."""
    gate = torch.linspace(-12, 12, 4001, device=device())
    one = torch.ones_like(gate)
    found = run(function(kind), {"gate": gate, "up": one}, [one], ["gate", "up"])
    exact = run(REFERENCES[kind], {"gate": gate.double(), "up": one.double()}, [one.double()], ["gate", "up"])
    for name, truth in exact.items():
        error = (found[name].double() - truth).abs()
        assert float(error.max()) < 5e-6, name
        if kind == "swiglu" and name != "d_gate":
            assert float((error / truth.abs().clamp_min(1e-20)).max()) < 1e-5, name


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU erf is CUDA's own, which is exact to 2 units in the last place")
def test_erf_is_exact() -> None:
    x = torch.linspace(-6, 6, 2001)
    found = kernel.geglu(x, torch.ones_like(x), "none").double()
    exact = x.double() * 0.5 * (1 + torch.erf(x.double() * 0.5**0.5))
    assert float((found - exact).abs().max()) < 6e-7


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["halves", "apart", "transposed", "expanded"])
def test_strided_rows_are_read_right(kind: str, layout: str) -> None:
    gate, up, dh = (random(9, 24, seed=seed) for seed in (0, 1, 2))
    if layout == "halves":
        there = list(torch.cat([gate, up], 1).chunk(2, 1))
        assert not there[1].is_contiguous()
        there.append(strided(dh))
    else:
        change: dict[str, Callable[[Tensor], Tensor]] = {
            "apart": strided,
            "transposed": lambda x: x.t().contiguous().t(),
            "expanded": lambda x: x[:, :1].expand_as(x),
        }
        there = [change[layout](x) for x in (gate, up, dh)]
    found = run(function(kind), {"gate": there[0], "up": there[1]}, [there[2]], ["gate", "up"])
    plain = [x.contiguous() for x in there]
    wanted = run(function(kind), {"gate": plain[0], "up": plain[1]}, [plain[2]], ["gate", "up"])
    exact = run(REFERENCES[kind], {"gate": plain[0], "up": plain[1]}, [plain[2]], ["gate", "up"])
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name
        assert torch.allclose(found[name], exact[name], atol=1e-5), name


def test_halves_of_one_product_train() -> None:
    both = random(5, 48).requires_grad_()
    kernel.swiglu(*both.chunk(2, -1)).sum().backward()
    exact = random(5, 48).requires_grad_()
    kernel.reference(*exact.chunk(2, -1)).sum().backward()
    assert both.grad is not None
    assert exact.grad is not None
    assert torch.allclose(both.grad, exact.grad, atol=1e-6)


def test_only_one_side_trains() -> None:
    gate, up = random(3, 8), random(3, 8, seed=1).requires_grad_()
    kernel.swiglu(gate, up).sum().backward()
    assert up.grad is not None
    assert torch.allclose(up.grad, torch.nn.functional.silu(gate), atol=1e-6)
    assert gate.grad is None


def test_what_is_kept() -> None:
    kept: list[Tensor] = []
    gate, up = random(3, 8).requires_grad_(), random(3, 8, seed=1).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        kernel.geglu(gate, up)
    assert [x.data_ptr() for x in kept] == [gate.data_ptr(), up.data_ptr()]


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_where_it_is(kind: str) -> None:
    gate, up = random(3, 40), random(3, 40, seed=1)
    gate[1, 5], up[2, 7] = torch.nan, torch.nan
    h = function(kind)(gate, up)
    assert torch.isnan(h).nonzero().tolist() == [[1, 5], [2, 7]]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_do(kind: str) -> None:
    for shape in ((0, 8), (3, 0), (0,)):
        gate, up = random(*shape).requires_grad_(), random(*shape)
        h = function(kind)(gate, up)
        assert h.shape == shape
        h.sum().backward()
        assert gate.grad is not None


@pytest.mark.parametrize("kind", KINDS)
def test_twice_the_same(kind: str) -> None:
    inputs = {"gate": random(9, 70, dtype=torch.bfloat16), "up": random(9, 70, dtype=torch.bfloat16, seed=1)}
    first, second = (run(function(kind), inputs, [inputs["up"]], ["gate", "up"]) for _ in "12")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="22 GB of memory, and hours in the interpreter")
def test_offsets_beyond_31_bits() -> None:
    rows = 2**18 + 3
    gate = torch.zeros(rows, 8192, dtype=torch.bfloat16, device=device())
    gate[-3:] = random(3, 8192, dtype=torch.bfloat16)
    leaf, tail = gate.requires_grad_(), gate[-3:].detach().clone().requires_grad_()
    h, wanted = kernel.swiglu(leaf, gate.detach()), kernel.swiglu(tail, tail.detach())
    assert torch.equal(h[-3:], wanted)
    (found,) = torch.autograd.grad(h, leaf, h)
    assert torch.equal(found[-3:], torch.autograd.grad(wanted, tail, wanted)[0])


def test_what_does_not_fit_is_refused() -> None:
    x = random(3, 8)
    wrong: list[tuple[str, Callable[[], Any]]] = [
        ("one shape and dtype", lambda: kernel.swiglu(x, x[:2])),
        ("one shape and dtype", lambda: kernel.geglu(x, x.half())),
        ("one shape and dtype", lambda: kernel.swiglu(x.double(), x.double())),
        ("tanh or none", lambda: kernel.geglu(x, x, "erf")),
    ]
    for message, attempt in wrong:
        with pytest.raises(ValueError, match=message):
            attempt()
    with pytest.raises((KernelUnavailableError, ValueError)):
        kernel.swiglu(x.to("meta"), x.to("meta"))


def test_the_references_have_the_gradient_of_finite_differences() -> None:
    leaves = tuple(random(3, 7, seed=seed).double().cpu().requires_grad_() for seed in (0, 1))
    for kind in KINDS:
        assert torch.autograd.gradcheck(REFERENCES[kind], leaves)


def broad(module: ModuleType) -> None:
    """Each activation, several blocks of rows and columns, halves of one product."""
    for kind in KINDS:
        check(module, kind, torch.float32, (5, 1100))
        check(module, kind, torch.bfloat16, (130, 20))
    gate, up = random(7, 48).chunk(2, 1)
    for kind in KINDS:
        assert torch.allclose(function(kind, module)(gate, up), REFERENCES[kind](gate, up), atol=1e-5)


MUTATIONS = {
    "no activation": ("cast(x * share * up,", "cast(x * up,"),
    "no gate": ("cast(x * share * up,", "cast(x * share,"),
    "sign of the logistic function": ("tl.exp2(-x * _LOG2E)", "tl.exp2(x * _LOG2E)"),
    "2 to the power instead of e": ("tl.exp2(-x * _LOG2E)", "tl.exp2(-x)"),
    "no slope": ("(share + slope)", "share"),
    "slope of silu": ("slope = x * share * rest\n", "slope = x * share\n"),
    "the other constant of tanh": ("tl.constexpr(0.044715)", "tl.constexpr(0.047)"),
    "slope of the cube": ("square * (3.0 * _CUBE)", "square * _CUBE"),
    "tanh for erf": ("ACTIVATION == _TANH", "ACTIVATION != _SILU"),
    "density": ("(-0.5 * _LOG2E)", "(-0.5)"),
    "dup without the activation": ("cast(dh * x * share,", "cast(dh * x,"),
    "dgate without up": ("cast(dh * up * (share + slope),", "cast(dh * (share + slope),"),
    "gradients swapped": (
        "tl.store(d_up_ptr + at, cast(dh * x * share",
        "tl.store(d_up_ptr + at, cast(dh * up * share",
    ),
    "up of gate's stride": ("up_ptr + m * up_stride", "up_ptr + m * columns"),
    "last row": ("(m < rows) & (c < columns)", "(m < rows - 1) & (c < columns)"),
    "beyond the row": ("(m < rows) & (c < columns)", "(m < rows) & (c < columns + 1)"),
    "one block of columns": ("tl.program_id(0) % blocks * COLUMNS", "0 * blocks * COLUMNS"),
}


@pytest.mark.parametrize(("old", "new"), MUTATIONS.values(), ids=MUTATIONS.keys())
def test_a_broken_kernel_is_noticed(old: str, new: str, tmp_path: Path) -> None:
    broken = mutant(kernel, tmp_path, old, new)
    assert noticed(lambda: broad(broken))


def test_the_unbroken_kernel_passes() -> None:
    broad(kernel)
