from __future__ import annotations

import math

import pytest
import torch

from ftlab.operators.dropout import dropout, quantised


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_share_and_scale(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    n = 200_003  # not a multiple of the four elements of one draw
    y = dropout(torch.ones(n, dtype=dtype), p)
    assert y.dtype == dtype
    kept = y != 0
    assert abs(float((~kept).double().mean()) - p) < 4 * math.sqrt(p * (1 - p) / n)
    assert torch.equal(y[kept], torch.full_like(y[kept], 1 / (1 - quantised(p))))


def test_every_lane_of_a_draw_is_uniform() -> None:
    """Four elements share a draw: each lane, and each pair of neighbours, must be dropped as often as any other."""
    torch.manual_seed(0)
    draws, p = 100_000, 0.3
    dropped = (dropout(torch.ones(draws, 4), p) == 0).double()
    assert torch.allclose(dropped.mean(0), torch.full((4,), p).double(), atol=4 * math.sqrt(p * (1 - p) / draws))
    correlation = torch.corrcoef(dropped.t()) - torch.eye(4)
    assert float(correlation.abs().max()) < 4 / math.sqrt(draws)


def test_mask_of_backward_is_that_of_forward() -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 13, requires_grad=True)
    y = dropout(x, 0.4)
    upstream = torch.randn(13, 7).t()  # not contiguous
    y.backward(upstream)
    torch.testing.assert_close(x.grad, upstream * (y / x).detach())
    assert bool((y == 0).any())


def test_gradient_by_finite_differences() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

    def seeded(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return dropout(x, 0.4)

    assert torch.autograd.gradcheck(seeded, (x,))


def test_the_default_generator_decides() -> None:
    x = torch.ones(1000)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(dropout(x, 0.5), first)


def test_zero_probability_is_the_identity_and_draws_nothing() -> None:
    x = torch.randn(5)
    state = torch.get_rng_state()
    assert dropout(x, 0.0) is x
    assert torch.equal(torch.get_rng_state(), state)


def test_probabilities_near_the_ends() -> None:
    assert quantised(1e-9) == 0
    assert torch.equal(dropout(torch.ones(1000), 1e-9), torch.ones(1000))
    assert quantised(1 - 1e-9) == 1 - 2**-16
    assert torch.isfinite(dropout(torch.ones(100_000), 1 - 1e-9)).all()
    with pytest.raises(ValueError, match="probability"):
        dropout(torch.ones(3), 1.0)


def test_empty_input() -> None:
    assert dropout(torch.ones(0, 4), 0.5).shape == (0, 4)
