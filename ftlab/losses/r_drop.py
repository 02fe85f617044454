"""R-Drop: two passes under two masks should say the same (Liang et al. 2021, arXiv 2106.14448).

Letters: N supervised positions, C of one chunk, D hidden width, V vocabulary.

    loss = 1/2 sum_n [ L1_n + L2_n + strength / 2 (KL(p1_n || p2_n) + KL(p2_n || p1_n)) ]

L1 and L2 are the cross entropies of the two passes. This is half of the paper's loss, so that the weight of the data
does not change with R-Drop. The two KL together are sum_v (p1_v - p2_v) (log p1_v - log p2_v), in fp32, a chunk of
positions at a time; its logits are made again in the backward pass instead of being kept. Noted as r_drop/kl is what
the strength multiplies, 1/4 of the two KL.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ftlab.losses.classification import logits_kl
from ftlab.losses.cross_entropy import (
    HiddenStates,
    SupervisedBatch,
    SupervisedModel,
    smoothing_cost,
    supervised_rows,
)
from ftlab.losses.scalars import note

__all__ = ["r_drop", "symmetric_kl"]


def r_drop(
    model: SupervisedModel,
    batch: SupervisedBatch,
    chunk: int,
    strength: float,
    hidden_states: HiddenStates | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """The summed loss of two passes over the supervised positions of `batch`, with a graph; an fp32 scalar."""
    passes = [supervised_rows(model, batch, hidden_states) for _ in range(2)]
    head = model.head_weight
    nats = [model.operators.linear_cross_entropy(rows, head, labels, chunk, smoothing) for rows, labels in passes]
    if smoothing > 0:
        for rows, labels in passes:
            note("label_smoothing/cost", smoothing_cost(rows, head, labels, chunk, smoothing) / 2)
    divergence = symmetric_kl(passes[0][0], passes[1][0], head, chunk)
    note("r_drop/kl", divergence / 4)
    return (nats[0] + nats[1]) / 2 + strength / 4 * divergence


def symmetric_kl(one_ND: Tensor, other_ND: Tensor, weight_VD: Tensor, chunk: int) -> Tensor:
    """KL(p || q) + KL(q || p) of the softmax of the two under one head, summed over rows."""
    total = one_ND.new_zeros((), dtype=torch.promote_types(one_ND.dtype, torch.float32))
    for start in range(0, len(one_ND), chunk):
        part = slice(start, start + chunk)
        total = total + checkpoint(_of_chunk, one_ND[part], other_ND[part], weight_VD, use_reentrant=False)
    return total


def _of_chunk(one_CD: Tensor, other_CD: Tensor, weight_VD: Tensor) -> Tensor:
    one_CV, other_CV = (F.linear(rows, weight_VD.to(rows.dtype)).float() for rows in (one_CD, other_CD))
    return logits_kl(one_CV, other_CV, "single")
