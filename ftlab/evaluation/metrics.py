"""Scores of a list of predictions with 95 % intervals, and of the difference between two models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple, Protocol

import numpy as np

from ftlab.errors import FtlabError
from ftlab.evaluation.intervals import (
    PERCENTILES,
    bootstrap_interval,
    bootstrap_sums,
    exact_mcnemar,
    paired_proportion_interval,
    wilson_interval,
)
from ftlab.evaluation.text_metrics import METRICS, Statistics, statistics_of

__all__ = ["LOWER_IS_BETTER", "METRICS", "Difference", "Score", "Scored", "paired_difference", "score"]


LOWER_IS_BETTER = ("loss", "perplexity", "mse", "ece")


class Scored(Protocol):
    """What a metric needs of a prediction: its record's id, the expected text and the model's."""

    # The class says what each is.
    @property
    def id(self) -> str: ...  # noqa: D102
    @property
    def reference(self) -> str: ...  # noqa: D102
    @property
    def prediction(self) -> str: ...  # noqa: D102


@dataclass(frozen=True)
class Score:
    """A metric with its 95 % interval, if it has one, and the signature of how both were computed.

    Metrics of generated answers are on 0-100; loss is in nats per token, and it and perplexity have no interval.
    """

    value: float
    low: float | None
    high: float | None
    signature: str

    def as_dict(self) -> dict[str, float | str | None]:
        """An entry of `scores` in run.json."""
        return asdict(self)


class Difference(NamedTuple):
    """final - base in points of a metric on 0-100, its 95 % interval, and the two-sided p value of no difference."""

    difference: float
    low: float
    high: float
    p: float


def score(predictions: Sequence[Scored], *, bootstrap: int = 1000, seed: int = 0) -> dict[str, Score]:
    """Every metric of `METRICS` on 0-100 with a 95 % interval.

    Intervals are percentiles of `bootstrap` resamples of the examples; they speak about other test examples, not about
    other training seeds. Exact match is a proportion and has Wilson's interval, which stays honest at 0 and at 100.

    Raises:
        FtlabError: there is no prediction.
    """
    if not predictions:
        raise FtlabError("nothing to score: no predictions; give the split records or set evaluation.generate=false")
    answers, references = [p.prediction for p in predictions], [p.reference for p in predictions]
    return {metric: _score(metric, statistics_of(metric, answers, references), bootstrap, seed) for metric in METRICS}


def _score(metric: str, statistics: Statistics, bootstrap: int, seed: int) -> Score:
    count = len(statistics.rows)
    if metric == "exact_match":
        low, high = wilson_interval(round(statistics.rows[:, 0].sum()), count)
        return Score(statistics.score, 100 * low, 100 * high, f"{statistics.signature}|n:{count}|ci95:wilson")
    low, high = bootstrap_interval(statistics.rows, statistics.value, bootstrap, seed)
    method = f"bootstrap({bootstrap},seed={seed})"
    return Score(statistics.score, low, high, f"{statistics.signature}|n:{count}|ci95:{method}")


def paired_difference(
    base: Sequence[Scored], final: Sequence[Scored], metric: str, *, bootstrap: int = 1000, seed: int = 0
) -> Difference:
    """How much better `final` is than `base` on the same examples, matched by id.

    Both models are scored on the same resamples of the examples (Koehn 2004): the interval is of the 2.5 and 97.5
    percentiles of the differences d*, and p = (1 + #{|d* - d| >= |d|}) / (1 + resamples), the share of resamples that
    stray from d as far as no difference at all would be. For exact match the interval is Newcombe's for paired
    proportions and p is McNemar's exact test, for the reason that `score` has Wilson's.

    Raises:
        FtlabError: an unknown metric, no predictions, or the two were not made for the same records.
    """
    if metric not in METRICS:
        raise FtlabError(f"unknown metric {metric!r}; there are {', '.join(METRICS)}")
    first, second = {p.id: p for p in base}, {p.id: p for p in final}
    if not first or first.keys() != second.keys() or len(first) != len(base) or len(second) != len(final):
        raise FtlabError(
            f"the two lists of predictions ({len(base)} and {len(final)}) are not of the same records; "
            "score both models on the same split with the same data options"
        )
    ids = list(first)
    if any(first[i].reference != second[i].reference for i in ids):
        raise FtlabError("the two lists of predictions have different references; score both models on the same split")
    references = [first[i].reference for i in ids]
    before = statistics_of(metric, [first[i].prediction for i in ids], references)
    after = statistics_of(metric, [second[i].prediction for i in ids], references)
    change = after.score - before.score
    if metric == "exact_match":
        hits_before, hits_after = before.rows[:, 0] > 0, after.rows[:, 0] > 0
        low, high = paired_proportion_interval(hits_before, hits_after)
        return Difference(change, 100 * low, 100 * high, exact_mcnemar(hits_before, hits_after))
    changes = after.value(bootstrap_sums(after.rows, bootstrap, seed)) - before.value(
        bootstrap_sums(before.rows, bootstrap, seed)
    )
    low, high = (float(limit) for limit in np.percentile(changes, PERCENTILES))
    strays = int((np.abs(changes - change) >= abs(change) - 1e-12).sum())
    return Difference(change, low, high, (1 + strays) / (1 + bootstrap))
