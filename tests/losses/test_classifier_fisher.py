"""Fisher information and EWC of classifiers: logistic regression's closed form, autograd, and whose head is held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Normal

from ftlab import fisher as command
from ftlab.config import EWCConfig, FullConfig, LoRAConfig, MethodConfig
from ftlab.errors import FtlabError
from ftlab.losses.ewc import EWC
from ftlab.losses.fisher import FILE, FisherFacts, diagonal_fisher, read_fisher, save_fisher
from ftlab.methods import make_method
from ftlab.methods.lora import lora_leaves
from ftlab.models.heads import BertClassifier, Classifier, head_facts, pool
from ftlab.models.labels import LabelSet
from ftlab.models.noise import Noise, disturb
from tests.helpers.classifiers import (
    LABELS,
    MULTI,
    NUMBER,
    batch_of,
    shake,
    texts,
    tiny_bert_classifier,
    tiny_llama_classifier,
)
from tests.helpers.models import tiny_llama

KINDS = pytest.mark.parametrize("labels", [LABELS, MULTI, NUMBER], ids=lambda labels: labels.kind)
WEIGHT, BIAS, QUERY = "classifier.weight", "classifier.bias", "bert.encoder.layer.0.attention.self.query.weight"


def features(model: BertClassifier, batch: Any) -> Tensor:
    """What enters the head, [E, D]."""
    with torch.no_grad():
        return pool(model.bert(batch.input_ids, batch.mask, batch.token_types), batch.mask, "mean")


def log_p(logits_EC: Tensor, targets: Tensor, kind: str) -> Tensor:
    """The log-likelihood of torch's own distributions."""
    if kind == "single":
        return Categorical(logits=logits_EC).log_prob(targets).sum()
    if kind == "multi":
        return Bernoulli(logits=logits_EC).log_prob(targets).sum()
    return Normal(logits_EC[:, 0], 1.0).log_prob(targets).sum()


@KINDS
def test_empirical_is_the_mean_of_squared_gradients_of_torchs_likelihood(labels: LabelSet) -> None:
    model = tiny_bert_classifier(labels).train()
    disturb(model, Noise(embedding=0.3, residual=0.3))
    names = [WEIGHT, BIAS, QUERY]
    batches = [batch_of([example], labels) for example in texts(labels)]
    found = diagonal_fisher(model, names, batches, kind="empirical")
    expected = {name: torch.zeros_like(model.get_parameter(name)) for name in names}
    for batch in batches:  # diagonal_fisher left the model in evaluation mode: no dropout
        value = log_p(model(batch), batch.labels, labels.kind)
        gradients = torch.autograd.grad(value, [model.get_parameter(name) for name in names])
        for name, gradient in zip(names, gradients, strict=True):
            expected[name] += gradient.square() / len(batches)
    for name in names:
        scale = float(expected[name].max())
        assert scale > 0
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6 * scale)


