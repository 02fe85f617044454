from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Bernoulli, Categorical, kl_divergence

from ftlab.config import PrecisionConfig
from ftlab.losses.classification import classification_loss, logits_loss
from ftlab.losses.scalars import collecting
from ftlab.models.labels import LabelSet
from ftlab.models.noise import Noise, disturb
from ftlab.training.loop import train_step
from ftlab.training.parallel import Ranks, Replica
from ftlab.training.precision import Precision
from tests.helpers.classifiers import LABELS, MULTI, NUMBER, batch_of, texts, tiny_bert_classifier
from tests.helpers.training import KeepGradients


def test_closed_forms() -> None:
    logits = torch.tensor([[math.log(2), 0.0], [0.0, 0.0]])
    assert float(logits_loss(logits, torch.tensor([0, 1]), "single")) == pytest.approx(math.log(3 / 2) + math.log(2))
    targets = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert float(logits_loss(logits, targets, "multi")) == pytest.approx(math.log(3 / 2) + 3 * math.log(2))
    numbers = torch.tensor([[1.0], [4.0]])
    assert float(logits_loss(numbers, torch.tensor([3.0, 4.5]), "regression")) == pytest.approx(4.25)


def test_label_smoothing_is_a_mixture_of_targets() -> None:
    logits, s = torch.tensor([[1.0, -0.5, 0.25]]), 0.3
    log_p = F.log_softmax(logits, -1)[0]
    expected = -(1 - s) * log_p[2] - s * log_p.mean()
    torch.testing.assert_close(logits_loss(logits, torch.tensor([2]), "single", s), expected)
    q = torch.tensor([(1 - s) + s / 2, s / 2, s / 2])
    expected = -(q * F.logsigmoid(logits[0]) + (1 - q) * F.logsigmoid(-logits[0])).sum()
    torch.testing.assert_close(logits_loss(logits, torch.tensor([[1.0, 0.0, 0.0]]), "multi", s), expected)


@pytest.mark.parametrize("labels", [LABELS, MULTI, NUMBER], ids=lambda labels: labels.kind)
def test_the_gradient_does_not_depend_on_how_the_batch_was_split(labels: LabelSet) -> None:
    """Uneven micro-batches of texts of uneven length: the sum is divided once, by the number of texts."""
    examples = texts(labels)
    loss = functools.partial(classification_loss, kind=labels.kind)
    found = []
    for parts in ([6], [1, 5], [2, 2, 2]):
        model = tiny_bert_classifier(labels)
        optimizer = KeepGradients(model)
        cuts = [sum(parts[:number]) for number in range(len(parts) + 1)]
        batches = [batch_of(examples[a:b], labels) for a, b in itertools.pairwise(cuts)]
        precision = Precision(PrecisionConfig(), torch.device("cpu"))
        result = train_step(Replica(model, loss, Ranks()), optimizer, batches, precision=precision)
        assert result.supervised == 6
        found.append((result.nats, optimizer.seen))
    model = tiny_bert_classifier(labels)
    alone = sum(loss(model, batch_of([example], labels)) for example in examples)
    assert isinstance(alone, torch.Tensor)
    (alone / 6).backward()
    for nats, seen in found:
        assert nats == pytest.approx(float(alone.detach()), rel=1e-5)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(seen[name], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("labels", [LABELS, MULTI], ids=lambda labels: labels.kind)
def test_r_drop_is_two_passes_and_torchs_divergence_between_them(labels: LabelSet) -> None:
    model = tiny_bert_classifier(labels).train()
    disturb(model, Noise(embedding=0.3, residual=0.3))
    batch = batch_of(texts(labels), labels)
    noted: dict[str, torch.Tensor] = {}
    torch.manual_seed(0)
    with collecting(noted):
        loss = classification_loss(model, batch, labels.kind, 0.1, r_drop=3.0)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.manual_seed(0)
    passes = [model(batch)[: len(batch.labels)].double() for _ in range(2)]
    assert not torch.equal(*passes)
    if labels.kind == "single":
        one, other = (Categorical(logits=logits) for logits in passes)
    else:
        one, other = (Bernoulli(logits=logits) for logits in passes)
    divergence = (kl_divergence(one, other) + kl_divergence(other, one)).sum()
    nats, plain = (sum(logits_loss(z.float(), batch.labels, labels.kind, s) for z in passes) / 2 for s in (0.1, 0.0))
    expected = nats + 0.75 * divergence
    torch.testing.assert_close(loss, expected.float())
    assert noted["r_drop/kl"].item() == pytest.approx(divergence.item() / 4, rel=1e-4)
    assert noted["label_smoothing/cost"].item() == pytest.approx((nats - plain).item(), rel=1e-4)
    expected.backward()
    for name, gradient in ((name, p.grad) for name, p in model.named_parameters()):
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("labels", [LABELS, MULTI, NUMBER], ids=lambda labels: labels.kind)
def test_nothing_to_learn_is_zero_and_reaches_everything(labels: LabelSet) -> None:
    model = tiny_bert_classifier(labels)
    loss = classification_loss(model, batch_of(texts(labels), labels).unsupervised(), labels.kind)
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
