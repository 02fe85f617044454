"""Scores of a classifier with 95 % intervals over the texts, its confusion matrix and its reliability.

Shapes: N texts, C labels, R resamples, B bins.

- accuracy; F1 = 2 tp / (2 tp + fp + fn), of the summed counts (micro), and the mean over the labels that occur or are
  given (macro): the others have no F1.
- mcc: R_K of Gorodkin 2004 (Computational Biology and Chemistry 28:367), which for two labels is Matthews' coefficient.
  Like a correlation it has no value where all texts have one label, and is 0 where only the answers do not vary.
- auroc: the chance that a text with a label scores higher on it than one without, a tie counting one half; one against
  the rest, the mean over the labels for which both kinds exist, no score if there is none. Of two labels, one of which
  each text has, that of the second.
- ece: expected calibration error (Naeini, Cooper and Hauskrecht 2015, AAAI), 15 bins of equal width: the mean over
  decisions of |accuracy - confidence| of their bin. With several labels a text, each label is a decision of its own.
- regression: mse, Pearson's correlation, and Spearman's: Pearson's of the ranks, ties sharing their mean rank. Neither
  has a value where the targets do not vary; both are 0 where only the answers do not.

All but mse are on 0-100 (correlations and mcc: -100 to 100). Intervals are bootstrap percentiles, over the resamples in
which the score is defined; accuracy, a proportion, has Wilson's. With one number that is not finite every score is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftlab.errors import FtlabError
from ftlab.evaluation.intervals import bootstrap_sums, drawn_counts, percentile_interval, wilson_interval
from ftlab.evaluation.metrics import Score

__all__ = ["BINS", "Answers", "details", "score_labels"]

BINS = 15
ROUNDING = 1e-12  # of a sum of squares: a spread below is what rounding leaves of values that are equal
Floats = NDArray[np.float64]
Resampled = Callable[[Floats], Floats]  # of how often each text was drawn, [R, N], a score of each resample, [R]


@dataclass(frozen=True)
class Answers:
    """What a classifier said of N texts.

    kind: single, multi or regression. scores: probabilities [N, C], or the number [N, 1]. targets: index [N] (single),
    0 or 1 [N, C] (multi), or number [N] (regression).
    """

    kind: str
    names: tuple[str, ...]
    scores: Floats
    targets: Floats

    @property
    def finite(self) -> bool:
        """Whether all scores are numbers; those of a model that diverged are not, and say nothing."""
        return bool(np.isfinite(self.scores).all())

    @property
    def truth(self) -> NDArray[np.bool_]:
        """Which labels each text has, [N, C]."""
        if self.kind == "multi":
            return np.asarray(self.targets > 0.5)
        return np.asarray(self.targets.astype(int)[:, None] == np.arange(len(self.names)))

    @property
    def predicted(self) -> NDArray[np.bool_]:
        """Which labels each text is given, [N, C]: the likeliest, or every one from 1/2 on (multi)."""
        if self.kind == "multi":
            return np.asarray(self.scores >= 0.5)
        return np.asarray(self.scores.argmax(1)[:, None] == np.arange(len(self.names)))

    @property
    def right(self) -> NDArray[np.bool_]:
        """Which texts have exactly the labels they are given, [N]."""
        return np.asarray((self.truth == self.predicted).all(1))

    def decisions(self) -> tuple[Floats, NDArray[np.bool_], NDArray[np.int64]]:
        """Confidence in each decision, whether it holds, and the text it is about: [M] each."""
        count, labels = self.scores.shape
        if self.kind == "multi":
            texts = np.repeat(np.arange(count), labels)
            return self.scores.reshape(-1), self.truth.reshape(-1), texts
        return self.scores.max(1), self.right, np.arange(count)


def score_labels(answers: Answers, *, bootstrap: int = 1000, seed: int = 0) -> dict[str, Score]:
    """Every score that fits the kind of label. Errors: FtlabError if there is no text."""
    count = len(answers.scores)
    if count == 0:
        raise FtlabError("nothing to score: the split has no text")
    if not answers.finite:  # the same names and signatures, so that tables and checkpoint.metric find them
        alike = replace(answers, scores=np.zeros_like(answers.scores))
        found = score_labels(alike, bootstrap=bootstrap, seed=seed)
        return {name: Score(np.nan, np.nan, np.nan, score.signature) for name, score in found.items()}
    if answers.kind == "regression":
        return _with_intervals(_of_numbers(answers), count, bootstrap, seed)
    hits = int(answers.right.sum())
    low, high = wilson_interval(hits, count)
    name = "subset_accuracy" if answers.kind == "multi" else "accuracy"
    accuracy = Score(100 * hits / count, 100 * low, 100 * high, f"{name}|n:{count}|ci95:wilson")
    return {name: accuracy, **_with_intervals(_of_labels(answers), count, bootstrap, seed)}


def _with_intervals(
    measures: Mapping[str, tuple[str, Resampled]], count: int, bootstrap: int, seed: int
) -> dict[str, Score]:
    """The scores of all texts, with intervals from the same resamples. Of each measure, its signature and function."""
    ending = f"n:{count}|ci95:bootstrap({bootstrap},seed={seed})"
    resampled: dict[str, list[Floats]] = {name: [] for name in measures}
    for draws in drawn_counts(count, bootstrap, seed):
        for name, (_, value) in measures.items():
            resampled[name].append(value(draws))
    scores = {}
    for name, (what, value) in measures.items():
        scale = 1.0 if name == "mse" else 100.0
        exact = float(value(np.ones((1, count)))[0])
        low, high = percentile_interval(np.concatenate(resampled[name]), exact)
        scores[name] = Score(scale * exact, scale * low, scale * high, f"{what}|{ending}")
    return scores


def _of_numbers(answers: Answers) -> dict[str, tuple[str, Resampled]]:
    x, y = answers.scores[:, 0], answers.targets
    count = len(x)
    squares = (x - y) ** 2
    measures: dict[str, tuple[str, Resampled]] = {"mse": ("mse", lambda draws: draws @ squares / count)}
    if (y != y[0]).any():
        moments, places = _moments(x, y), (_Places.of(x), _Places.of(y))
        measures["pearson"] = ("pearson", lambda draws: _correlation(draws @ moments))
        measures["spearman"] = ("spearman|ties:mean rank", lambda draws: _spearman(*places, draws))
    return measures


def _of_labels(answers: Answers) -> dict[str, tuple[str, Resampled]]:
    count = len(answers.scores)
    decisions = answers.decisions()[0].size
    counts = np.concatenate([answers.truth & answers.predicted, answers.predicted, answers.truth], axis=1)
    statistics, bins = counts.astype(np.float64), _bin_sums(answers)
    measures: dict[str, tuple[str, Resampled]] = {
        "macro_f1": ("f1|macro over labels that occur or are given", lambda draws: _macro_f1(draws @ statistics)),
        "micro_f1": ("f1|micro", lambda draws: _micro_f1(draws @ statistics)),
    }
    if answers.kind == "single" and (answers.targets != answers.targets[0]).any():
        measures["mcc"] = ("mcc|R_K", lambda draws: _mcc(draws @ statistics, count))
    if labels := _ranked_labels(answers):
        measures["auroc"] = ("auroc|one-vs-rest|macro", lambda draws: _auroc(labels, draws))
    measures["ece"] = (f"ece|bins:{BINS}|equal width", lambda draws: _ece(draws @ bins) / decisions)
    return measures


# --- from sums over the texts ----------------------------------------------------------------------------------------


def _f1(both: Floats, predicted: Floats, true: Floats) -> Floats:
    """2 tp / (2 tp + fp + fn), NaN where nothing is true or predicted."""
    return _ratio(2 * both, predicted + true, np.nan)


def _macro_f1(sums: Floats) -> Floats:
    """The mean over the labels that are true or predicted somewhere; 0 without any, as micro F1 is."""
    each = _f1(*np.split(sums, 3, axis=1))
    return _ratio(np.nansum(each, axis=1), (~np.isnan(each)).sum(1).astype(np.float64), 0.0)


def _micro_f1(sums: Floats) -> Floats:
    """Of the counts of all labels together; 0 where nothing is true or predicted."""
    f1: Floats = np.nan_to_num(_f1(*(part.sum(1) for part in np.split(sums, 3, axis=1))))
    return f1


def _mcc(sums: Floats, count: int) -> Floats:
    """(c s - sum_k p_k t_k) / sqrt((s^2 - sum_k p_k^2)(s^2 - sum_k t_k^2)); NaN if all texts have one label."""
    both, predicted, true = np.split(sums, 3, axis=1)
    covariance = both.sum(1) * count - (predicted * true).sum(1)
    return _of_spreads(covariance, count**2 - (predicted**2).sum(1), count**2 - (true**2).sum(1))


def _of_spreads(covariance: Floats, answers: Floats, targets: Floats) -> Floats:
    """covariance / sqrt(answers targets): 0 where the answers do not vary, NaN where the targets do not."""
    spread = np.maximum(answers, 0.0) * np.maximum(targets, 0.0)
    quotient: Floats = np.where(targets > 0, _ratio(covariance, np.sqrt(spread), 0.0), np.nan)
    return quotient


def _ratio(above: Floats, below: Floats, otherwise: float) -> Floats:
    """above / below, or `otherwise` where below is 0."""
    quotient: Floats = np.divide(above, below, out=np.full_like(below, otherwise), where=below > 0)
    return quotient


def _moments(x: Floats, y: Floats) -> Floats:
    """1, x, y, x^2, y^2, x y of each text, about the means, so that a large offset costs no digits."""
    x, y = x - x.mean(), y - y.mean()
    return np.stack([np.ones(len(x)), x, y, x * x, y * y, x * y], axis=1)


def _correlation(sums: Floats) -> Floats:
    """Pearson's correlation from n and the sums of x (answers), y (targets), x^2, y^2 and x y."""
    n, x, y, xx, yy, xy = sums.T
    spreads = [np.where(n * vv - v * v > ROUNDING * n * vv, n * vv - v * v, 0.0) for v, vv in ((x, xx), (y, yy))]
    return _of_spreads(n * xy - x * y, *spreads)


