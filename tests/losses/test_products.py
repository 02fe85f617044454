"""Sums over s P Q + D, a block of rows at a time, against the whole product by autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ftlab.losses import products
from ftlab.losses.products import sum_over_product


def cubes(elements: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """Another weight for each row, so that a block that is taken for another one is noticed."""
    weights = torch.arange(1.0, 8.0)[rows, None].to(elements.dtype)
    return (weights * elements**3).sum(), 3 * weights * elements**2


@pytest.mark.parametrize("block", [1, 10, 18, 1000], ids="of {} elements".format)
@pytest.mark.parametrize("with_offset", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradient_are_those_of_the_whole_product(
    block: int, with_offset: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    p, q, offset = (torch.randn(shape, generator=generator) for shape in ((7, 2), (2, 5), (7, 5)))
    p, q = p.to(dtype).requires_grad_(), q.to(dtype).requires_grad_()
    whole = 1.5 * p @ q + (offset if with_offset else 0)
    expected = (torch.arange(1.0, 8.0)[:, None] * whole**3).sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sum_over_product((p, q, 1.5), offset if with_offset else None, cubes)
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(2 * value, (p, q)) for value in (found, expected))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=tolerance * float(reference.abs().max()))
