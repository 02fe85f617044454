"""The objective: cross entropy of the supervised positions, summed.

Letters: B batch rows, T positions, N supervised positions, D hidden width, V vocabulary.

Positions without a label are dropped before the head, so the head costs N, not B * T.

What label smoothing e adds to the plain loss is linear in the logits z = h W^T, so it needs none of them:

    sum_n e (z_n,label(n) - mean_v z_nv) = e sum_n h_n . (W_label(n) - mean_v W_v)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ftlab.losses.scalars import note
from ftlab.operators import Operators
from ftlab.operators.linear_cross_entropy import IGNORED

__all__ = [
    "HiddenStates",
    "SupervisedBatch",
    "SupervisedModel",
    "smoothing_cost",
    "supervised_cross_entropy",
    "supervised_rows",
]


HiddenStates = Callable[[Any, Tensor, Tensor, Any], Tensor]


class SupervisedBatch(Protocol):
    """The part of a batch that the loss reads."""

    @property
    def input_ids(self) -> Tensor:
        """Token ids, [B, T]."""

    @property
    def labels(self) -> Tensor:
        """The token to predict at each position, [B, T]; -100: none."""

    @property
    def position_ids(self) -> Tensor:
        """Positions inside each document, [B, T]."""

    @property
    def documents(self) -> Any:
        """Where each document lies."""


class SupervisedModel(Protocol):
    """The part of a decoder that the loss reads."""

    @property
    def head_weight(self) -> Tensor:
        """The LM head, [V, D]."""

    @property
    def operators(self) -> Operators:
        """What computes the head and its loss."""

    def hidden_states(self, input_ids_BT: Tensor, position_ids_BT: Tensor, documents: Any, /) -> Tensor:
        """Hidden states after the last norm, [B, T, D]."""


def supervised_cross_entropy(
    model: SupervisedModel,
    batch: SupervisedBatch,
    chunk: int,
    hidden_states: HiddenStates | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """The summed cross entropy, in nats, of the positions of `batch` that have a label; an fp32 scalar.

    A batch without a label gives 0 that is still connected to every parameter: their gradients are zeros rather than
    None, which data-parallel training relies on.

    hidden_states: computes them instead of the model itself, from the model and the batch's tokens, positions and
    documents; `ActivationCache.hidden_states` is one. smoothing: the label smoothing, which is for training only.
    """
    hidden_ND, labels_N = supervised_rows(model, batch, hidden_states)
    if smoothing > 0:
        note("label_smoothing/cost", smoothing_cost(hidden_ND, model.head_weight, labels_N, chunk, smoothing))
    return model.operators.linear_cross_entropy(hidden_ND, model.head_weight, labels_N, chunk, smoothing)


@torch.no_grad()
def smoothing_cost(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, chunk: int, smoothing: float) -> Tensor:
    """The smoothed loss minus the plain one, summed over rows, `chunk` of them at a time; fp32, without a graph."""
    precise = torch.promote_types(hidden_ND.dtype, torch.float32)
    total = torch.zeros((), dtype=precise, device=hidden_ND.device)
    mean_D = weight_VD.mean(0, dtype=precise)
    for start in range(0, len(labels_N), chunk):
        part = slice(start, start + chunk)
        total += (hidden_ND[part].to(precise) * (weight_VD[labels_N[part]].to(precise) - mean_D)).sum()
    return smoothing * total


def supervised_rows(
    model: SupervisedModel, batch: SupervisedBatch, hidden_states: HiddenStates | None = None
) -> tuple[Tensor, Tensor]:
    """What enters the head at the positions that have a label, [N, D], and those labels, [N]."""
    where = (batch.input_ids, batch.position_ids, batch.documents)
    hidden_BTD = model.hidden_states(*where) if hidden_states is None else hidden_states(model, *where)
    labels = batch.labels.reshape(-1)
    supervised_N = torch.nonzero(labels != IGNORED).squeeze(1)
    hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1]).index_select(0, supervised_N)
    return hidden_ND, labels.index_select(0, supervised_N)
