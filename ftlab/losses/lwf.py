"""Learning without forgetting: say of the new data what the old model says (Li and Hoiem 2016, arXiv 1606.09282).

Letters: N supervised positions, C of one chunk, D hidden width, V vocabulary, T the temperature.

    loss = objective + strength * T^2 * sum_n KL(p_n || q_n),    p = softmax(z_old / T),    q = softmax(z / T)

z_old are the logits of the model as it stood when training began. Differs from the paper: KL instead of the cross
entropy, which is larger by the entropy of p, a constant; and the factor T^2, which keeps the gradient's size
(arXiv 1503.02531, section 2). A causal model has no head for each task, so p and q are over the vocabulary.

The old model is a copy of what trains, put in the place of the present weights for a pass without gradients, dropout
off. Its logits are made a chunk of positions at a time, and again in the backward pass, like the new ones. What the
strength multiplies is noted as lwf/kl.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from ftlab.config import LwFConfig
from ftlab.losses.cross_entropy import HiddenStates, supervised_rows
from ftlab.losses.scalars import note
from ftlab.operators.linear_cross_entropy import IGNORED

__all__ = ["LwF", "distillation"]


class LwF:
    """An objective around another one; made while `model` is the old model and what trains is settled.

    objective: (model, batch, hidden_states=...) -> summed loss. hidden_states: what computes them; None is the model.
    Where the objective makes several passes (R-Drop), each is held to the old model, and their mean counts.
    """

    def __init__(
        self,
        model: nn.Module,
        config: LwFConfig,
        objective: Callable[..., Tensor],
        chunk: int,
        hidden_states: HiddenStates | None = None,
    ) -> None:
        self.config = config
        self.chunk = chunk
        self._objective = objective
        self._hidden_states = hidden_states
        self._pass = _Pass(model, hidden_states)
        self.old = {f"model.{name}": p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def __call__(self, model: Any, batch: Any) -> Tensor:
        """The summed loss, with the distillation; an fp32 scalar."""
        assert model is self._pass.model
        training = model.training
        model.eval()
        with torch.no_grad():
            old_ND, old_head_VD = functional_call(self._pass, self.old, (batch,))
        model.train(training)
        passes: list[Tensor] = []

        def remembered(model: Any, *where: Any) -> Tensor:
            inner = self._hidden_states
            passes.append(model.hidden_states(*where) if inner is None else inner(model, *where))
            return passes[-1]

        loss = self._objective(model, batch, hidden_states=remembered)
        old, head_VD = (old_ND, old_head_VD), model.head_weight
        where_N = torch.nonzero(batch.labels.reshape(-1) != IGNORED).squeeze(1)
        for hidden_BTD in passes:
            new_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1]).index_select(0, where_N)
            divergence = distillation(old, (new_ND, head_VD), self.config.temperature, self.chunk)
            note("lwf/kl", divergence / len(passes))
            loss = loss + self.config.strength / len(passes) * divergence
        return loss


class _Pass(nn.Module):
    """Gives `functional_call` a forward."""

    def __init__(self, model: nn.Module, hidden_states: HiddenStates | None) -> None:
        super().__init__()
        self.model: Any = model
        self._hidden_states = hidden_states

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        """What enters the head at the supervised positions, [N, D], and the head, [V, D]."""
        rows_ND, _ = supervised_rows(self.model, batch, self._hidden_states)
        return rows_ND, self.model.head_weight


def distillation(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], temperature: float, chunk: int) -> Tensor:
    """T^2 times the summed KL(old || new) of two pairs of rows [N, D] and head [V, D]; an fp32 scalar."""
    (old_ND, old_head_VD), (new_ND, new_head_VD) = old, new
    total = new_ND.new_zeros((), dtype=torch.promote_types(new_ND.dtype, torch.float32))
    for start in range(0, len(new_ND), chunk):
        part = slice(start, start + chunk)
        rows_and_heads = (old_ND[part], old_head_VD, new_ND[part], new_head_VD)
        total = total + checkpoint(_of_chunk, *rows_and_heads, temperature, use_reentrant=False)
    return temperature**2 * total


def _of_chunk(old_CD: Tensor, old_head_VD: Tensor, new_CD: Tensor, new_head_VD: Tensor, temperature: float) -> Tensor:
    log_p, log_q = (
        (F.linear(rows, head.to(rows.dtype)).float() / temperature).log_softmax(-1)
        for rows, head in ((old_CD, old_head_VD), (new_CD, new_head_VD))
    )
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)
