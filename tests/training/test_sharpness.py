"""SAM's step against the formula by hand, over micro-batches, clipping, ranks and gradients that are no use."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ftlab.config import L2SPConfig, PrecisionConfig, RegularizerConfig
from ftlab.losses.penalties import build_penalties
from ftlab.models.llama import LlamaForCausalLM
from ftlab.training.loop import StepResult, train_step
from ftlab.training.parallel import Ranks, Replica
from ftlab.training.precision import Precision
from ftlab.training.sharpness import climbed
from tests.helpers.training import KeepGradients, collate, loss_sum, ragged_examples, run_ranks, tiny_llama

RHO = 0.3
FP32 = Precision(PrecisionConfig(), torch.device("cpu"))


def sam_step(
    micro: int, *, ranks: Ranks | None = None, max_grad_norm: float | None = None, **changes: Any
) -> tuple[LlamaForCausalLM, KeepGradients, StepResult]:
    """One step that moves nothing, on eight examples in micro-batches of `micro`."""
    ranks = ranks or Ranks()
    model = tiny_llama()
    optimizer = KeepGradients(model)
    batches = collate(ragged_examples(8), micro)[ranks.rank :: ranks.world]
    settings = {"climb": functools.partial(climbed, rho=RHO), **changes}
    result = train_step(
        Replica(model, loss_sum, ranks), optimizer, batches, precision=FP32, max_grad_norm=max_grad_norm, **settings
    )
    return model, optimizer, result


def gradient_at(parameters: list[Tensor], model: LlamaForCausalLM) -> tuple[Tensor, list[Tensor]]:
    """The mean loss of the eight examples with other parameters, and its gradient."""
    with torch.no_grad():
        for own, given in zip(model.parameters(), parameters, strict=True):
            own.copy_(given)
    (batch,) = collate(ragged_examples(8), 8)
    loss = loss_sum(model, batch) / batch.num_supervised
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


def by_hand() -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradient that the step follows."""
    loss, _, second = climbed_by_hand()
    return loss, second


def climbed_by_hand() -> tuple[float, float, dict[str, Tensor]]:
    """The loss here and up there, and the gradient up there."""
    model = tiny_llama()
    start = [parameter.detach().clone() for parameter in model.parameters()]
    loss, first = gradient_at(start, model)
    norm = torch.cat([gradient.flatten() for gradient in first]).norm()
    above, second = gradient_at([w + RHO * g / norm for w, g in zip(start, first, strict=True)], model)
    return float(loss), float(above), dict(zip(dict(model.named_parameters()), second, strict=True))


@pytest.mark.parametrize("micro", [1, 3, 8])
def test_the_gradient_is_that_of_the_climbed_weights(micro: int) -> None:
    model, optimizer, result = sam_step(micro)
    loss, expected = by_hand()
    assert result.nats / result.supervised == pytest.approx(loss, rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(optimizer.seen[name], gradient, rtol=1e-4, atol=1e-5)
    for own, before in zip(model.parameters(), tiny_llama().parameters(), strict=True):
        assert torch.equal(own, before)
    plain = sam_step(micro, climb=None)[1].seen
    assert any(not torch.allclose(plain[name], gradient, rtol=1e-3) for name, gradient in expected.items())


@pytest.mark.parametrize("micro", [1, 4, 8])
def test_the_rise_is_noted(micro: int) -> None:
    _, _, result = sam_step(micro)
    below, above, _ = climbed_by_hand()
    assert above - below > 0.01
    assert result.noted == {"sam/rise": pytest.approx((above - below) * result.supervised, rel=1e-3)}
    assert sam_step(micro, climb=None)[2].noted == {}


def test_what_an_objective_notes_is_of_the_weights_before_they_climb() -> None:
    smoothed = functools.partial(loss_sum, smoothing=0.2)
    batches = collate(ragged_examples(8), 4)
    model = tiny_llama()
    with torch.no_grad():
        cost = sum(float(smoothed(model, batch) - loss_sum(model, batch)) for batch in batches)
    climb = functools.partial(climbed, rho=RHO)
    result = train_step(Replica(model, smoothed, Ranks()), KeepGradients(model), batches, precision=FP32, climb=climb)
    assert result.noted.keys() == {"label_smoothing/cost", "sam/rise"}
    assert result.noted["label_smoothing/cost"] == pytest.approx(cost, rel=1e-3)


def test_clipping_is_of_the_second_gradient() -> None:
    _, optimizer, result = sam_step(4, max_grad_norm=0.01)
    _, expected = by_hand()
    norm = float(torch.cat([gradient.flatten() for gradient in expected.values()]).norm())
    assert result.grad_norm == pytest.approx(norm, rel=1e-4)
    for name, gradient in expected.items():
        torch.testing.assert_close(optimizer.seen[name], gradient * 0.01 / norm, rtol=1e-3, atol=1e-6)


def test_penalties_count_in_both_gradients() -> None:
    """At the pretrained weights the pull has no gradient; where the step has climbed to it does."""
    penalties = build_penalties(RegularizerConfig(l2_sp=L2SPConfig(2.0)), tiny_llama())
    _, optimizer, result = sam_step(8, penalties=penalties)
    assert result.penalties["l2_sp"] == 0
    plain, found = by_hand()[1], optimizer.seen
    difference = torch.cat([(found[name] - gradient).flatten() for name, gradient in plain.items()]).norm()
    assert float(difference) == pytest.approx(2 * 2.0 * RHO, rel=1e-3)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_gradient_that_is_no_use_moves_nothing(value: float) -> None:
    layer = nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.full_like(layer.weight, value)
    with climbed(layer, 0.5):
        assert torch.equal(layer.weight, before)


def test_the_weights_come_back_after_an_error() -> None:
    layer = nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.ones_like(layer.weight)

    def fail() -> None:
        with climbed(layer, 0.5):
            assert float((layer.weight - before).detach().norm()) == pytest.approx(0.5, rel=1e-5)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert torch.equal(layer.weight, before)


def compare_ranks(ranks: Ranks) -> None:
    _, optimizer, result = sam_step(2, ranks=ranks)
    below, above, _ = climbed_by_hand()
    assert result.noted["sam/rise"] == pytest.approx((above - below) * result.supervised, rel=1e-3)
    for name, gradient in by_hand()[1].items():
        torch.testing.assert_close(optimizer.seen[name], gradient, rtol=1e-4, atol=1e-5)


def test_two_ranks_climb_alike(tmp_path: Path) -> None:
    run_ranks(compare_ranks, tmp_path)
