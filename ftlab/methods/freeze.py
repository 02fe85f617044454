"""Partial fine-tuning: upper blocks train, lower ones keep their pretrained weights.

Lower layers hold what transfers, upper ones what is particular to a task (Yosinski et al. 2014, arXiv 1411.1792). Below
the lowest weight that trains nothing is kept for the backward pass and no gradient is computed.
"""

from __future__ import annotations

from torch import nn

from ftlab.config import FreezeConfig
from ftlab.methods.rules import Choice, block_numbers, num_blocks, weight_table
from ftlab.methods.trainable import TrainableTable
from ftlab.methods.weights import WholeModel

__all__ = ["Freeze"]


class Freeze(WholeModel):
    """Blocks chosen by number or by share train; embedding, head and norms each have a key of their own."""

    def __init__(self, config: FreezeConfig) -> None:
        self.config = config

    def apply(self, model: nn.Module) -> TrainableTable:
        """Set `requires_grad`; the layers stay as they are. Errors: ConfigError if nothing trains."""
        config, total = self.config, num_blocks(model)
        if config.layers is None:
            blocks = frozenset(range(round(total * config.frozen_fraction), total))
        else:
            blocks = block_numbers(config.layers, total)
        choice = Choice(blocks, config.train_embeddings, config.train_head, config.norms)
        table = weight_table(model, config, choice)
        table.apply(model)
        return table
