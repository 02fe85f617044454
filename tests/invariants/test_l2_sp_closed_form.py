"""L2-SP on linear regression, where the optimum is known: W = (X^T X + lambda I)^-1 (X^T Y + lambda W0)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ftlab.losses.penalties import L2SP


@pytest.mark.parametrize("strength", [0.1, 1.0, 30.0])
def test_gradient_descent_finds_the_closed_form(strength: float) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(40, 4), torch.randn(40, 3)
    model = nn.Linear(4, 3, bias=False)
    start = model.weight.detach().clone()
    gram = x.t() @ x
    expected = torch.linalg.solve(gram + strength * torch.eye(4), x.t() @ y + strength * start.t()).t()

    penalty = L2SP(model, strength)
    curvature = 2 * (float(torch.linalg.matrix_norm(gram, 2)) + strength)
    optimizer = torch.optim.SGD(model.parameters(), lr=1 / curvature)
    for _ in range(200):
        optimizer.zero_grad()
        ((model(x) - y).square().sum() + penalty.value(model)).backward()
        optimizer.step()
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-4, atol=1e-5)
    unregularised = torch.linalg.lstsq(x, y).solution.t()
    assert not torch.allclose(expected, unregularised, rtol=1e-3)