def _bin_sums(answers: Answers) -> Floats:
    """Of each text: in each bin, sum of (correct - confidence) of its decisions, [N, B]."""
    confidence, holds, texts = answers.decisions()
    sums = np.zeros((len(answers.scores), BINS))
    np.add.at(sums, (texts, _bins(confidence)), holds - confidence)
    return sums


def _bins(confidence: Floats) -> NDArray[np.int64]:
    """The bin of each confidence; 1 belongs to the last one."""
    return np.minimum((confidence * BINS).astype(np.int64), BINS - 1)


def _ece(sums: Floats) -> Floats:
    """Summed |correct - confidence| over the bins; the caller divides by the number of decisions."""
    result: Floats = np.abs(sums).sum(1)
    return result


# --- from how often each text was drawn ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Places:
    """The texts in the order of a value, and how many stand before (first) and up to (last) each one's ties, [N]."""

    order: NDArray[np.int64]
    first: NDArray[np.int64]
    last: NDArray[np.int64]

    @classmethod
    def of(cls, values: Floats) -> _Places:
        order = np.argsort(values, kind="stable")
        ordered = values[order]
        return cls(order, np.searchsorted(ordered, values, "left"), np.searchsorted(ordered, values, "right"))

    def midranks(self, draws: Floats, texts: NDArray[np.int64] | slice = slice(None)) -> Floats:
        """Mean rank of `texts` in each resample, where text i occurs draws[r, i] times: [R, N] -> [R, texts]."""
        upto = np.zeros((len(draws), len(self.order) + 1))
        np.cumsum(draws[:, self.order], axis=1, out=upto[:, 1:])
        ranks: Floats = (upto[:, self.first[texts]] + upto[:, self.last[texts]] + 1) / 2
        return ranks


