"""Scores of classifiers against tables worked by hand and against brute force over pairs."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch

from ftlab.config import EvaluationConfig
from ftlab.errors import FtlabError
from ftlab.evaluation import intervals
from ftlab.evaluation.classification import BINS, Answers, details, score_labels
from ftlab.evaluation.intervals import wilson_interval
from ftlab.evaluation.label_measure import LabelMeasurer
from ftlab.losses.classification import classification_loss
from ftlab.models.labels import LabelSet
from ftlab.training.parallel import Ranks
from tests.helpers.classifiers import LABELS, MULTI, NUMBER, batch_of, texts, tiny_bert_classifier
from tests.helpers.training import run_ranks

Array = np.ndarray[Any, np.dtype[np.float64]]


def single(true: list[int], given: list[int], confidence: float = 0.8, labels: int = 3) -> Answers:
    scores = np.full((len(true), labels), (1 - confidence) / (labels - 1))
    scores[np.arange(len(true)), given] = confidence
    return Answers("single", tuple("abc"[:labels]), scores, np.array(true, dtype=np.float64))


def random_answers(kind: str, count: int = 60, labels: int = 3, seed: int = 0) -> Answers:
    generator = np.random.default_rng(seed)
    scores = generator.dirichlet(np.ones(labels), count).round(2)
    targets = generator.integers(labels, size=count).astype(np.float64)
    if kind == "regression":
        return Answers(kind, (), scores[:, :1] * 5, targets)
    if kind == "multi":
        targets = (generator.random((count, labels)) < 0.4).astype(np.float64)
    return Answers(kind, tuple("abcdefghijkl"[:labels]), scores, targets)


def values(answers: Answers) -> dict[str, float]:
    return {name: score.value for name, score in score_labels(answers, bootstrap=100).items()}


def test_a_table_worked_by_hand() -> None:
    """True a a a b b c, given a a b b c c: tp 2 1 1, given 2 2 2, true 3 2 1."""
    answers = single([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2])
    found = values(answers)
    assert found["accuracy"] == pytest.approx(100 * 4 / 6)
    f1 = [2 * 2 / 5, 2 * 1 / 4, 2 * 1 / 3]
    assert found["macro_f1"] == pytest.approx(100 * sum(f1) / 3)
    assert found["micro_f1"] == pytest.approx(100 * 4 / 6)
    # R_K: (c s - sum p t) / sqrt((s^2 - sum p^2)(s^2 - sum t^2)) with c 4, s 6, p (2, 2, 2), t (3, 2, 1)
    assert found["mcc"] == pytest.approx(100 * (24 - 12) / math.sqrt((36 - 12) * (36 - 14)))
    assert found["ece"] == pytest.approx(100 * abs(0.8 - 4 / 6))
    shown = details(answers, bootstrap=100)
    assert shown["confusion"] == [[2, 1, 0], [0, 1, 1], [0, 0, 1]]
    assert [row["f1"] for row in shown["labels"]] == pytest.approx([100 * x for x in f1])
    assert shown["labels"][0]["precision"] == 100
    assert shown["labels"][0]["recall"] == pytest.approx(200 / 3)
    assert [row["texts"] for row in shown["labels"]] == [3, 2, 1]


def test_matthews_of_two_labels() -> None:
    """tp 3, tn 2, fp 1, fn 2."""
    answers = single([1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 1], labels=2)
    expected = (3 * 2 - 1 * 2) / math.sqrt((3 + 1) * (3 + 2) * (2 + 1) * (2 + 2))
    assert values(answers)["mcc"] == pytest.approx(100 * expected)


def test_a_constant_answer_scores_nothing_beyond_accuracy() -> None:
    found = values(single([0, 1, 2, 0], [0, 0, 0, 0]))
    assert found["mcc"] == 0
    assert found["macro_f1"] == pytest.approx(100 * (2 * 2 / 6) / 3)
    assert found["auroc"] == 50


def test_macro_f1_is_over_the_labels_that_occur_or_are_given() -> None:
    perfect = score_labels(single([0, 1, 0], [0, 1, 0], labels=3), bootstrap=100)["macro_f1"]
    assert (perfect.value, perfect.low, perfect.high) == (100, 100, 100)
    assert perfect.signature.startswith("f1|macro over labels that occur or are given|")
    # A label that is given but does not occur counts 0, like one that occurs and is never given.
    assert values(single([0, 0, 0], [0, 0, 2]))["macro_f1"] == pytest.approx(100 * (4 / 5 + 0) / 2)
    assert values(single([0, 0, 2], [0, 0, 0]))["macro_f1"] == pytest.approx(100 * (4 / 5 + 0) / 2)
    nothing = Answers("multi", ("a", "b"), np.zeros((4, 2)), np.zeros((4, 2)))
    assert values(nothing)["macro_f1"] == values(nothing)["micro_f1"] == 0


def test_an_interval_of_perfect_answers_holds_their_score() -> None:
    """A resample misses about a third of ten texts; the labels of those do not count in it."""
    each = list(range(10))
    names = tuple("abcdefghij")
    answers = Answers("single", names, np.eye(10), np.array(each, dtype=np.float64))
    found = score_labels(answers, bootstrap=100)["macro_f1"]
    assert (found.low, found.value, found.high) == (100, 100, 100)
    assert [(row["low"], row["f1"], row["high"]) for row in details(answers, bootstrap=100)["labels"]] == [
        (100, 100, 100)
    ] * 10


@pytest.mark.parametrize("kind", ["single", "regression"])
def test_resamples_without_the_one_odd_text_settle_no_correlation(kind: str) -> None:
    """A third of the resamples of perfect answers miss the one text that is unlike the others."""
    odd = np.arange(30) == 7
    answers = single(odd.astype(int), odd.astype(int), labels=2)
    if kind == "regression":
        answers = Answers(kind, (), np.where(odd, 1e3, 0.1)[:, None], np.where(odd, 1e3, 0.1))
    for name, score in score_labels(answers, bootstrap=200).items():
        if name in ("mcc", "pearson", "spearman"):
            assert (score.low, score.value, score.high) == pytest.approx((100, 100, 100)), name


def test_matthews_coefficient_needs_two_labels_among_the_texts() -> None:
    assert "mcc" not in values(single([1, 1, 1], [1, 0, 1], labels=2))


def test_a_label_that_neither_occurs_nor_is_given_has_no_row_of_scores() -> None:
    rows = details(single([0, 1, 0], [0, 0, 0]), bootstrap=100)["labels"]
    absent = {"label": "c", "texts": 0, "precision": None, "recall": None, "f1": None, "low": None, "high": None}
    assert rows[2] == absent
    assert rows[1]["f1"] == 0


def brute_auroc(scores: Array, positive: Any) -> float:
    pairs = list(itertools.product(scores[positive], scores[~positive]))
    return sum(float(p > q) + 0.5 * float(p == q) for p, q in pairs) / len(pairs)


@pytest.mark.parametrize("kind", ["single", "multi"])
def test_auroc_counts_pairs_and_halves_ties(kind: str) -> None:
    answers = random_answers(kind)
    assert len(np.unique(answers.scores[:, 0])) < len(answers.scores)  # there are ties
    expected = [brute_auroc(answers.scores[:, label], answers.truth[:, label]) for label in range(3)]
    assert values(answers)["auroc"] == pytest.approx(100 * sum(expected) / 3)


def test_auroc_of_two_labels_is_the_seconds_and_needs_both() -> None:
    answers = random_answers("single", labels=2)
    assert values(answers)["auroc"] == pytest.approx(100 * brute_auroc(answers.scores[:, 1], answers.truth[:, 1]))
    assert "auroc" not in values(single([1, 1, 1], [1, 0, 1], labels=2))


@pytest.mark.parametrize("block", [90, 2**20], ids=["blocks", "whole"])
@pytest.mark.parametrize(("kind", "labels"), [("single", 3), ("single", 12), ("multi", 3), ("regression", 5)])
def test_resampled_scores_are_the_scores_of_the_resample(
    kind: str, labels: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interval made one resample at a time, with the texts repeated, is the same interval.

    Many of these resamples miss one of twelve labels.
    """
    monkeypatch.setattr(intervals, "BLOCK", block)
    answers, resamples = random_answers(kind, count=25, labels=labels), 100
    draws = np.random.default_rng(0).multinomial(25, np.full(25, 1 / 25), size=resamples)
    repeated = [np.repeat(np.arange(25), row) for row in draws]
    each = [values(Answers(kind, answers.names, answers.scores[i], answers.targets[i])) for i in repeated]
    for name, score in score_labels(answers, bootstrap=resamples).items():
        if "wilson" in score.signature:
            continue
        low, high = np.percentile([one[name] for one in each if name in one], (2.5, 97.5))
        assert (score.low, score.high) == pytest.approx((low, high)), name


