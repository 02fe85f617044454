"""Learning without forgetting: say of the new data what the old model says (Li and Hoiem 2016, arXiv 1606.09282).

Letters: N supervised positions, C of one chunk, D hidden width, V vocabulary, T the temperature. Of classifiers: E
texts, C labels.

    loss = objective + strength * T^2 * sum_n KL(p_n || q_n),    p = softmax(z_old / T),    q = softmax(z / T)

z_old are the logits of the model as it stood when training began. Differs from the paper: KL instead of the cross
entropy, which is larger by the entropy of p, a constant; and the factor T^2, which keeps the gradient's size
(arXiv 1503.02531, section 2). A model has no head for each task: p and q are over the vocabulary of a causal model,
over the labels of a classifier. Of several labels a text, each has p = sigmoid(z_old / T) and q = sigmoid(z / T) of its
own, and their KL add up.

The old model is a copy of what trains, put in the place of the present weights for a pass without gradients, dropout
off. A causal model's logits are made a chunk of positions at a time, and again in the backward pass, old ones like new
ones. What the strength multiplies is noted as lwf/kl.
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
from ftlab.losses.classification import supervised_logits
from ftlab.losses.cross_entropy import HiddenStates, supervised_rows
from ftlab.losses.scalars import note
from ftlab.operators.linear_cross_entropy import IGNORED

__all__ = ["LabelLwF", "LwF", "TokenLwF", "distillation", "label_distillation"]


class LwF:
    """An objective around another one; made while `model` is the old model and what trains is settled.

    objective: (model, batch, ...) -> summed loss, which makes its passes by its argument called `argument`. Where it
    makes several (R-Drop), each is held to the old model, and their mean counts.
    """

    argument: str

    def __init__(self, model: nn.Module, config: LwFConfig, objective: Callable[..., Tensor]) -> None:
        self.config = config
        self._objective = objective
        self._old_model = _Answers(model, self.answers)
        self.old = {f"model.{name}": p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def answers(self, model: Any, batch: Any) -> Any:
        """What the old model says: the first argument of `divergence`."""
        raise NotImplementedError

    def make(self, model: Any, *where: Any) -> Tensor:
        """One pass of the objective."""
        raise NotImplementedError

    def divergence(self, old: Any, made: Tensor, model: Any, batch: Any) -> Tensor:
        """T^2 times the summed KL(old || new), where new is a pass; an fp32 scalar."""
        raise NotImplementedError

    def __call__(self, model: Any, batch: Any) -> Tensor:
        """The summed loss, with the distillation; an fp32 scalar."""
        assert model is self._old_model.model
        training = model.training
        model.eval()
        with torch.no_grad():
            old = functional_call(self._old_model, self.old, (batch,))
        model.train(training)
        passes: list[Tensor] = []

        def remembered(model: Any, *where: Any) -> Tensor:
            passes.append(self.make(model, *where))
            return passes[-1]

        loss = self._objective(model, batch, **{self.argument: remembered})
        for made in passes:
            divergence = self.divergence(old, made, model, batch)
            note("lwf/kl", divergence / len(passes))
            loss = loss + self.config.strength / len(passes) * divergence
        return loss


class TokenLwF(LwF):
    """Of a causal model. hidden_states: what computes them; None is the model."""

    argument = "hidden_states"

    def __init__(
        self,
        model: nn.Module,
        config: LwFConfig,
        objective: Callable[..., Tensor],
        chunk: int,
        hidden_states: HiddenStates | None = None,
    ) -> None:
        super().__init__(model, config, objective)
        self.chunk = chunk
        self._hidden_states = hidden_states

    def answers(self, model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        """What enters the head at the supervised positions, [N, D], and the head, [V, D]."""
        rows_ND, _ = supervised_rows(model, batch, self._hidden_states)
        return rows_ND, model.head_weight

    def make(self, model: Any, *where: Any) -> Tensor:
        """Hidden states, [B, T, D]."""
        inner = self._hidden_states
        hidden_BTD: Tensor = model.hidden_states(*where) if inner is None else inner(model, *where)
        return hidden_BTD

    def divergence(self, old: tuple[Tensor, Tensor], made: Tensor, model: Any, batch: Any) -> Tensor:
        """Over the supervised positions."""
        where_N = torch.nonzero(batch.labels.reshape(-1) != IGNORED).squeeze(1)
        new_ND = made.reshape(-1, made.shape[-1]).index_select(0, where_N)
        return distillation(old, (new_ND, model.head_weight), self.config.temperature, self.chunk)


class LabelLwF(LwF):
    """Of a classifier, whose head must be the one with which training begins. kind: single or multi."""

    argument = "logits"

    def __init__(self, model: nn.Module, config: LwFConfig, objective: Callable[..., Tensor], kind: str) -> None:
        super().__init__(model, config, objective)
        self.kind = kind

    def answers(self, model: Any, batch: Any) -> Tensor:
        """Logits, [E, C]."""
        return supervised_logits(model, batch)

    make = answers

    def divergence(self, old: Tensor, made: Tensor, model: Any, batch: Any) -> Tensor:
        """Over the texts."""
        return label_distillation(old, made, self.kind, self.config.temperature)


class _Answers(nn.Module):
    """Gives `functional_call` a forward."""

    def __init__(self, model: nn.Module, answers: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.model: Any = model
        self._answers = answers

    def forward(self, batch: Any) -> Any:
        """What the model says of a batch."""
        return self._answers(self.model, batch)


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
    old_CV, new_CV = (
        F.linear(rows, head.to(rows.dtype)) for rows, head in ((old_CD, old_head_VD), (new_CD, new_head_VD))
    )
    return _softmax_kl(old_CV, new_CV, temperature)


def label_distillation(old_EC: Tensor, new_EC: Tensor, kind: str, temperature: float) -> Tensor:
    """T^2 times the summed KL(old || new) of the labels' distributions; kind: single or multi; an fp32 scalar."""
    if kind == "multi":  # softmax(z, 0) is (sigmoid(z), sigmoid(-z)): the label is there, or is not
        old_EC, new_EC = (torch.stack((logits, torch.zeros_like(logits)), -1) for logits in (old_EC, new_EC))
    return temperature**2 * _softmax_kl(old_EC, new_EC, temperature)


def _softmax_kl(old: Tensor, new: Tensor, temperature: float) -> Tensor:
    """The summed KL of the softmax over the last dimension."""
    log_p, log_q = ((logits.float() / temperature).log_softmax(-1) for logits in (old, new))
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)