def _ranked_labels(answers: Answers) -> list[tuple[_Places, NDArray[np.int64]]]:
    """Of each label that some texts have and some do not: the places of its scores, and the texts with it."""
    labels = [1] if answers.kind == "single" and len(answers.names) == 2 else range(len(answers.names))
    found = []
    for label in labels:
        true = answers.truth[:, label]
        if true.any() and not true.all():
            found.append((_Places.of(answers.scores[:, label]), np.flatnonzero(true)))
    return found


def _auroc(labels: list[tuple[_Places, NDArray[np.int64]]], draws: Floats) -> Floats:
    """[R, N] -> [R], by the rank sum (Mann-Whitney): (sum of ranks - P (P + 1) / 2) / (P Q). NaN if undefined."""
    total, defined = np.zeros(len(draws)), np.zeros(len(draws))
    for places, texts in labels:
        positives = draws[:, texts].sum(1)
        negatives = draws.sum(1) - positives
        rank_sum = (draws[:, texts] * places.midranks(draws, texts)).sum(1) - positives * (positives + 1) / 2
        total += _ratio(rank_sum, positives * negatives, 0.0)
        defined += (positives > 0) & (negatives > 0)
    return _ratio(total, defined, np.nan)


def _spearman(x: _Places, y: _Places, draws: Floats) -> Floats:
    """[R, N] -> [R]."""
    middle = (draws.sum(1, keepdims=True) + 1) / 2  # the mean rank
    a, b = x.midranks(draws) - middle, y.midranks(draws) - middle
    ones = draws.sum(1)
    sums = [ones, (draws * a).sum(1), (draws * b).sum(1)]
    sums += [(draws * a * a).sum(1), (draws * b * b).sum(1), (draws * a * b).sum(1)]
    return _correlation(np.stack(sums, axis=1))