def test_multi_label_counts_by_hand() -> None:
    scores = np.array([[0.9, 0.2, 0.6], [0.1, 0.5, 0.3]])
    answers = Answers("multi", ("a", "b", "c"), scores, np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]))
    found = values(answers)
    assert found["subset_accuracy"] == 0
    assert found["micro_f1"] == pytest.approx(100 * 4 / 6)
    assert found["macro_f1"] == pytest.approx(100 * (1 + 1 + 0) / 3)
    # Every confidence is in a bin of its own: the mean of |outcome - confidence|.
    assert found["ece"] == pytest.approx(100 * (0.1 + 0.2 + 0.6 + 0.1 + 0.5 + 0.7) / 6)
    assert "confusion" not in details(answers, bootstrap=100)


def test_accuracy_has_wilsons_interval() -> None:
    score = score_labels(single([0, 1, 2, 0], [0, 1, 2, 1]), bootstrap=100)["accuracy"]
    low, high = wilson_interval(3, 4)
    assert (score.low, score.high) == (100 * low, 100 * high)


def test_reliability_bins() -> None:
    scores = np.array([[1.0, 0.0], [0.68, 0.32], [0.7, 0.3], [0.45, 0.55]])
    answers = Answers("single", ("a", "b"), scores, np.array([0.0, 1.0, 0.0, 1.0]))
    bins = details(answers, bootstrap=100)["reliability"]
    assert len(bins) == BINS == 15
    assert {number: row["count"] for number, row in enumerate(bins) if row["count"]} == {8: 1, 10: 2, 14: 1}
    assert bins[10]["confidence"] == pytest.approx(0.69)
    assert bins[10]["accuracy"] == 0.5
    assert bins[0]["accuracy"] is None
    expected = (abs(0.55 - 1) + abs(1.38 - 1) + 0) / 4
    assert values(answers)["ece"] == pytest.approx(100 * expected)


