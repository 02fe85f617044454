"""BitFit: the biases alone train (Ben Zaken, Ravfogel and Goldberg 2021, arXiv 2106.10199)."""

from __future__ import annotations

from torch import nn

from ftlab.config import BitFitConfig
from ftlab.errors import ConfigError
from ftlab.methods.rules import NORM, graded, num_blocks, own_rules, table
from ftlab.methods.trainable import Rule, TrainableTable
from ftlab.methods.weights import WholeModel

__all__ = ["BitFit"]


class BitFit(WholeModel):
    """Every bias trains, and the weights of the norms if asked; the rest is frozen."""

    def __init__(self, config: BitFitConfig) -> None:
        self.config = config

    def apply(self, model: nn.Module) -> TrainableTable:
        """Set `requires_grad`. Errors: ConfigError if the model has no bias and the norms do not train."""
        names = [name for name, _ in model.named_parameters()]
        if not self.config.train_norms and not any(name.endswith("bias") for name in names):
            raise ConfigError(
                "method=bitfit: this model has no biases; with method.train_norms=true the weights of its norms train"
            )
        decay, total = self.config.layer_decay, num_blocks(model)
        rules = [*own_rules(self.config.rates), *graded(r"(.*\.)?\w*bias", decay, total)]
        norms = rf"(.*\.)?{NORM}"
        rules += graded(norms, decay, total) if self.config.train_norms else [Rule(norms, trainable=False)]
        found = table(model, [*rules, Rule(".*", trainable=False)], len(self.config.rates))
        found.apply(model)
        return found
