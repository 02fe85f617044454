"""The objective of a classifier, summed over the texts of a batch; the step divides once by their number.

    single:      -sum_e log softmax(z_e)[y_e]
    multi:       -sum_e sum_c y_ec log sigmoid(z_ec) + (1 - y_ec) log(1 - sigmoid(z_ec))
    regression:   sum_e (z_e - y_e)^2

Label smoothing s (Szegedy et al. 2015, arXiv 1512.00567) puts (1 - s) y + s / C in place of a single label's target,
and (1 - s) y + s / 2 in place of each of several. What it adds to the loss is noted as label_smoothing/cost.

R-Drop (Liang et al. 2021, arXiv 2106.14448) with strength a, over two passes under two masks with losses L1 and L2:

    1/2 sum_e [ L1_e + L2_e + a / 2 (KL(p1_e || p2_e) + KL(p2_e || p1_e)) ]

where p is the distribution over the labels; of several labels, each has one of its own and their KL add up. This is
half of the paper's loss, so that the weight of the data does not change with R-Drop. Noted as r_drop/kl is what the
strength multiplies.

Shapes: E texts, C outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ftlab.losses.scalars import note

__all__ = ["classification_loss", "logits_kl", "logits_loss", "supervised_logits"]


def classification_loss(
    model: Any,
    batch: Any,
    kind: str,
    label_smoothing: float = 0.0,
    r_drop: float = 0.0,
    logits: Callable[[Any, Any], Tensor] | None = None,
) -> Tensor:
    """The summed loss of a batch, an fp32 scalar; with a strength of R-Drop, of two passes.

    A batch without targets gives 0 that is still connected to every parameter, as data-parallel training needs.
    logits: what makes each pass; None is `supervised_logits`.
    """
    make = supervised_logits if logits is None else logits
    passes = [make(model, batch) for _ in range(2 if r_drop > 0 else 1)]
    loss = sum(logits_loss(logits_EC, batch.labels, kind, label_smoothing) for logits_EC in passes) / len(passes)
    assert isinstance(loss, Tensor)
    if label_smoothing > 0:
        plain = sum(logits_loss(logits_EC.detach(), batch.labels, kind) for logits_EC in passes) / len(passes)
        note("label_smoothing/cost", loss.detach() - plain)
    if r_drop > 0:
        divergence = logits_kl(passes[0], passes[1], kind)
        note("r_drop/kl", divergence / 4)
        loss = loss + r_drop / 4 * divergence
    return loss


def supervised_logits(model: Any, batch: Any) -> Tensor:
    """The logits of the texts that have a target, [E, C]: all or none."""
    logits_EC: Tensor = model(batch)[: len(batch.labels)]
    return logits_EC


def logits_kl(one_EC: Tensor, other_EC: Tensor, kind: str) -> Tensor:
    """KL(p || q) + KL(q || p) of the labels' distributions, summed over texts; kind: single or multi."""
    if kind == "single":
        log_p, log_q = one_EC.log_softmax(-1), other_EC.log_softmax(-1)
        return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum()
    # Of a label that is or is not, log p - log q of both cases together is the difference of the logits.
    return ((one_EC.sigmoid() - other_EC.sigmoid()) * (one_EC - other_EC)).sum()


def logits_loss(logits_EC: Tensor, targets: Tensor, kind: str, label_smoothing: float = 0.0) -> Tensor:
    """The same of logits [E, C] and targets: int64 [E] (single), [E, C] in 0 to 1 (multi), or [E] (regression)."""
    if kind == "single":
        return F.cross_entropy(logits_EC, targets, reduction="sum", label_smoothing=label_smoothing)
    if kind == "multi":
        smoothed_EC = targets * (1 - label_smoothing) + label_smoothing / 2
        return F.binary_cross_entropy_with_logits(logits_EC, smoothed_EC, reduction="sum")
    return (logits_EC[:, 0] - targets).square().sum()
