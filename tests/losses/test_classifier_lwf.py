"""Learning without forgetting of classifiers, against torch's divergence between two models that really are two."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, kl_divergence

from ftlab.config import FullConfig, LoRAConfig, LwFConfig, MethodConfig
from ftlab.losses.classification import classification_loss, logits_loss
from ftlab.losses.lwf import LabelLwF, label_distillation
from ftlab.losses.mixout import Mixout
from ftlab.losses.scalars import collecting
from ftlab.methods import make_method
from ftlab.models.heads import BertClassifier
from ftlab.models.labels import LabelSet
from ftlab.models.noise import Noise, disturb
from ftlab.training.parallel import Ranks
from tests.helpers.classifiers import LABELS, MULTI, batch_of, shake, texts, tiny_bert_classifier, tiny_llama_classifier
from tests.helpers.training import compare_with_one_rank, gradients, gradients_of_a_step, run_ranks

KINDS = pytest.mark.parametrize("labels", [LABELS, MULTI], ids=lambda labels: labels.kind)
METHODS: dict[str, MethodConfig] = {
    "full": FullConfig(),
    "lora": LoRAConfig(rank=3, alpha=6.0, targets=["query", "output.dense"]),
}
STRENGTH, T = 20.0, 3.0


def by_torch(old_EC: Tensor, new_EC: Tensor, kind: str, temperature: float) -> Tensor:
    make = Categorical if kind == "single" else Bernoulli
    old, new = (make(logits=logits / temperature) for logits in (old_EC, new_EC))
    return temperature**2 * kl_divergence(old, new).sum()


def built(
    labels: LabelSet, method: MethodConfig, *, r_drop: float = 0.0, dropout: float = 0.0
) -> tuple[BertClassifier, BertClassifier, LabelLwF]:
    """A model that has moved since the old one, the old one, and LwF around the plain loss or R-Drop."""
    model = tiny_bert_classifier(labels)
    disturb(model, Noise(embedding=dropout, residual=dropout))
    make_method(method, seed=0).apply(model)
    shake(model)
    plain = functools.partial(classification_loss, kind=labels.kind, r_drop=r_drop)
    lwf = LabelLwF(model, LwFConfig(STRENGTH, T), plain, labels.kind)
    old = copy.deepcopy(model).eval()
    shake(model)
    return model, old, lwf


@KINDS
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_divergence_is_torchs(labels: LabelSet, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    old, new = (3 * torch.randn(11, 3, generator=generator) for _ in range(2))
    new.requires_grad_()
    ours = label_distillation(old, new, labels.kind, temperature)
    theirs = by_torch(old, new, labels.kind, temperature)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    (found,), (expected,) = (torch.autograd.grad(value, new) for value in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert float(label_distillation(old, old, labels.kind, temperature)) == pytest.approx(0, abs=1e-5)


@KINDS
@pytest.mark.parametrize("name", METHODS)
def test_the_loss_and_its_gradient_are_those_of_two_models(labels: LabelSet, name: str) -> None:
    model, old, lwf = built(labels, METHODS[name])
    batch = batch_of(texts(labels), labels)
    noted: dict[str, Tensor] = {}
    with collecting(noted):
        loss = lwf(model, batch)
    loss.backward()
    found = gradients(model)
    model.zero_grad()
    logits = model(batch)
    with torch.no_grad():
        old_logits = old(batch)
    divergence = by_torch(old_logits, logits, labels.kind, T)
    assert STRENGTH * float(divergence.detach()) > 0.1
    expected = logits_loss(logits, batch.labels, labels.kind) + STRENGTH * divergence
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    assert noted["lwf/kl"].item() == pytest.approx(divergence.item(), rel=1e-3)
    expected.backward()
    assert found.keys() == gradients(model).keys()
    for key, gradient in gradients(model).items():
        size = max(float(gradient.abs().max()), 1.0)  # that of a key's bias is 0 but for rounding
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-4 * size)
    kept = {f"model.{key}" for key, p in model.named_parameters() if p.requires_grad}
    assert lwf.old.keys() == kept, "what is kept is what trains"


def test_a_decoder_is_held_too() -> None:
    model = tiny_llama_classifier()
    lwf = LabelLwF(model, LwFConfig(STRENGTH, T), functools.partial(classification_loss, kind="single"), "single")
    old = copy.deepcopy(model)
    shake(model)
    batch = batch_of(texts())
    logits = model(batch)
    expected = logits_loss(logits, batch.labels, "single") + STRENGTH * by_torch(old(batch), logits, "single", T)
    torch.testing.assert_close(lwf(model, batch), expected, rtol=1e-5, atol=1e-4)


@KINDS
def test_with_r_drop_the_mean_of_both_passes_counts_and_the_old_model_drops_nothing(labels: LabelSet) -> None:
    model, old, lwf = built(labels, FullConfig(), r_drop=2.0, dropout=0.3)
    batch = batch_of(texts(labels), labels)
    model.train()
    torch.manual_seed(0)
    loss = lwf(model, batch)
    after = torch.get_rng_state()
    assert model.training
    torch.manual_seed(0)
    expected = classification_loss(model, batch, labels.kind, r_drop=2.0)
    assert torch.equal(after, torch.get_rng_state())
    torch.manual_seed(0)
    for _ in range(2):
        expected = expected + STRENGTH / 2 * by_torch(old(batch), model(batch), labels.kind, T)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-3)


def test_under_mixout_the_mixed_model_is_held_to_the_old_one() -> None:
    """Of a head that was read, which has a first value, the weight is mixed too."""
    model = tiny_bert_classifier()
    model.new_head = False
    plain = functools.partial(classification_loss, kind="single")
    mixout = Mixout(model, 0.5, LabelLwF(model, LwFConfig(STRENGTH, T), plain, "single"))
    assert "model.classifier.weight" in mixout.anchors
    old = copy.deepcopy(model)
    shake(model)
    batch = batch_of(texts())
    torch.manual_seed(0)
    loss = mixout(model, batch)
    torch.manual_seed(0)
    seen: list[Tensor] = []

    def look(model: Any, batch: Any) -> Tensor:
        seen.append(model(batch))
        return seen[0].sum()

    mixed = Mixout(model, 0.5, look)
    mixed.anchors = mixout.anchors
    mixed(model, batch)
    expected = logits_loss(seen[0], batch.labels, "single") + STRENGTH * by_torch(old(batch), seen[0], "single", T)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)


def test_nothing_to_learn_is_zero_and_reaches_everything() -> None:
    model, _, lwf = built(LABELS, FullConfig())
    loss = lwf(model, batch_of(texts()).unsupervised())
    loss.backward()
    assert float(loss.detach()) == 0
    assert gradients(model).keys() == dict(model.named_parameters()).keys()


def one_step(ranks: Ranks) -> dict[str, Tensor]:
    """The gradient of a step, after the model has moved."""
    model, _, lwf = built(LABELS, METHODS["lora"])
    examples = texts(count=8)
    batches = [batch_of(examples[at : at + 2]) for at in range(0, 8, 2)][ranks.rank :: ranks.world]
    return gradients_of_a_step(model, lwf, ranks, batches)


def test_two_ranks_make_the_step_of_one(tmp_path: Path) -> None:
    run_ranks(compare_with_one_rank, tmp_path, one_step)
