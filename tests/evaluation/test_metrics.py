from __future__ import annotations

import math
import random
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import pytest
from rouge_score import rouge_scorer
from sacrebleu.metrics import BLEU, CHRF

from ftlab.errors import FtlabError
from ftlab.evaluation import intervals
from ftlab.evaluation.intervals import (
    bootstrap_interval,
    bootstrap_sums,
    exact_mcnemar,
    paired_proportion_interval,
    percentile_interval,
    wilson_interval,
)
from ftlab.evaluation.metrics import METRICS, paired_difference, score
from ftlab.evaluation.text_metrics import normalise_answer, statistics_of

TEXT = "abnormal heart rate slow high blood pressure seizure of the left arm muscle weakness, (distal) type 2"
WORDS = TEXT.split()


@dataclass(frozen=True)
class Answer:
    id: str
    reference: str
    prediction: str


def answers(count: int, seed: int = 0, right: float = 0.3, longest: int = 7) -> list[Answer]:
    rng = random.Random(seed)
    made = []
    for index in range(count):
        reference = " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))
        words = reference.split()
        if rng.random() > right:
            words = [rng.choice(WORDS) if rng.random() < 0.5 else word for word in words][: rng.randint(0, 8)]
        made.append(Answer(f"r{index}", reference, " ".join(words)))
    return made


def texts(made: list[Answer]) -> tuple[list[str], list[str]]:
    return [a.prediction for a in made], [a.reference for a in made]


@pytest.mark.parametrize("longest", [1, 7])
@pytest.mark.parametrize("seed", range(3))
def test_corpus_scores_are_those_of_the_published_packages(seed: int, longest: int) -> None:
    made = answers(60, seed, longest=longest)
    predictions, references = texts(made)
    scores = score(made, bootstrap=100)
    assert scores["bleu"].value == pytest.approx(BLEU().corpus_score(predictions, [references]).score, abs=1e-4)
    assert scores["chrf"].value == pytest.approx(CHRF().corpus_score(predictions, [references]).score, abs=1e-4)
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for name in ("rouge1", "rouge2", "rougeL"):
        expected = 100 * sum(scorer.score(a.reference, a.prediction)[name].fmeasure for a in made) / len(made)
        assert scores[name].value == pytest.approx(expected, abs=1e-4)
    assert set(scores) == set(METRICS)
    for made_score in scores.values():
        assert made_score.low is not None
        assert made_score.high is not None
        assert made_score.low <= made_score.value <= made_score.high


@pytest.mark.parametrize(("metric", "official"), [("bleu", BLEU()), ("chrf", CHRF())])
def test_every_resample_is_scored_as_sacrebleu_would(metric: str, official: BLEU | CHRF) -> None:
    for seed, longest in ((0, 7), (1, 2)):  # two words at most: n-gram orders without any match or any n-gram
        predictions, references = texts(answers(12, seed, longest=longest))
        statistics = statistics_of(metric, predictions, references)
        sums = bootstrap_sums(statistics.rows, 200, seed)
        ours = statistics.value(sums)
        theirs = [official._compute_score_from_stats(row.tolist()).score for row in sums]
        np.testing.assert_allclose(ours, theirs, atol=1e-9)


def test_bootstrap_interval_is_that_of_explicit_resampling() -> None:
    made = answers(80, 3)
    predictions, references = texts(made)
    rng = np.random.default_rng(5)
    resampled = []
    for _ in range(300):
        picks = rng.integers(0, len(made), len(made))
        resampled.append(CHRF().corpus_score([predictions[i] for i in picks], [[references[i] for i in picks]]).score)
    low, high = np.percentile(resampled, [2.5, 97.5])
    ours = score(made, bootstrap=4000)["chrf"]
    assert ours.low is not None
    spread = high - low
    assert ours.low == pytest.approx(low, abs=0.2 * spread)
    assert ours.high == pytest.approx(high, abs=0.2 * spread)


