"""Scores of a classifier with 95 % intervals over the texts, its confusion matrix and its reliability.

Shapes: N texts, C labels, R resamples, B bins.

- accuracy; F1 = 2 tp / (2 tp + fp + fn), a label that neither occurs nor is predicted counting 0: the mean over labels
  (macro), and of the summed counts (micro).
- mcc: R_K of Gorodkin 2004 (Computational Biology and Chemistry 28:367), which for two labels is Matthews' coefficient.
- auroc: the chance that a text with a label scores higher on it than one without, a tie counting one half; one against
  the rest, the mean over the labels for which both kinds exist. With two labels, that of the second.
- ece: expected calibration error (Naeini, Cooper and Hauskrecht 2015, AAAI), 15 bins of equal width: the mean over
  decisions of |accuracy - confidence| of their bin. With several labels a text, each label is a decision of its own.
- regression: mse, Pearson's correlation, and Spearman's: Pearson's of the ranks, ties sharing their mean rank.

All but mse are on 0-100 (correlations and mcc: -100 to 100). Intervals are bootstrap percentiles; accuracy, a
proportion, has Wilson's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftlab.errors import FtlabError
from ftlab.evaluation.intervals import PERCENTILES, bootstrap_interval, wilson_interval
from ftlab.evaluation.metrics import Score

__all__ = ["BINS", "Answers", "details", "score_labels"]

BINS = 15
Floats = NDArray[np.float64]


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
    ending = f"n:{count}|ci95:bootstrap({bootstrap},seed={seed})"

    def from_sums(statistics: Floats, value: Callable[[Floats], Floats], what: str, scale: float = 100.0) -> Score:
        exact = float(value(statistics.sum(0, keepdims=True))[0])
        low, high = bootstrap_interval(statistics, value, bootstrap, seed)
        return Score(scale * exact, scale * low, scale * high, f"{what}|{ending}")

    def from_weights(value: Callable[[Floats], Floats], what: str) -> Score:
        exact = float(value(np.ones((1, count)))[0])
        draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1.0 / count), size=bootstrap)
        resampled = value(draws.astype(np.float64))
        resampled = resampled[np.isfinite(resampled)]  # a resample may miss a kind of text that the score needs
        low, high = np.percentile(resampled, PERCENTILES) if len(resampled) else (exact, exact)
        return Score(100 * exact, 100 * float(low), 100 * float(high), f"{what}|{ending}")

    if answers.kind == "regression":
        x, y = answers.scores[:, 0], answers.targets
        scores = {"mse": from_sums(((x - y) ** 2)[:, None], lambda sums: sums[:, 0] / count, "mse", 1.0)}
        if count > 1:
            scores["pearson"] = from_sums(_moments(x, y), _correlation, "pearson")
            scores["spearman"] = from_weights(lambda draws: _spearman(x, y, draws), "spearman|ties:mean rank")
        return scores
    hits = int(answers.right.sum())
    low, high = wilson_interval(hits, count)
    name = "subset_accuracy" if answers.kind == "multi" else "accuracy"
    counts = np.concatenate([answers.truth & answers.predicted, answers.predicted, answers.truth], axis=1)
    statistics = counts.astype(np.float64)
    scores = {
        name: Score(100 * hits / count, 100 * low, 100 * high, f"{name}|n:{count}|ci95:wilson"),
        "macro_f1": from_sums(statistics, lambda sums: _f1(*np.split(sums, 3, axis=1)).mean(1), "f1|macro"),
        "micro_f1": from_sums(statistics, _micro_f1, "f1|micro"),
    }
    if answers.kind == "single":
        scores["mcc"] = from_sums(statistics, lambda sums: _mcc(sums, count), "mcc|R_K")
    if np.isfinite(_auroc(answers, np.ones((1, count)))[0]):
        scores["auroc"] = from_weights(lambda draws: _auroc(answers, draws), "auroc|one-vs-rest|macro")
    per_text = answers.decisions()[0].size / count
    scores["ece"] = from_sums(
        _bin_sums(answers), lambda sums: _ece(sums) / (count * per_text), f"ece|bins:{BINS}|equal width"
    )
    return scores


# --- from sums over the texts ----------------------------------------------------------------------------------------


def _f1(both: Floats, predicted: Floats, true: Floats) -> Floats:
    """2 tp / (2 tp + fp + fn), 0 where nothing is true or predicted."""
    total = predicted + true
    return _ratio(2 * both, total, 0.0)


def _micro_f1(sums: Floats) -> Floats:
    return _f1(*(part.sum(1) for part in np.split(sums, 3, axis=1)))


def _mcc(sums: Floats, count: int) -> Floats:
    """(c s - sum_k p_k t_k) / sqrt((s^2 - sum_k p_k^2)(s^2 - sum_k t_k^2)); 0 if one label takes all."""
    both, predicted, true = np.split(sums, 3, axis=1)
    covariance = both.sum(1) * count - (predicted * true).sum(1)
    spread = (count**2 - (predicted**2).sum(1)) * (count**2 - (true**2).sum(1))
    return _ratio(covariance, np.sqrt(np.maximum(spread, 0.0)), 0.0)


def _ratio(above: Floats, below: Floats, otherwise: float) -> Floats:
    """above / below, or `otherwise` where below is 0."""
    quotient: Floats = np.divide(above, below, out=np.full_like(below, otherwise), where=below > 0)
    return quotient


def _moments(x: Floats, y: Floats) -> Floats:
    """1, x, y, x^2, y^2, x y of each text, about the means, so that a large offset costs no digits."""
    x, y = x - x.mean(), y - y.mean()
    return np.stack([np.ones(len(x)), x, y, x * x, y * y, x * y], axis=1)


def _correlation(sums: Floats) -> Floats:
    """Pearson's correlation from n and the sums of x, y, x^2, y^2 and x y; 0 if one of them does not vary."""
    n, x, y, xx, yy, xy = sums.T
    spread = np.maximum(n * xx - x * x, 0.0) * np.maximum(n * yy - y * y, 0.0)
    covariance = n * xy - x * y
    return _ratio(covariance, np.sqrt(spread), 0.0)


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


