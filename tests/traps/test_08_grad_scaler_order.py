"""With loss scaling: unscale before clipping, leave out non-finite steps, halve the scale, keep it in checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ftlab.config import AdamWConfig, FullConfig, PrecisionConfig
from ftlab.methods import make_method
from ftlab.optim.adamw import build_optimizer
from ftlab.training.loop import train_step
from ftlab.training.parallel import Ranks, Replica
from ftlab.training.precision import Precision
from tests.helpers.training import collate, loss_sum, ragged_examples, tiny_llama

CPU = torch.device("cpu")


class ScaledFp32(Precision):
    """fp16's scaler around fp32 products, so that the arithmetic can be compared exactly."""

    def __init__(self) -> None:
        super().__init__(PrecisionConfig(compute="fp16"), CPU, allow_cpu_fp16=True)
        self.compute = torch.float32


def one_step(
    precision: Precision, *, broken: bool = False, objective: Callable[..., torch.Tensor] = loss_sum
) -> tuple[Any, Any, Any]:
    model = tiny_llama()
    optimizer = build_optimizer(AdamWConfig(lr=1e-2), model, make_method(FullConfig(), seed=0).apply(model))
    before = copy.deepcopy(model.state_dict())
    batches = collate(ragged_examples(8), 4)
    replica = Replica(model, objective, Ranks())
    if broken:
        precision.norm = lambda optimizer, max_norm: _clip_scaled(optimizer, max_norm)  # type: ignore[method-assign]
    result = train_step(replica, optimizer, batches, precision=precision, max_grad_norm=0.1)
    update = {name: tensor - before[name] for name, tensor in model.state_dict().items()}
    return update, result, optimizer


def _clip_scaled(optimizer: torch.optim.Optimizer, max_norm: float | None) -> torch.Tensor:
    """The mistake: clipping what is still multiplied by the loss scale."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm or 1.0)


def _poisoned(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    return loss_sum(model, batch) * float("inf")


def _offset(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """A loss that is not finite with a gradient that is."""
    return loss_sum(model, batch) + float("inf")


def assert_same_update(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> None:
    for name, expected in reference.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-7)


def test_update_equals_fp32() -> None:
    reference, fp32, _ = one_step(Precision(PrecisionConfig(), CPU))
    ours, scaled, _ = one_step(ScaledFp32())
    assert scaled.grad_norm == pytest.approx(fp32.grad_norm, rel=1e-5)
    assert fp32.grad_norm > 0.1  # so that clipping is really at work
    assert_same_update(ours, reference)


def test_clipping_before_unscaling_fails_the_same_assertion() -> None:
    reference, _, _ = one_step(Precision(PrecisionConfig(), CPU))
    ours, _, _ = one_step(ScaledFp32(), broken=True)
    with pytest.raises(AssertionError):
        assert_same_update(ours, reference)


@pytest.mark.parametrize("objective", [_poisoned, _offset])
def test_a_non_finite_step_moves_nothing_and_halves_the_scale(objective: Callable[..., torch.Tensor]) -> None:
    precision = ScaledFp32()
    update, result, optimizer = one_step(precision, objective=objective)
    assert not result.applied
    assert all(bool((change == 0).all()) for change in update.values())
    for moments in optimizer.state_dict()["state"].values():
        assert all(bool((torch.as_tensor(value) == 0).all()) for value in moments.values())
    assert precision.scaler.get_scale() == 2.0**15


def test_scaler_state_round_trips() -> None:
    precision = ScaledFp32()
    one_step(precision, objective=_poisoned)
    other = ScaledFp32()
    other.scaler.load_state_dict(precision.scaler.state_dict())
    assert other.scaler.get_scale() == precision.scaler.get_scale() == 2.0**15
