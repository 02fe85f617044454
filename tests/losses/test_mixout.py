"""Mixout against the paper's formula, read off the weights that a forward pass uses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ftlab.config import BitFitConfig, FreezeConfig
from ftlab.errors import ConfigError
from ftlab.losses.mixout import Mixout
from ftlab.methods import make_method
from ftlab.models.llama import LlamaForCausalLM
from tests.helpers.training import collate, gradients, loss_sum, ragged_examples, tiny_llama

BATCH = collate(ragged_examples(6), 6)[0]
P = 0.3


def moved(p: float = P) -> tuple[LlamaForCausalLM, Mixout, dict[str, Tensor]]:
    """A model that has moved away from its anchors, mixout around its loss, and the anchors."""
    model = tiny_llama().train()
    anchors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    mixout = Mixout(model, p, loss_sum)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model, mixout, anchors


def used(model: LlamaForCausalLM, mixout: Mixout) -> dict[str, Tensor]:
    """The weights that one pass sees."""
    seen: dict[str, Tensor] = {}

    def look(block: torch.nn.Module, arguments: object) -> None:
        seen.update({name: p.detach().clone() for name, p in model.named_parameters()})

    with_hook = model.model.layers[0].register_forward_pre_hook(look)
    mixout(model, BATCH)
    with_hook.remove()
    return seen


def test_a_pass_sees_the_papers_mixture() -> None:
    model, mixout, anchors = moved()
    after = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    torch.manual_seed(0)
    seen = used(model, mixout)
    total = pretrained = 0
    for name, tensor in seen.items():
        if not name.endswith("proj.weight"):
            assert torch.equal(tensor, after[name]), name
            continue
        masked = tensor == anchors[name]
        formula = (torch.where(masked, anchors[name], after[name]) - P * anchors[name]) / (1 - P)
        torch.testing.assert_close(tensor, formula, atol=1e-5, rtol=1e-5)
        total, pretrained = total + masked.numel(), pretrained + int(masked.sum())
    assert abs(pretrained / total - P) < 0.02
    assert all(torch.equal(parameter, after[name]) for name, parameter in model.named_parameters())


def test_the_distance_is_that_of_what_is_mixed() -> None:
    model, mixout, anchors = moved()
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    mixed = [(model.get_parameter(f"{name}.weight") - anchors[f"{name}.weight"]).flatten() for name in linear]
    assert mixout.distance() == pytest.approx(float(torch.cat(mixed).detach().norm()), rel=1e-5)


def test_the_gradient_is_that_of_the_mixture_through_the_mask() -> None:
    model, mixout, anchors = moved()
    torch.manual_seed(0)
    seen = used(model, mixout)
    torch.manual_seed(0)
    model.zero_grad()
    mixout(model, BATCH).backward()
    found = gradients(model)
    mixed = tiny_llama()
    mixed.load_state_dict(seen)
    loss_sum(mixed, BATCH).backward()
    for name, gradient in gradients(mixed).items():
        factor = (seen[name] != anchors[name]) / (1 - P) if name.endswith("proj.weight") else torch.ones(())
        torch.testing.assert_close(found[name], gradient * factor, atol=1e-3, rtol=1e-4)


def test_at_the_pretrained_weights_it_changes_nothing() -> None:
    model = tiny_llama().train()
    assert torch.equal(Mixout(model, P, loss_sum)(model, BATCH), loss_sum(model, BATCH))


def test_only_what_trains_is_mixed() -> None:
    model = tiny_llama()
    make_method(FreezeConfig(frozen_fraction=0.5)).apply(model)
    anchors = Mixout(model, P, loss_sum).anchors
    assert anchors
    assert all(name.startswith("model.model.layers.1.") for name in anchors)


def test_a_method_without_matrices_is_refused() -> None:
    model = tiny_llama()
    make_method(BitFitConfig(train_norms=True)).apply(model)
    with pytest.raises(ConfigError, match="trains no matrix of a linear layer"):
        Mixout(model, P, loss_sum)