@pytest.mark.parametrize("block", [1, 7 * 13, 2**20])
def test_resamples_are_those_of_one_matrix_whatever_the_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "BLOCK", block)
    statistics = np.random.default_rng(1).random((13, 4))
    draws = np.random.default_rng(5).multinomial(13, np.full(13, 1 / 13), size=100)
    np.testing.assert_allclose(bootstrap_sums(statistics, 100, 5), draws @ statistics, rtol=1e-12)
    low, high = np.percentile((draws @ statistics)[:, 2], [2.5, 97.5])
    assert bootstrap_interval(statistics, lambda sums: sums[:, 2], 100, 5) == pytest.approx((low, high))


def test_an_interval_passes_over_resamples_without_a_score() -> None:
    assert percentile_interval(np.array([2.0, np.nan, 4.0]), 0.0) == pytest.approx((2.05, 3.95))
    assert percentile_interval(np.array([np.nan]), 7.0) == (7.0, 7.0)


def test_scores_repeat_with_a_seed_and_only_intervals_depend_on_it() -> None:
    made = answers(40)
    first, again, other = score(made, seed=1), score(made, seed=1), score(made, seed=2)
    assert first == again
    assert first["bleu"].value == other["bleu"].value
    assert (first["bleu"].low, first["bleu"].high) != (other["bleu"].low, other["bleu"].high)


def test_signatures_name_version_and_interval() -> None:
    scores = score(answers(10), bootstrap=150, seed=3)
    assert "tok:13a" in scores["bleu"].signature
    assert "version:2." in scores["bleu"].signature
    assert "nc:6" in scores["chrf"].signature
    assert "stemmer:porter" in scores["rougeL"].signature
    assert "version:rouge_score 0." in scores["rougeL"].signature
    assert scores["exact_match"].signature.endswith("n:10|ci95:wilson")
    assert scores["bleu"].signature.endswith("n:10|ci95:bootstrap(150,seed=3)")


def test_nothing_right_still_has_an_interval() -> None:
    made = [Answer(str(i), "seizure", "fever") for i in range(300)]
    exact = score(made, bootstrap=100)["exact_match"]
    assert (exact.value, exact.low) == (0.0, 0.0)
    assert exact.high == pytest.approx(100 * 1.959963984540054**2 / (300 + 1.959963984540054**2))
    assert wilson_interval(300, 300)[1] == 1.0
    # A published value: 15 of 148 gives 0.0624 to 0.1605 (Newcombe 1998, table I, method 3).
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)


def test_edge_cases() -> None:
    with pytest.raises(FtlabError, match="no predictions"):
        score([])
    empty = score([Answer("a", "seizure", "")], bootstrap=100)
    assert {name: s.value for name, s in empty.items()} == dict.fromkeys(METRICS, 0.0)
    one = score([Answer("a", "an abnormal slow heart rate", "An abnormal slow heart rate")], bootstrap=100)
    assert one["exact_match"].value == one["token_f1"].value == one["rougeL"].value == 100.0
    assert 0 < one["bleu"].value < 100
    mixed = score([Answer("a", "seizure", ""), Answer("b", "slow heart", "slow heart")], bootstrap=100)
    assert mixed["exact_match"].value == 50.0
    assert all(math.isfinite(v) for s in mixed.values() for v in (s.value, s.low, s.high))


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ('"Seizure."', "seizure", True),
        ("  Slow\n heart  rate ", "slow heart rate", True),
        ("STRASSE", "straße", True),
        ("e\u0301pilepsie", "\u00e9pilepsie", True),
        ("**Fever**", "fever", True),
        ("non-small", "non small", False),
        ("heart rate", "heartrate", False),
        ("type 2", "type 1", False),
        ("... !", "", True),
    ],
)
def test_normalise_answer(one: str, other: str, equal: bool) -> None:
    assert (normalise_answer(one) == normalise_answer(other)) is equal


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("the cat sat", "a cat sat", 1.0),  # articles do not count
        ("cat cat", "cat", 2 / 3),  # a word counts as often as both have it
        ("Cat, sat!", "cat sat down", 0.8),
        ("", "", 1.0),
        ("the", "cat", 0.0),
    ],
)
def test_token_f1(prediction: str, reference: str, expected: float) -> None:
    assert statistics_of("token_f1", [prediction], [reference]).score == pytest.approx(100 * expected)


