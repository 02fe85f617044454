"""Mixout: in each forward pass some weights are the pretrained ones (Lee et al. 2020, arXiv 1909.11299).

    mixed = ((1 - M) w + M w0 - p w0) / (1 - p) = w0 + dropout(w - w0),    M ~ Bernoulli(p) for each weight

The right-hand side is the paper's mixture rewritten: dropout of the distance from the pretrained weights. So its mean
is w, and at w = w0 it changes nothing. It acts on the matrices of the linear layers that train; the token embedding,
also where it is tied to the head, biases and norms stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ftlab.errors import ConfigError
from ftlab.models.heads import fresh_layers
from ftlab.operators.dropout import dropout

__all__ = ["Mixout"]


class Mixout:
    """An objective around another one; made while `model` holds its pretrained weights and what trains is settled.

    Keeps a copy of every matrix that it mixes. Errors: ConfigError if no linear layer trains.
    """

    def __init__(self, model: nn.Module, p: float, objective: Callable[[Any, Any], Tensor]) -> None:
        self.p = p
        fresh = fresh_layers(model)  # a new head has no pretrained weight
        self.call = _Call(model, objective)
        self.anchors = {
            f"model.{name}.weight": module.weight.detach().clone()
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module.weight.requires_grad and name not in fresh
        }
        if not self.anchors:
            raise ConfigError("regularizer.mixout: this method trains no matrix of a linear layer; set it to 0")

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """The inner objective under freshly mixed weights; the gradient reaches the model's own."""
        assert model is self.call.model
        mixed = {
            name: anchor + dropout(self.call.get_parameter(name) - anchor, self.p)
            for name, anchor in self.anchors.items()
        }
        loss: Tensor = functional_call(self.call, mixed, (batch,))
        return loss

    @torch.no_grad()
    def distance(self) -> float:
        """||w - w0|| over what is mixed: the noise grows with it."""
        away = [torch.linalg.vector_norm(self.call.get_parameter(name) - w0) for name, w0 in self.anchors.items()]
        return float(torch.linalg.vector_norm(torch.stack(away)))


class _Call(nn.Module):
    """Gives `functional_call` a forward."""

    def __init__(self, model: nn.Module, objective: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._objective = objective

    def forward(self, batch: Any) -> Tensor:
        """The summed loss."""
        return self._objective(self.model, batch)
