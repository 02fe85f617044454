"""Weights of 4 bits made again: bit for bit what plain torch makes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ftlab_kernels import nf4 as kernel
from ftlab_kernels.common import INTERPRETED, KernelUnavailableError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.harness import DTYPES, device, guarded_memory, mutant, name_of, noticed, random


def drawn(blocks: int) -> tuple[Tensor, Tensor]:
    """Codes of every kind, magnitudes from 1e-3 to 1e3."""
    codes = (torch.arange(blocks * 32) * 37 + torch.arange(blocks * 32) // 256).to(torch.uint8).view(blocks, 32)
    return codes.to(device()), torch.exp(2 * random(blocks)).to(device())


def check(function: Callable[..., Tensor] = kernel.nf4_dequantise, blocks: int = 67) -> None:
    codes, magnitudes = drawn(blocks)
    for dtype in DTYPES:
        found = function(codes, magnitudes, dtype)
        assert found.dtype == dtype
        assert torch.equal(found, kernel.reference(codes, magnitudes, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("blocks", [0, 1, 63, 64, 65, 200])
def test_every_number_is_the_reference_s(blocks: int, dtype: torch.dtype) -> None:
    codes, magnitudes = drawn(blocks)
    with guarded_memory():
        found = kernel.nf4_dequantise(codes, magnitudes, dtype)
    assert torch.equal(found, kernel.reference(codes, magnitudes, dtype))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 150), st.integers(0, 2**31))
def test_any_codes(blocks: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (blocks, 32), dtype=torch.uint8, generator=generator).to(device())
    magnitudes = torch.rand(blocks, generator=generator).to(device())
    found = kernel.nf4_dequantise(codes, magnitudes, torch.bfloat16)
    assert torch.equal(found, kernel.reference(codes, magnitudes, torch.bfloat16))


def test_the_reference_is_the_definition() -> None:
    """By hand: the upper half of a byte comes first, and a block has one magnitude."""
    codes = torch.tensor([[0x0F, *[0x77] * 31], [0x71, *[0x77] * 31]], dtype=torch.uint8)
    found = kernel.reference(codes, torch.tensor([2.0, 0.5]), torch.float32)
    expected = torch.zeros(2, 64)
    expected[0, :2] = torch.tensor([-2.0, 2.0])
    expected[1, 1] = 0.5 * kernel.LEVELS[1]
    assert torch.equal(found, expected)


def test_codes_that_are_apart_are_read_where_they_lie() -> None:
    codes, magnitudes = drawn(12)
    apart = torch.stack([codes, codes.flip(0)], 1)[:, 0]
    assert not apart.is_contiguous()
    found = kernel.nf4_dequantise(apart, magnitudes, torch.float32)
    assert torch.equal(found, kernel.reference(codes, magnitudes, torch.float32))


@pytest.mark.parametrize(
    ("codes", "magnitudes", "dtype"),
    [
        (torch.zeros(2, 32, dtype=torch.int8), torch.zeros(2), torch.float32),
        (torch.zeros(2, 64, dtype=torch.uint8), torch.zeros(2), torch.float32),
        (torch.zeros(2, 32, dtype=torch.uint8), torch.zeros(3), torch.float32),
        (torch.zeros(2, 32, dtype=torch.uint8), torch.zeros(2).half(), torch.float32),
        (torch.zeros(2, 32, dtype=torch.uint8), torch.zeros(2), torch.float64),
    ],
)
def test_what_does_not_fit_is_refused(codes: Tensor, magnitudes: Tensor, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"codes must be uint8 \[blocks, 32\], magnitudes fp32 \[blocks\]"):
        kernel.nf4_dequantise(codes, magnitudes, dtype)


@pytest.mark.skipif(not INTERPRETED, reason="with a GPU the CPU's tensors are refused")
def test_another_device_is_refused() -> None:
    codes, magnitudes = torch.zeros(1, 32, dtype=torch.uint8, device="meta"), torch.zeros(1, device="meta")
    with pytest.raises(KernelUnavailableError):
        kernel.nf4_dequantise(codes, magnitudes, torch.float32)


MUTANTS = {
    "halves swapped": ("tl.interleave(upper, lower)", "tl.interleave(lower, upper)"),
    "not interleaved": ("numbers = tl.interleave(upper, lower)", "numbers = tl.interleave(upper, upper)"),
    "no magnitude": ("levels_ptr + (codes & 15)) * magnitude", "levels_ptr + (codes & 15))"),
    "another block's magnitude": ("magnitudes_ptr + b, mask", "magnitudes_ptr + b // 2, mask"),
    "a level too far": ("levels_ptr + (codes >> 4))", "levels_ptr + (codes >> 4 ^ 1))"),
    "last blocks forgotten": ("inside = (b < blocks)[:, None]", "inside = (b < blocks - 1)[:, None]"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_kernel_is_noticed(name: str, tmp_path: Path) -> None:
    broken = mutant(kernel, tmp_path, *MUTANTS[name])
    assert noticed(lambda: check(broken.nf4_dequantise)), name


def test_the_kernel_itself_is_not() -> None:
    check()
