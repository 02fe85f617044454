"""Weight decay that shrinks norms, biases or embeddings, whatever their names are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from ftlab.config import AdamWConfig
from ftlab.methods.trainable import Rule, TrainableTable
from ftlab.optim.adamw import build_optimizer

LR, DECAY = 0.1, 0.5
ALL = TrainableTable([Rule(".*", True)])


class Scale(nn.Module):
    """A norm whose name and class say nothing of the kind."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(6, 4)
        self.layer_norm = nn.LayerNorm(4)
        self.odd = Scale()
        self.linear = nn.Linear(4, 4)
        self.lora_A = nn.Parameter(torch.ones(2, 4))


def by_name(model: nn.Module) -> torch.optim.Optimizer:
    """The mistake: excluding what has `norm` or `bias` in its name."""
    named = list(model.named_parameters())
    groups = [
        {
            "params": [p for n, p in named if ("norm" in n or "bias" in n) == plain],
            "weight_decay": 0.0 if plain else DECAY,
        }
        for plain in (True, False)
    ]
    return torch.optim.AdamW(groups, lr=LR)


def ours(model: nn.Module) -> torch.optim.Optimizer:
    return build_optimizer(AdamWConfig(lr=LR, weight_decay=DECAY), model, ALL)


def assert_decays_matrices_only(build: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
    """With zero gradients, one step multiplies what decays by 1 - lr * decay and leaves the rest alone."""
    torch.manual_seed(0)
    model = Model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1 - LR * DECAY if name in ("linear.weight", "lora_A") else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor, msg=name)


def test_matrices_decay_and_nothing_else() -> None:
    assert_decays_matrices_only(ours)


def test_choosing_by_name_fails_the_same_assertion() -> None:
    with pytest.raises(AssertionError, match=r"tokens|odd"):
        assert_decays_matrices_only(by_name)
