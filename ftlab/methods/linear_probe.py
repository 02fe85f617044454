"""Linear probing: the head alone trains, on features that stay (Alain and Bengio 2016, arXiv 1610.01644)."""

from __future__ import annotations

import re

from torch import nn

from ftlab.config import LinearProbeConfig
from ftlab.errors import ConfigError
from ftlab.methods.rules import HEAD, own_rules, table
from ftlab.methods.trainable import Rule, TrainableTable
from ftlab.methods.weights import WholeModel

__all__ = ["LinearProbe"]


class LinearProbe(WholeModel):
    """The weight of the head trains; every block, norm and embedding is frozen.

    `layer_decay` has no blocks to act on, and `ftlab.validate` refuses it.
    """

    def __init__(self, config: LinearProbeConfig) -> None:
        self.config = config

    def apply(self, model: nn.Module) -> TrainableTable:
        """Set `requires_grad`. Errors: ConfigError if the head is tied to the embedding."""
        if not any(re.fullmatch(HEAD, name) for name, _ in model.named_parameters()):
            raise ConfigError(
                "method=linear_probe: this model's head is its token embedding, so it has no weight of its own to "
                "train; use method=freeze method.frozen_fraction=1 method.train_embeddings=true, which trains both"
            )
        rules = [*own_rules(self.config.rates), Rule(HEAD, trainable=True), Rule(".*", trainable=False)]
        found = table(model, rules, len(self.config.rates))
        found.apply(model)
        return found
