"""Full fine-tuning: every weight trains."""

from __future__ import annotations

from torch import nn

from ftlab.config import FullConfig
from ftlab.methods.rules import Choice, num_blocks, weight_table
from ftlab.methods.trainable import TrainableTable
from ftlab.methods.weights import WholeModel

__all__ = ["Full"]


class Full(WholeModel):
    """Every weight trains, or all but the token embedding (and with it a tied head)."""

    def __init__(self, config: FullConfig) -> None:
        self.config = config

    def apply(self, model: nn.Module) -> TrainableTable:
        """Set `requires_grad`; the layers stay as they are."""
        blocks = frozenset(range(num_blocks(model)))
        table = weight_table(model, self.config, Choice(blocks, self.config.train_embeddings))
        table.apply(model)
        return table
