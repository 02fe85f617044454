"""The objective of a classifier, summed over the texts of a batch; the step divides once by their number.

    single:      -sum_e log softmax(z_e)[y_e]
    multi:       -sum_e sum_c y_ec log sigmoid(z_ec) + (1 - y_ec) log(1 - sigmoid(z_ec))
    regression:   sum_e (z_e - y_e)^2

Label smoothing s (Szegedy et al. 2015, arXiv 1512.00567) puts (1 - s) y + s / C in place of a single label's target,
and (1 - s) y + s / 2 in place of each of several. What it adds to the loss is noted as label_smoothing/cost.

Shapes: E texts, C outputs.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ftlab.losses.scalars import note

__all__ = ["classification_loss", "logits_loss"]


def classification_loss(model: Any, batch: Any, kind: str, label_smoothing: float = 0.0) -> Tensor:
    """The summed loss of a batch, an fp32 scalar.

    A batch without targets gives 0 that is still connected to every parameter, as data-parallel training needs.
    """
    logits_EC = model(batch)[: len(batch.labels)]
    loss = logits_loss(logits_EC, batch.labels, kind, label_smoothing)
    if label_smoothing > 0:
        note("label_smoothing/cost", loss.detach() - logits_loss(logits_EC.detach(), batch.labels, kind))
    return loss


def logits_loss(logits_EC: Tensor, targets: Tensor, kind: str, label_smoothing: float = 0.0) -> Tensor:
    """The same of logits [E, C] and targets: int64 [E] (single), [E, C] in 0 to 1 (multi), or [E] (regression)."""
    if kind == "single":
        return F.cross_entropy(logits_EC, targets, reduction="sum", label_smoothing=label_smoothing)
    if kind == "multi":
        smoothed_EC = targets * (1 - label_smoothing) + label_smoothing / 2
        return F.binary_cross_entropy_with_logits(logits_EC, smoothed_EC, reduction="sum")
    return (logits_EC[:, 0] - targets).square().sum()
