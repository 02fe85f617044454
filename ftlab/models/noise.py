"""What disturbs a model while it trains: dropout by place, stochastic depth, noise on the embeddings.

Nothing here acts in evaluation mode, and a strength of 0 draws no random number. Letters: B rows, T positions, D width,
L blocks, N = B*T.

Dropout (arXiv 1207.0580): each element is zero with probability p, the others are divided by 1 - p.

Stochastic depth (arXiv 1603.09382): block l of 1 .. L survives a forward pass with probability

    keep_l = 1 - l / L * strength

for all its rows at once. There the surviving block adds f(h) in training and keep_l f(h) in evaluation; here it adds
f(h) / keep_l in training, so that evaluation needs no change. f is attention and MLP together. The norms of an encoder
stand behind the sums, as the ReLU there does: they act whether a block survives or not.

NEFTune (arXiv 2310.05914): each embedding gets uniform noise in [-1, 1] times alpha / sqrt(n D), where n are the tokens
of its own document, however documents are packed or padded. In an encoder it is on the embeddings of the words.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ftlab.config import RegularizerConfig
from ftlab.models.attention import Documents

if TYPE_CHECKING:
    from ftlab.models.heads import AnyModel

__all__ = ["QUIET", "Noise", "disturb", "embedding_noise", "left_out", "own_lengths", "whole_depth"]


@dataclass(frozen=True)
class Noise:
    """Strengths; `residual`, `hidden` and so on are probabilities of dropout at that place."""

    embedding: float = 0.0
    attention: float = 0.0
    residual: float = 0.0
    hidden: float = 0.0
    head: float = 0.0
    depth: float = 0.0
    neftune: float = 0.0

    @classmethod
    def of(cls, config: RegularizerConfig) -> Noise:
        """What a configuration asks for."""
        places = config.dropout
        return cls(
            places.embedding,
            places.attention,
            places.residual,
            places.hidden,
            places.head,
            config.stochastic_depth,
            config.neftune,
        )

    @property
    def below_head(self) -> bool:
        """Whether anything before the head is random."""
        inside = (self.embedding, self.attention, self.residual, self.hidden, self.depth, self.neftune)
        return any(strength > 0 for strength in inside)

    def keep(self, block: int, blocks: int) -> float:
        """The probability that block number `block`, counted from 0, survives a forward pass."""
        return 1.0 - (block + 1) / blocks * self.depth


QUIET = Noise()


def disturb(model: AnyModel, noise: Noise) -> None:
    """Let a model compute with this noise in training mode."""
    for module in model.modules():
        if hasattr(module, "noise"):
            module.noise = noise  # type: ignore[assignment]


@contextmanager
def whole_depth(model: nn.Module) -> Iterator[None]:
    """Let every block survive, with all that stochastic depth computes besides."""
    holders: list[Any] = [module for module in model.modules() if getattr(module, "noise", QUIET).depth > 0]
    before = [module.noise for module in holders]
    try:
        for module in holders:
            module.noise = replace(module.noise, depth=sys.float_info.min)  # keep() is 1, and no draw is as much
        yield
    finally:
        for module, noise in zip(holders, before, strict=True):
            module.noise = noise


def own_lengths(documents: Documents | None, B: int, T: int) -> Tensor:
    """The length of each token's own document, which broadcasts to [B, T, 1]; without documents that of its row."""
    if documents is None:
        return torch.tensor(T)
    lengths_M = torch.tensor(documents.lengths)
    return lengths_M.repeat_interleave(lengths_M).view(B, T, 1)


def embedding_noise(h_BTD: Tensor, lengths: Tensor, alpha: float) -> Tensor:
    """h plus NEFTune's noise; lengths: that of each token's own document, int64, what broadcasts to [B, T, 1]."""
    bound = alpha / (lengths * h_BTD.shape[-1]).float().sqrt()
    return h_BTD + (torch.rand_like(h_BTD) * 2 - 1) * bound.to(h_BTD)


def left_out(h_BTD: Tensor, block: nn.Module) -> Tensor:
    """h itself, connected to the parameters of a block that was left out: their gradients are zeros rather than None.

    Data-parallel training relies on that.
    """
    training = [parameter for parameter in block.parameters() if parameter.requires_grad]
    out: Tensor = _Connected.apply(h_BTD, *training)  # type: ignore[no-untyped-call]
    return out


class _Connected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return h.view_as(h)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)