def test_a_thousand_resamples_of_four_hundred_answers_take_under_three_seconds() -> None:
    made = answers(400)
    score(made[:2], bootstrap=100)  # the imports
    start = time.process_time()
    score(made, bootstrap=1000)
    assert time.process_time() - start < 3.0


def test_paired_difference() -> None:
    base, final = answers(200, 1, right=0.05), answers(200, 1, right=0.6)
    final = [Answer(b.id, b.reference, b.reference if i % 3 == 0 else b.prediction) for i, b in enumerate(base)]
    for metric in METRICS:
        change = paired_difference(base, list(reversed(final)), metric)  # the order does not matter
        expected = score(final, bootstrap=100)[metric].value - score(base, bootstrap=100)[metric].value
        assert change.difference == pytest.approx(expected)
        assert 0 < change.low < change.difference < change.high
        assert change.p < 0.01
        back = paired_difference(final, base, metric)
        assert back.difference == pytest.approx(-expected)
        assert back.high < 0
        same = paired_difference(base, base, metric)
        assert (same.difference, same.p) == (0.0, 1.0)
        assert same.low <= 0 <= same.high
    noise = [Answer(a.id, a.reference, b.prediction) for a, b in zip(base, reversed(base), strict=True)]
    shuffled = paired_difference(noise, [Answer(a.id, a.reference, "") for a in base], "exact_match")
    assert shuffled.p > 0.05


def test_paired_proportions_against_published_values() -> None:
    # Newcombe 1998 (Statistics in Medicine 17:2635), table II, method 10. There, e, f, g and h count the pairs where
    # both, only the first, only the second and neither succeed, and the difference is first minus second.
    def table(e: int, f: int, g: int, h: int) -> tuple[np.ndarray, np.ndarray]:
        first = np.array([True] * (e + f) + [False] * (g + h))
        second = np.array([True] * e + [False] * f + [True] * g + [False] * h)
        return second, first

    low, high = paired_proportion_interval(*table(36, 12, 2, 0))
    assert (low, high) == pytest.approx((0.0569, 0.3404), abs=5e-5)
    low, high = paired_proportion_interval(*table(0, 0, 0, 300))
    assert low == -high
    assert 0.01 < high < 0.02
    assert exact_mcnemar(*table(0, 9, 1, 5)) == pytest.approx(2 * 11 / 1024)


def test_paired_difference_refuses_lists_that_do_not_match() -> None:
    base = answers(5)
    for other in (base[:4], [], [*base[:4], base[0]], [Answer("x", a.reference, "") for a in base]):
        with pytest.raises(FtlabError, match="not of the same records"):
            paired_difference(base, other, "bleu")
    with pytest.raises(FtlabError, match="different references"):
        paired_difference(base, [Answer(a.id, a.reference + " more", "") for a in base], "bleu")
    with pytest.raises(FtlabError, match="unknown metric 'blue'"):
        paired_difference(base, base, "blue")


def test_the_metric_packages_are_imported_late_and_nothing_is_downloaded() -> None:
    code = """
import sys
import ftlab.evaluation.metrics as metrics
assert not {"sacrebleu", "rouge_score", "nltk"} & set(sys.modules), "imported at start-up"
import socket
def refuse(*a, **k): raise AssertionError("network")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
class P: id = "a"; reference = "running slowly"; prediction = "runs slowly"
assert metrics.score([P()], bootstrap=100)["rouge1"].value > 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
