"""What regularizers note for the log: each against torch's own losses, over micro-batches, ranks and recomputations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ftlab.config import LwFConfig, PrecisionConfig
from ftlab.losses.classification import classification_loss
from ftlab.losses.cross_entropy import supervised_cross_entropy, supervised_rows
from ftlab.losses.lwf import TokenLwF
from ftlab.losses.r_drop import r_drop
from ftlab.losses.scalars import collecting, note
from ftlab.models.llama import LlamaForCausalLM
from ftlab.models.noise import Noise, disturb
from ftlab.training.loop import StepResult, train_step
from ftlab.training.parallel import Ranks, Replica
from ftlab.training.precision import Precision
from tests.helpers.classifiers import LABELS, MULTI, batch_of, texts, tiny_bert_classifier
from tests.helpers.training import KeepGradients, collate, ragged_examples, run_ranks, tiny_llama

T, SMOOTHING = 2.0, 0.2


def step(model: Any, objective: Any, micro: int, ranks: Ranks | None = None, batches: Any = None) -> StepResult:
    """One step that moves nothing, of eight examples in micro-batches of `micro`."""
    ranks = ranks or Ranks()
    batches = (batches or collate(ragged_examples(8), micro))[ranks.rank :: ranks.world]
    torch.manual_seed(4)
    precision = Precision(PrecisionConfig(), torch.device("cpu"))
    return train_step(Replica(model, objective, ranks), KeepGradients(model), batches, precision=precision)


def noisy(checkpointing: bool = False) -> LlamaForCausalLM:
    model = tiny_llama().train()
    move(model)
    disturb(model, Noise(residual=0.2))
    model.checkpoint_blocks = checkpointing
    return model


def all_logits(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    rows, labels = supervised_rows(model, batch)
    return F.linear(rows, model.head_weight), labels


def kl(logits: Tensor, of: Tensor) -> Tensor:
    """KL(of || logits), summed, by torch."""
    return F.kl_div(logits.log_softmax(-1), of.log_softmax(-1), reduction="sum", log_target=True)


@torch.no_grad()
def r_drop_by_hand(micro: int) -> tuple[float, float]:
    """A quarter of both KL and the cost of smoothing, of the same masks as in `step`."""
    model, divergence, cost = noisy(), 0.0, 0.0
    torch.manual_seed(4)
    for batch in collate(ragged_examples(8), micro):
        (one, labels), (other, _) = (all_logits(model, batch) for _ in range(2))
        divergence += float(kl(one, other) + kl(other, one)) / 4
        for logits in (one, other):
            cross = functools.partial(F.cross_entropy, logits, labels, reduction="sum")
            cost += float(cross(label_smoothing=SMOOTHING) - cross()) / 2
    return divergence, cost


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("micro", [4, 8])
def test_r_drop(micro: int, checkpointing: bool) -> None:
    objective = functools.partial(r_drop, chunk=5, strength=3.0, smoothing=SMOOTHING)
    noted = step(noisy(checkpointing), objective, micro).noted
    divergence, cost = r_drop_by_hand(micro)
    assert divergence > 0.1
    assert noted["r_drop/kl"] == pytest.approx(divergence, rel=1e-4)
    assert noted["label_smoothing/cost"] == pytest.approx(cost, rel=1e-4)


def test_the_strength_times_the_divergence_is_the_rest_of_the_loss() -> None:
    """So a curve of the plain loss is that of the loss minus strength times this one."""
    loud, quiet = (step(noisy(), functools.partial(r_drop, chunk=5, strength=s), 4) for s in (3.0, 1e-9))
    assert loud.noted["r_drop/kl"] == quiet.noted["r_drop/kl"]
    assert loud.nats - quiet.nats == pytest.approx(3 * loud.noted["r_drop/kl"], rel=1e-4)


def smoothed(model: Any, micro: int, ranks: Ranks | None = None) -> StepResult:
    return step(model, functools.partial(supervised_cross_entropy, chunk=5, smoothing=SMOOTHING), micro, ranks)


def smoothing_by_hand() -> float:
    (batch,) = collate(ragged_examples(8), 8)
    logits, labels = all_logits(tiny_llama(), batch)
    cross = functools.partial(F.cross_entropy, logits, labels, reduction="sum")
    return float((cross(label_smoothing=SMOOTHING) - cross()).detach())


@pytest.mark.parametrize("micro", [1, 3, 8])
def test_label_smoothing(micro: int) -> None:
    assert smoothed(tiny_llama(), micro).noted == {"label_smoothing/cost": pytest.approx(smoothing_by_hand(), rel=1e-4)}


@pytest.mark.parametrize("labels", [LABELS, MULTI], ids=lambda labels: labels.kind)
def test_label_smoothing_of_a_classifier(labels: Any) -> None:
    examples, model = texts(labels), tiny_bert_classifier(labels)
    loss: Callable[..., Any] = functools.partial(classification_loss, kind=labels.kind)
    batches = [batch_of(examples[:2], labels), batch_of(examples[2:], labels)]
    plain, more = (step(model, functools.partial(loss, label_smoothing=s), 0, batches=batches) for s in (0.0, 0.3))
    assert plain.noted == {}
    assert more.noted["label_smoothing/cost"] == pytest.approx(more.nats - plain.nats, rel=1e-3)


def lwf_step(micro: int, ranks: Ranks | None = None, checkpointing: bool = False) -> StepResult:
    model = tiny_llama().train()
    lwf = TokenLwF(model, LwFConfig(7.0, T), functools.partial(supervised_cross_entropy, chunk=5), 5)
    move(model)
    model.checkpoint_blocks = checkpointing
    return step(model, lwf, micro, ranks)


def move(model: LlamaForCausalLM) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))


def lwf_by_hand() -> float:
    (batch,) = collate(ragged_examples(8), 8)
    old, new = tiny_llama(), tiny_llama()
    move(new)
    divergence = kl(all_logits(new, batch)[0] / T, all_logits(old, batch)[0] / T)
    return T**2 * float(divergence.detach())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("micro", [1, 4])
def test_lwf(micro: int, checkpointing: bool) -> None:
    noted = lwf_step(micro, checkpointing=checkpointing).noted
    assert noted == {"lwf/kl": pytest.approx(lwf_by_hand(), rel=1e-4)}


def compare_ranks(ranks: Ranks) -> None:
    assert lwf_step(2, ranks).noted == {"lwf/kl": pytest.approx(lwf_by_hand(), rel=1e-4)}
    assert smoothed(tiny_llama(), 2, ranks).noted["label_smoothing/cost"] == pytest.approx(
        smoothing_by_hand(), rel=1e-4
    )
    unsupervised = [collate(ragged_examples(8), 8)[0], collate(ragged_examples(2), 2)[0].unsupervised()]
    noted = step(noisy(), functools.partial(r_drop, chunk=5, strength=3.0), 8, ranks, unsupervised).noted
    assert noted["r_drop/kl"] == pytest.approx(r_drop_by_hand(8)[0], rel=1e-4)


def test_two_ranks_note_their_sum(tmp_path: Path) -> None:
    """Also where the second has nothing to say."""
    run_ranks(compare_ranks, tmp_path)


def test_outside_a_step_a_note_goes_nowhere() -> None:
    sums: dict[str, Tensor] = {}
    with collecting(sums):
        note("a", torch.tensor(1.0, requires_grad=True))
        note("a", torch.tensor(2.0))
    note("a", torch.tensor(4.0))
    assert {name: float(value) for name, value in sums.items()} == {"a": 3.0}
    assert not sums["a"].requires_grad