def test_regression_by_hand() -> None:
    x, y = np.array([1.0, 2.0, 3.0, 5.0]), np.array([2.0, 1.0, 4.0, 4.0])
    found = values(Answers("regression", (), x[:, None], y))
    assert found["mse"] == pytest.approx((1 + 1 + 1 + 1) / 4)
    assert found["pearson"] == pytest.approx(100 * np.corrcoef(x, y)[0, 1])
    ranks = np.corrcoef([1, 2, 3, 4], [2, 1, 3.5, 3.5])[0, 1]  # a tie shares its mean rank
    assert found["spearman"] == pytest.approx(100 * ranks)
    far = values(Answers("regression", (), x[:, None] + 1e8, y + 1e8))
    assert far["pearson"] == pytest.approx(found["pearson"], rel=1e-6)
    assert values(Answers("regression", (), np.ones((4, 1)), y))["pearson"] == 0
    assert set(values(Answers("regression", (), x[:, None], np.full(4, 0.1)))) == {"mse"}


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["single", "multi", "regression"])
def test_scores_that_are_not_finite_measure_nothing(kind: str, broken: float) -> None:
    answers = random_answers(kind)
    expected = score_labels(answers, bootstrap=100, seed=3)
    answers.scores[7, 0] = broken
    found = score_labels(answers, bootstrap=100, seed=3)
    assert {name: score.signature for name, score in found.items()} == {
        name: score.signature for name, score in expected.items()
    }
    for score in found.values():
        assert np.isnan([score.value, score.low, score.high]).all()
    assert details(answers, bootstrap=100) == {}


def test_memory_does_not_grow_with_the_resamples() -> None:
    """500 resamples of 20,000 texts are 80 MB of counts, and the ranks of a label as many again."""
    answers = random_answers("multi", count=20_000)
    tracemalloc.start()
    try:
        score_labels(answers, bootstrap=500)
        details(answers, bootstrap=500)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 60e6


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(FtlabError, match="has no text"):
        score_labels(single([], []))


# --- a model on a split ----------------------------------------------------------------------------------------------


def measurer(labels: LabelSet, ranks: Ranks, batch_size: int = 4) -> LabelMeasurer:
    from contextlib import nullcontext

    return LabelMeasurer(EvaluationConfig(batch_size=batch_size, bootstrap=100), labels, 0, nullcontext, ranks)


@pytest.mark.parametrize("labels", [LABELS, MULTI, NUMBER], ids=lambda labels: labels.kind)
def test_measured_is_the_sum_over_texts_whatever_the_batches(labels: LabelSet) -> None:
    model, examples = tiny_bert_classifier(labels).train(), texts(labels, 11)
    one, other = (measurer(labels, Ranks(), size).measure(model, examples, []) for size in (3, 50))
    assert model.training
    expected = float(classification_loss(model.eval(), batch_of(examples, labels), labels.kind).detach()) / 11
    assert one.scores["loss"].value == pytest.approx(expected, rel=1e-5)
    assert one.values() == pytest.approx(other.values(), rel=1e-5, abs=1e-4)
    assert [p.id for p in one.predictions] == [e.id for e in examples]
    logits = model(batch_of(examples, labels)).detach()
    if labels.kind == "single":
        assert [p.prediction for p in one.predictions] == [labels.names[i] for i in logits.argmax(1).tolist()]


def test_a_model_whose_weights_are_not_finite_gives_no_answers() -> None:
    model, examples = tiny_bert_classifier(LABELS), texts(LABELS, 5)
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    found = measurer(LABELS, Ranks()).measure(model, examples, [])
    assert all(math.isnan(value) for value in found.values().values())
    assert "accuracy" in found.scores
    assert (found.predictions, found.details) == ([], {})


def two_ranks(ranks: Ranks) -> None:
    model, examples = tiny_bert_classifier(), texts(count=5)
    shared = measurer(LABELS, ranks, 2).measure(model, examples, [])
    alone = measurer(LABELS, Ranks(), 2).measure(model, examples, [])
    assert shared.values() == pytest.approx(alone.values(), rel=1e-5)
    assert [p.prediction for p in shared.predictions] == [p.prediction for p in alone.predictions]


def test_two_ranks_measure_what_one_does(tmp_path: Any) -> None:
    run_ranks(two_ranks, tmp_path)