@KINDS
def test_true_is_that_of_logistic_and_linear_regression(labels: LabelSet) -> None:
    """Of the head alone F is in closed form: p_c (1 - p_c) x_j^2, and x_j^2 for a Gaussian; for the bias without x."""
    model = tiny_bert_classifier(labels)
    batch = batch_of(texts(labels)[:1], labels)
    x_D, logits_C = features(model, batch)[0], model(batch)[0].detach()
    p_C = logits_C.softmax(-1) if labels.kind == "single" else logits_C.sigmoid()
    variance_C = torch.ones(1) if labels.kind == "regression" else p_C * (1 - p_C)
    found = diagonal_fisher(model, [WEIGHT, BIAS], [batch] * 4000, kind="true", seed=1)
    for name, exact in ((WEIGHT, variance_C[:, None] * x_D.square()), (BIAS, variance_C)):
        assert float((found[name] - exact).norm() / exact.norm()) < 0.1
    one, again, other = (diagonal_fisher(model, [BIAS], [batch] * 100, seed=seed)[BIAS] for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_each_drawn_label_is_one_of_the_labels() -> None:
    """One text, one draw: the square of the gradient of one label's log-likelihood."""
    model = tiny_llama_classifier()
    batch = batch_of(texts()[:1])
    choices = []
    for y in range(3):
        (gradient,) = torch.autograd.grad(log_p(model(batch), torch.tensor([y]), "single"), [model.score.weight])
        choices.append(gradient.square())
    drawn = set()
    for seed in range(12):
        found = diagonal_fisher(model, ["score.weight"], [batch], seed=seed)["score.weight"]
        drawn.add(min(range(3), key=lambda y: float((found - choices[y]).norm())))
        assert min(float((found - choice).norm() / choice.norm()) for choice in choices) < 1e-5
    assert len(drawn) > 1


# --- EWC --------------------------------------------------------------------------------------------------------------


def saved(folder: Path, model: Classifier) -> str:
    """A folder with random Fisher information of every matrix, as if a run had ended at these weights."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(4)
    weights = {name: p for name, p in model.named_parameters() if p.ndim == 2}
    fisher = {name: torch.rand(p.shape, generator=generator) for name, p in weights.items()}
    save_fisher(folder / FILE, fisher, weights, FisherFacts("true", 1, 0, head=head_facts(model)))
    return str(folder)


def expected_value(model: Classifier, folder: str, strength: float, *, head: bool) -> Tensor:
    """By effective weights, formed."""
    fisher, anchors, _ = read_fisher(Path(folder) / FILE)
    deltas = {f"{name}.weight": leaf.delta_weight() for name, leaf in lora_leaves(model).items()}
    total = torch.zeros(())
    for name, parameter in model.named_parameters():
        moves = parameter.requires_grad or name in deltas
        if name in fisher and moves and (head or name != WEIGHT):
            distance = parameter + deltas.get(name, 0) - anchors[name]
            total = total + (fisher[name].float() * distance.square()).sum()
    return strength / 2 * total


METHODS = pytest.mark.parametrize(
    "method",
    [FullConfig(), LoRAConfig(rank=2, alpha=4.0, targets=["query", "output.dense"])],
    ids=["full", "lora"],
)
OTHER = LabelSet("single", ("heart", "kidney", "nail"))


@METHODS
@pytest.mark.parametrize("labels", [LABELS, OTHER, MULTI, LabelSet("single", ("heart", "kidney"))], ids=str)
def test_the_body_is_held_and_the_head_where_it_is_the_same(
    labels: LabelSet, method: MethodConfig, tmp_path: Path
) -> None:
    """Other names in the same shape, another kind, another number: another task's head."""
    folder = saved(tmp_path / "first", tiny_bert_classifier(seed=5))
    model = tiny_bert_classifier(labels)
    make_method(method).apply(model)
    shake(model)
    penalty = EWC(model, EWCConfig(0.7, [folder]))
    same = labels == LABELS
    assert (WEIGHT in {held.name for held in penalty.held}) == same
    assert bool(penalty.left_out) != same
    value, exact = penalty.value(model), expected_value(model, folder, 0.7, head=same)
    torch.testing.assert_close(value, exact, rtol=1e-4, atol=0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(v, parameters, allow_unused=True) for v in (value, exact))
    for mine, reference in zip(ours, theirs, strict=True):
        assert (mine is None) == (reference is None)
        if reference is not None:
            torch.testing.assert_close(mine, reference, rtol=1e-3, atol=1e-5 * float(reference.abs().max()))


def test_another_pooling_is_another_head_and_another_body_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "first", tiny_bert_classifier())
    penalty = EWC(model := tiny_bert_classifier(pooling="cls"), EWCConfig(1.0, [folder]))
    assert penalty.left_out == [
        f"regularizer.ewc: the head in {folder}/{FILE} is another task's (other labels or pooling): left out"
    ]
    assert len(penalty.held) == len([p for p in model.parameters() if p.ndim == 2]) - 1
    with pytest.raises(FtlabError, match="another model"):
        EWC(tiny_llama_classifier(), EWCConfig(1.0, [folder]))
    pooled = saved(tmp_path / "pooled", tiny_bert_classifier(pooling="pooler"))
    assert {held.name for held in EWC(model, EWCConfig(1.0, [pooled])).held} == {held.name for held in penalty.held}
    own = EWC(tiny_bert_classifier(OTHER, pooling="pooler"), EWCConfig(1.0, [pooled]))
    assert "bert.pooler.dense.weight" in {held.name for held in own.held}


def test_between_a_language_model_and_a_classifier_the_decoder_is_held(tmp_path: Path) -> None:
    text = tiny_llama(vocab_size=61, tie_word_embeddings=False)
    (tmp_path / "text").mkdir()
    weights = {name: p for name, p in text.named_parameters() if p.ndim == 2}
    fisher = {name: torch.ones_like(p) for name, p in weights.items()}
    save_fisher(tmp_path / "text" / FILE, fisher, weights, FisherFacts("true", 1, 0))
    model = tiny_llama_classifier(tie_word_embeddings=False)
    penalty = EWC(model, EWCConfig(1.0, [str(tmp_path / "text")]))
    assert {held.name for held in penalty.held} == weights.keys() - {"lm_head.weight"}
    back = EWC(text, EWCConfig(1.0, [saved(tmp_path / "labels", model)]))
    assert {held.name for held in back.held} == weights.keys() - {"lm_head.weight"}


def test_online_ewc_leaves_another_tasks_head_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = [saved(tmp_path / "first", tiny_bert_classifier())]
    earlier, _, _ = read_fisher(tmp_path / "first" / FILE)
    for labels, kept in ((LABELS, True), (OTHER, False)):
        found, tasks = command._with_earlier({WEIGHT: torch.ones(3, 32)}, 0.5, sources, tiny_bert_classifier(labels))
        assert tasks == 2
        assert found.keys() == earlier.keys()
        expected = 1 + 0.5 * earlier[WEIGHT].float() if kept else torch.ones(3, 32)
        torch.testing.assert_close(found[WEIGHT], expected)
        assert ("another task's" in capsys.readouterr().out) != kept
