"""Rotary positions of queries and keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from ftlab_kernels import rope as kernel
from ftlab_kernels.common import INTERPRETED, KernelUnavailableError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.harness import DTYPES, device, judge, mutant, name_of, noticed, random, run, strided


def angles(rows: int, positions: int, half: int) -> tuple[Tensor, Tensor]:
    """cos and sin [rows, positions, 1, half] of packed positions: documents of 3 begin again at 0."""
    index = torch.arange(rows * positions, device=device()).view(rows, positions) % 3
    frequencies = 1.5 ** -torch.arange(half, dtype=torch.float32, device=device())
    angle = (index + 1)[:, :, None, None] * frequencies
    return angle.cos(), angle.sin()


def inputs_of(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, half: int | None = None, rows: int | None = None
) -> dict[str, Tensor]:
    """shape: B, T, H, K, E."""
    B, T, H, K, E = shape
    cos, sin = angles(B if rows is None else rows, T, E // 2 if half is None else half)
    q, k = random(B, T, H, E, dtype=dtype), random(B, T, K, E, dtype=dtype, seed=1)
    return {"q": q, "k": k, "cos": cos, "sin": sin}


def check(
    module: ModuleType = kernel,
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, int, int, int, int] = (2, 5, 3, 2, 12),
    half: int | None = None,
    rows: int | None = None,
) -> None:
    inputs = inputs_of(shape, dtype, half, rows)
    upstream = [random(*inputs[name].shape, dtype=dtype, seed=2) for name in ("q", "k")]
    judge(module.rope, kernel.reference, inputs, upstream, ["q", "k"])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 2), (2, 7, 4, 2, 16), (1, 17, 9, 3, 64), (3, 3, 5, 5, 20), (1, 3, 32, 8, 128)], ids=str
)
def test_outputs_and_gradients(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    check(kernel, dtype, shape)
    check(kernel, dtype, shape, rows=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("half", [1, 4, 7])
def test_part_of_a_head(half: int, dtype: torch.dtype) -> None:
    check(kernel, dtype, (2, 3, 3, 1, 24), half)
    check(kernel, dtype, (2, 3, 3, 1, 15), half)


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    B, T, H, K = (data.draw(st.integers(1, 4), label=name) for name in "BTHK")
    E = data.draw(st.integers(2, 40), label="E")
    half = data.draw(st.integers(1, E // 2), label="half")
    check(kernel, data.draw(st.sampled_from(DTYPES)), (B, T, H, K, E), half, data.draw(st.sampled_from((1, B))))


def test_angles_without_the_dimension_of_heads() -> None:
    inputs = inputs_of((2, 3, 2, 1, 8), torch.float32)
    wanted = kernel.rope(**inputs)
    flat = {name: x.squeeze(2) if name in ("cos", "sin") else x for name, x in inputs.items()}
    for function in (kernel.rope, kernel.reference):
        assert all(torch.allclose(found, exact) for found, exact in zip(function(**flat), wanted, strict=True))


def parts(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """q and k as views of one tensor, as a product with the stacked weights gives them."""
    B, T, H, E = inputs["q"].shape
    K = inputs["k"].shape[2]
    fused = torch.cat([inputs["q"], inputs["k"], torch.full_like(inputs["k"], torch.nan)], 2).view(B, T, -1)
    q, k, _ = fused.split([H * E, K * E, K * E], -1)
    assert not q.is_contiguous()
    return {**inputs, "q": q.view(B, T, H, E), "k": k.view(B, T, K, E)}


LAYOUTS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "parts of one tensor": parts,
    "heads first": lambda x: {n: y.transpose(1, 2).contiguous().transpose(1, 2) for n, y in x.items()},
    "apart": lambda x: {n: strided(y) for n, y in x.items()},
    "elements apart": lambda x: {n: y.transpose(2, 3).contiguous().transpose(2, 3) for n, y in x.items()},
    "one row for all": lambda x: {n: y[:1].expand_as(y) for n, y in x.items()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_are_read_right(layout: str) -> None:
    inputs = inputs_of((3, 5, 4, 2, 16), torch.float32)
    there = LAYOUTS[layout](inputs)
    upstream = LAYOUTS[layout]({**inputs, "q": inputs["q"] + 1, "k": inputs["k"] - 1})
    found = run(kernel.rope, there, [upstream["q"], upstream["k"]], ["q", "k"])
    plain = {name: x.contiguous() for name, x in there.items()}
    wanted = run(kernel.rope, plain, [upstream[name].contiguous() for name in ("q", "k")], ["q", "k"])
    for name, exact in wanted.items():
        assert torch.equal(found[name], exact), name
    exact = run(kernel.reference, plain, [upstream["q"], upstream["k"]], ["q", "k"])
    assert all(torch.allclose(found[name], exact[name], atol=1e-5) for name in exact)


def test_the_arguments_stay_as_they_are() -> None:
    inputs = inputs_of((2, 3, 2, 1, 8), torch.float32)
    before = {name: x.clone() for name, x in inputs.items()}
    kernel.rope(**inputs)
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)


def test_turning_back_restores() -> None:
    inputs = inputs_of((2, 5, 3, 2, 12), torch.float32)
    q, k = kernel.rope(**inputs)
    found = kernel.rope(q, k, inputs["cos"], -inputs["sin"])
    assert torch.allclose(found[0], inputs["q"], atol=1e-6)
    assert torch.allclose(found[1], inputs["k"], atol=1e-6)


def test_only_one_output_is_used() -> None:
    inputs = inputs_of((2, 3, 2, 1, 8), torch.float32)
    for used in (0, 1):
        q, k = (inputs[name].clone().requires_grad_() for name in ("q", "k"))
        kernel.rope(q, k, inputs["cos"], inputs["sin"])[used].sum().backward()
        found = (q.grad, k.grad)
        assert found[used] is not None
        assert float(found[used].abs().sum()) > 0
        other = found[1 - used]
        assert other is not None
        assert float(other.abs().sum()) == 0


def test_what_is_kept() -> None:
    kept: list[Tensor] = []
    inputs = inputs_of((2, 3, 2, 1, 8), torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        kernel.rope(inputs["q"].requires_grad_(), inputs["k"].requires_grad_(), inputs["cos"], inputs["sin"])
    assert {x.data_ptr() for x in kept} == {inputs["cos"].data_ptr(), inputs["sin"].data_ptr()}


def test_nothing_to_do() -> None:
    for shape in ((0, 3, 2, 1, 8), (2, 0, 2, 1, 8)):
        inputs = inputs_of(shape, torch.float32)
        inputs["q"].requires_grad_()
        q, k = kernel.rope(**inputs)
        assert (q.shape, k.shape) == (inputs["q"].shape, inputs["k"].shape)
        q.sum().backward()


def test_twice_the_same() -> None:
    inputs = inputs_of((2, 5, 3, 2, 12), torch.bfloat16)
    first, second = (run(kernel.rope, inputs, [inputs["q"], inputs["k"]], ["q", "k"]) for _ in "12")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="9 GB of memory, and hours in the interpreter")
def test_offsets_beyond_31_bits() -> None:
    T = 2**19 + 3
    cos, sin = angles(1, T, 64)
    q = torch.zeros(1, T, 32, 128, dtype=torch.bfloat16, device=device())
    q[:, -3:] = random(1, 3, 32, 128, dtype=torch.bfloat16)
    k = q[:, :, :8]
    found = kernel.rope(q, k, cos, sin)
    wanted = kernel.rope(q[:, -3:], k[:, -3:], cos[:, -3:], sin[:, -3:])
    assert torch.equal(found[0][:, -3:], wanted[0])
    assert torch.equal(found[1][:, -3:], wanted[1])


def test_what_does_not_fit_is_refused() -> None:
    inputs = inputs_of((2, 3, 2, 1, 8), torch.float32)
    q, k, cos, sin = inputs.values()
    wrong: list[tuple[str, Callable[[], Any]]] = [
        ("with one E", lambda: kernel.rope(q, k[..., :4], cos, sin)),
        ("with one E", lambda: kernel.rope(q, k[:, :2], cos, sin)),
        ("with one E", lambda: kernel.rope(q[0], k[0], cos, sin)),
        ("both be fp32", lambda: kernel.rope(q, k.half(), cos, sin)),
        ("both be fp32", lambda: kernel.rope(q.double(), k.double(), cos, sin)),
        ("of one shape", lambda: kernel.rope(q, k, cos, sin[:1])),
        ("of one shape", lambda: kernel.rope(q, k, cos.half(), sin.half())),
        ("must be \\[2 or 1, 3, at most 4\\]", lambda: kernel.rope(q, k, cos[:, :2], sin[:, :2])),
        (
            "must be \\[2 or 1, 3, at most 4\\]",
            lambda: kernel.rope(q, k, cos.repeat(1, 1, 1, 2), sin.repeat(1, 1, 1, 2)),
        ),
        (
            "must be \\[2 or 1, 3, at most 4\\]",
            lambda: kernel.rope(q, k, cos.repeat(1, 1, 2, 1), sin.repeat(1, 1, 2, 1)),
        ),
        ("must be \\[2 or 1, 3, at most 4\\]", lambda: kernel.rope(q, k, cos[..., :0], sin[..., :0])),
    ]
    for message, attempt in wrong:
        with pytest.raises(ValueError, match=message):
            attempt()
    with pytest.raises((KernelUnavailableError, ValueError)):
        kernel.rope(*(x.to("meta") for x in inputs.values()))


def test_the_reference_is_a_rotation_in_the_complex_plane() -> None:
    """x[i] + i x[i + half] times e^(i angle)."""
    q, k, cos, sin = inputs_of((2, 3, 2, 1, 8), torch.float32).values()
    turned = torch.complex(q[..., :4], q[..., 4:]) * torch.complex(cos, sin)
    found = kernel.reference(q, k, cos, sin)[0]
    assert torch.allclose(found, torch.cat([turned.real, turned.imag], -1), atol=1e-6)
    leaves = tuple(x.double().cpu().requires_grad_() for x in (q, k))
    assert torch.autograd.gradcheck(lambda q, k: kernel.reference(q, k, cos.double().cpu(), sin.double().cpu()), leaves)


def broad(module: ModuleType) -> None:
    """Several rows, their own angles, part of a head, heads that do not fill a block, views."""
    check(module)
    check(module, torch.bfloat16, (2, 3, 3, 1, 24), 5)
    check(module, rows=1)
    inputs = parts(inputs_of((3, 5, 3, 2, 16), torch.float32))
    found, exact = module.rope(**inputs), kernel.reference(**inputs)
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(found, exact, strict=True))


MUTATIONS = {
    "sign of the first": ("first * cos - second * sin", "first * cos + second * sin"),
    "sign of the second": ("second * cos + first * sin", "second * cos - first * sin"),
    "cos and sin swapped": ("first * cos - second * sin", "first * sin - second * cos"),
    "backward turns forwards": ("sin = -sin", "sin = sin"),
    "neighbours": ("source + half", "source + 1"),
    "the angles of position 0": ("row * sin_row + position * sin_position", "row * sin_row"),
    "the angles of row 0": ("row * cos_row + position", "position"),
    "the rest left out": ("    if REST > 0:", "    if False:"),
    "the rest from elsewhere": ("j = 2 * half + tl.arange", "j = half + tl.arange"),
    "heads side by side": (
        "source = x_ptr + head.to(tl.int64) * head_stride",
        "source = x_ptr + head.to(tl.int64) * head_stride // 2",
    ),
    "a head too many": ("inside = (head < heads) & (i < half)", "inside = (head <= heads) & (i < half)"),
    "a head too few": ("inside = (head < heads) & (i < half)", "inside = (head < heads - 1) & (i < half)"),
    "k where q is": ("k_ptr += row * k_row", "k_ptr += row * q_row"),
    "q where k is": ("q_ptr += row * q_row + position * q_position", "q_ptr += row * q_row + position * k_position"),
    "angles of one row for all": ("one_row = cos.shape[0] == 1", "one_row = True"),
}


@pytest.mark.parametrize(("old", "new"), MUTATIONS.values(), ids=MUTATIONS.keys())
def test_a_broken_kernel_is_noticed(old: str, new: str, tmp_path: Path) -> None:
    broken = mutant(kernel, tmp_path, old, new)
    assert noticed(lambda: broad(broken))


def test_the_unbroken_kernel_passes() -> None:
    broad(kernel)
