"""L2-SP that pulls the adapter's matrices to their first values, or the frozen base to itself, measures nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ftlab.config import LoRAConfig
from ftlab.losses.penalties import L2SP
from ftlab.methods import make_method
from ftlab.methods.lora import lora_leaves
from ftlab.models.llama import LlamaForCausalLM
from tests.helpers.models import tiny_llama

STRENGTH = 0.7


def effective(model: LlamaForCausalLM) -> dict[str, Tensor]:
    """The weights that act, by way of a merge."""
    method = make_method(LoRAConfig(rank=4, alpha=8.0))
    method.merge(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" not in name}
    method.unmerge(model)
    return weights


def ours(model: nn.Module) -> Callable[[], Tensor]:
    penalty = L2SP(model, STRENGTH)
    return lambda: penalty.value(model)


def on_the_matrices(model: nn.Module) -> Callable[[], Tensor]:
    """The mistake: A and B are pulled to their values at the start."""
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return lambda: (
        STRENGTH
        * torch.stack(
            [(p - start[name]).square().sum() for name, p in model.named_parameters() if p.requires_grad]
        ).sum()
    )


def on_the_base(model: nn.Module) -> Callable[[], Tensor]:
    """The mistake: the frozen base weights are compared with themselves."""
    start = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    return lambda: (
        STRENGTH
        * torch.stack(
            [(p - start[name]).square().sum() for name, p in model.named_parameters() if not p.requires_grad]
        ).sum()
    )


def assert_measures_the_effective_weight(build: Callable[[nn.Module], Callable[[], Tensor]]) -> None:
    model = tiny_llama()
    make_method(LoRAConfig(rank=4, alpha=8.0), seed=0).apply(model)
    value, before = build(model), effective(model)
    assert float(value().detach()) == 0
    torch.manual_seed(0)
    for leaf in lora_leaves(model).values():
        nn.init.normal_(leaf.lora_A)
        nn.init.normal_(leaf.lora_B)
    after = effective(model)
    expected = STRENGTH * sum(float((after[name].double() - before[name]).square().sum()) for name in before)
    assert float(value().detach()) == pytest.approx(expected, rel=1e-5)
    # Turning A and B against each other leaves B A, and so the penalty, as it is.
    turn = torch.linalg.qr(torch.randn(4, 4)).Q
    for leaf in lora_leaves(model).values():
        leaf.lora_A.data, leaf.lora_B.data = turn @ leaf.lora_A.data, leaf.lora_B.data @ turn.t()
    assert float(value().detach()) == pytest.approx(expected, rel=1e-5)


def test_it_acts_on_the_change_of_the_effective_weight() -> None:
    assert_measures_the_effective_weight(ours)


@pytest.mark.parametrize("broken", [on_the_matrices, on_the_base])
def test_other_anchors_fail_the_same_assertion(broken: Callable[[nn.Module], Callable[[], Tensor]]) -> None:
    with pytest.raises(AssertionError):
        assert_measures_the_effective_weight(broken)