def _midranks(values: Floats, draws: Floats) -> Floats:
    """Mean rank of each value in each resample, where text i occurs draws[r, i] times: [N], [R, N] -> [R, N]."""
    _, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    sizes = np.add.reduceat(draws[:, order], starts, axis=1)  # [R, groups]
    before = np.cumsum(sizes, axis=1) - sizes
    ranks: Floats = (before + (sizes + 1) / 2)[:, group]
    return ranks


def _auroc(answers: Answers, draws: Floats) -> Floats:
    """[R, N] -> [R], by the rank sum (Mann-Whitney): (sum of ranks - P (P + 1) / 2) / (P Q). NaN if undefined."""
    labels = [1] if answers.kind == "single" and len(answers.names) == 2 else range(len(answers.names))
    total, defined = np.zeros(len(draws)), np.zeros(len(draws))
    for label in labels:
        true = answers.truth[:, label].astype(np.float64)
        positives = draws @ true
        negatives = draws.sum(1) - positives
        if not true.any() or true.all():
            continue
        rank_sum = ((draws * _midranks(answers.scores[:, label], draws)) @ true) - positives * (positives + 1) / 2
        exists = (positives > 0) & (negatives > 0)
        total += _ratio(rank_sum, positives * negatives, 0.0)
        defined += exists
    return _ratio(total, defined, np.nan)


def _spearman(x: Floats, y: Floats, draws: Floats) -> Floats:
    """[R, N] -> [R]."""
    a, b = _midranks(x, draws), _midranks(y, draws)
    middle = (draws.sum(1, keepdims=True) + 1) / 2  # the mean rank
    a, b = a - middle, b - middle
    ones = draws.sum(1)
    sums = [ones, (draws * a).sum(1), (draws * b).sum(1)]
    sums += [(draws * a * a).sum(1), (draws * b * b).sum(1), (draws * a * b).sum(1)]
    return _correlation(np.stack(sums, axis=1))


# --- for the report --------------------------------------------------------------------------------------------------


def details(answers: Answers, *, bootstrap: int = 1000, seed: int = 0) -> dict[str, Any]:
    """What a number does not tell, in plain types: per label, the confusion matrix, the reliability bins.

    confusion[i][j] counts texts with label i that were given j (single). A reliability bin has its edges, the number of
    decisions in it, their mean confidence and the share that holds.
    """
    if answers.kind == "regression":
        return {}
    truth, predicted = answers.truth, answers.predicted
    statistics = np.stack([truth & predicted, predicted, truth], axis=2).astype(np.float64)  # [N, C, 3]
    rows = []
    for label, name in enumerate(answers.names):
        both, given, true = statistics[:, label].sum(0)
        low, high = bootstrap_interval(statistics[:, label], lambda sums: _f1(*sums.T), bootstrap, seed)
        f1 = float(_f1(*statistics[:, label].sum(0)[:, None])[0])
        rows.append(
            {
                "label": name,
                "texts": int(true),
                "precision": 100 * float(both / given) if given else None,
                "recall": 100 * float(both / true) if true else None,
                "f1": 100 * f1,
                "low": 100 * low,
                "high": 100 * high,
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