# --- for the report --------------------------------------------------------------------------------------------------


def details(answers: Answers, *, bootstrap: int = 1000, seed: int = 0) -> dict[str, Any]:
    """What a number does not tell, in plain types: per label, the confusion matrix, the reliability bins.

    A label that neither occurs nor is given has no F1. confusion[i][j] counts texts with label i that were given j
    (single). A reliability bin has its edges, the number of decisions in it, their mean confidence and the share that
    holds. Nothing of numbers, and nothing of scores that are not finite.
    """
    if answers.kind == "regression" or not answers.finite:
        return {}
    truth, predicted = answers.truth, answers.predicted
    statistics = np.concatenate([truth & predicted, predicted, truth], axis=1).astype(np.float64)
    resampled = _f1(*np.split(bootstrap_sums(statistics, bootstrap, seed), 3, axis=1))
    rows = []
    for label, (name, both, given, true) in enumerate(zip(answers.names, *np.split(statistics.sum(0), 3), strict=True)):
        exists = given + true > 0
        f1 = float(2 * both / (given + true)) if exists else np.nan
        low, high = percentile_interval(resampled[:, label], f1)
        rows.append(
            {
                "label": name,
                "texts": int(true),
                "precision": 100 * float(both / given) if given else None,
                "recall": 100 * float(both / true) if true else None,
                "f1": 100 * f1 if exists else None,
                "low": 100 * low if exists else None,
                "high": 100 * high if exists else None,
            }
        )
    found: dict[str, Any] = {"labels": rows, "reliability": reliability(answers)}
    if answers.kind == "single":
        matrix = truth.astype(np.int64).T @ predicted.astype(np.int64)
        found["confusion"] = matrix.tolist()
    return found


def reliability(answers: Answers) -> list[dict[str, float | int | None]]:
    """The bins of the reliability diagram."""
    confidence, holds, _ = answers.decisions()
    bins = _bins(confidence)
    found: list[dict[str, float | int | None]] = []
    for number in range(BINS):
        inside = bins == number
        size = int(inside.sum())
        found.append(
            {
                "low": number / BINS,
                "high": (number + 1) / BINS,
                "count": size,
                "confidence": float(confidence[inside].mean()) if size else None,
                "accuracy": float(holds[inside].mean()) if size else None,
            }
        )
    return found
