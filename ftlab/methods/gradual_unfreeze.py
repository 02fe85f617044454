"""Gradual unfreezing: the uppermost blocks train first, lower ones join (Howard and Ruder 2018, arXiv 1801.06146).

The method says who joins in which order; `ftlab.training.unfreezing` says when. Differs from the paper: blocks of a
transformer for the layers of an LSTM, the time between two stages is free, and one schedule runs over all of them.
"""

from __future__ import annotations

from torch import nn

from ftlab.config import GradualUnfreezeConfig
from ftlab.methods.rules import Choice, num_blocks, weight_table
from ftlab.methods.trainable import TrainableTable, trainable_parameters
from ftlab.methods.weights import WholeModel

__all__ = ["GradualUnfreeze"]


class GradualUnfreeze(WholeModel):
    """After `apply`, `stages` holds the names that train from stage 0, then those that join at each later one."""

    def __init__(self, config: GradualUnfreezeConfig) -> None:
        self.config = config

    def apply(self, model: nn.Module) -> TrainableTable:
        """Set `requires_grad` of everything that trains at the last stage, and note the stages."""
        config, total = self.config, num_blocks(model)
        table = weight_table(model, config, Choice(frozenset(range(total)), config.train_embeddings))
        table.apply(model)
        groups: dict[int, list[str]] = {}
        for name in trainable_parameters(model):
            groups.setdefault(self._stage(name, total), []).append(name)
        self.stages = tuple(tuple(groups[stage]) for stage in sorted(groups))
        return table

    def _stage(self, name: str, total: int) -> int:
        """When a parameter joins."""
        parts = name.split(".")
        block = next((part for part in ("layers", "layer") if part in parts), None)
        if block is not None:
            depth = total - 1 - int(parts[parts.index(block) + 1])  # from the top
            return max(0, -(-(depth + 1 - self.config.first_blocks) // self.config.blocks))
        if "embed_tokens" in parts or "embeddings" in parts:
            return total + 1
        return 0
