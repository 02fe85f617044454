"""Metrics of one answer against one reference, as sums that a bootstrap can resample.

Each metric turns N (prediction, reference) pairs into statistics [N, K] in fp64 and a function from their column sums
[..., K] to the score [...] on 0-100. A corpus score of a resample is then that function of the resample's sums.

    exact_match        share of answers that equal the reference after `normalise_answer`
    token_f1           mean over examples of the F1 of shared words (SQuAD, arXiv 1606.05250, its own normalisation)
    bleu               corpus BLEU by sacrebleu's defaults (arXiv 1804.08771): 13a tokens, exponential smoothing
    chrf               corpus chrF2 by sacrebleu's defaults (Popovic 2015)
    rouge1/2/L         mean over examples of the F-measure by rouge_score with Porter stemming (Lin 2004)
"""

from __future__ import annotations

import importlib.metadata
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["METRICS", "Statistics", "normalise_answer", "statistics_of"]

Floats = NDArray[np.float64]

METRICS = ("exact_match", "token_f1", "bleu", "chrf", "rouge1", "rouge2", "rougeL")
ARTICLES = re.compile(r"\b(a|an|the)\b")
NGRAMS = 4  # of BLEU


@dataclass(frozen=True)
class Statistics:
    """A metric on N examples: `rows` [N, K], `value` from column sums to scores on 0-100, and what was computed."""

    rows: Floats
    value: Callable[[Floats], Floats]
    signature: str

    @property
    def score(self) -> float:
        """The score of all examples together."""
        return float(self.value(self.rows.sum(axis=0)[None])[0])


def normalise_answer(text: str) -> str:
    """What exact match compares, in this order:

    1. Unicode NFC, then case folding ("Straße" and "STRASSE" agree);
    2. every run of white space becomes one space;
    3. white space and punctuation (Unicode categories P*) at both ends go, again and again; inside the text they stay:
       `"Seizure."` equals `seizure`, `non-small` differs from `non small`.
    """
    folded = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    start, end = 0, len(folded)
    while start < end and _is_outer(folded[start]):
        start += 1
    while end > start and _is_outer(folded[end - 1]):
        end -= 1
    return folded[start:end]


def _is_outer(character: str) -> bool:
    return character.isspace() or unicodedata.category(character).startswith("P")


def statistics_of(metric: str, predictions: Sequence[str], references: Sequence[str]) -> Statistics:
    """Statistics of one of `METRICS`. sacrebleu and rouge_score take half a second to import, so both wait for this."""
    if metric == "exact_match":
        hits = [float(normalise_answer(p) == normalise_answer(r)) for p, r in zip(predictions, references, strict=True)]
        return _mean(hits, "exact_match|norm:nfc+casefold+space+outer_punct")
    if metric == "token_f1":
        scores = [_token_f1(p, r) for p, r in zip(predictions, references, strict=True)]
        return _mean(scores, "token_f1|norm:squad")
    if metric in ("bleu", "chrf"):
        return _sacrebleu(metric, predictions, references)
    return _rouge(metric, predictions, references)


def _mean(scores: Sequence[float], signature: str) -> Statistics:
    """The mean over examples: K = 2, the score and 1."""
    rows = np.stack([np.asarray(scores, dtype=np.float64), np.ones(len(scores))], axis=1)
    return Statistics(rows, lambda sums: 100.0 * sums[..., 0] / sums[..., 1], signature)


def _squad_words(text: str) -> list[str]:
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return ARTICLES.sub(" ", kept).split()


def _token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of the precision and recall of shared words; two empty texts agree."""
    predicted, expected = _squad_words(prediction), _squad_words(reference)
    if not predicted or not expected:
        return float(predicted == expected)
    shared = sum((Counter(predicted) & Counter(expected)).values())
    return 2.0 * shared / (len(predicted) + len(expected))


def _sacrebleu(metric: str, predictions: Sequence[str], references: Sequence[str]) -> Statistics:
    """Per-example match counts as sacrebleu takes them, and its corpus formula on many sums at once."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    scorer: Any = BLEU(force=True) if metric == "bleu" else CHRF()  # force: no hint about texts that look tokenised
    value = _bleu if metric == "bleu" else _chrf
    # A bootstrap needs the counts of each example, which are not public; so the result is held to the public score.
    rows = np.asarray(scorer._extract_corpus_statistics(list(predictions), [list(references)]), dtype=np.float64)
    official = scorer.corpus_score(list(predictions), [list(references)]).score
    result = Statistics(rows, value, f"{metric}|{scorer.get_signature().format()}")
    if abs(result.score - official) > 1e-6:
        version = importlib.metadata.version("sacrebleu")
        raise RuntimeError(f"{metric}: {result.score} here, {official} by sacrebleu {version}; its counts have changed")
    return result


def _bleu(sums: Floats) -> Floats:
    """Corpus BLEU from [..., 10] sums: lengths of prediction and reference, matched and all n-grams of orders 1 to 4.

        BLEU = BP * exp(mean_n ln p_n),  BP = min(1, exp(1 - reference / prediction))

    An order without a match counts 1 / (2^k total), k the number of such orders so far ("exp" smoothing).
    """
    predicted, expected = sums[..., 0], sums[..., 1]
    matched, total = sums[..., 2 : 2 + NGRAMS], sums[..., 2 + NGRAMS : 2 + 2 * NGRAMS]
    halvings = np.cumsum(matched == 0, axis=-1)
    counted = np.where(matched == 0, 0.5**halvings, matched)
    penalty = np.exp(np.minimum(0.0, 1.0 - expected / np.maximum(predicted, 1.0)))
    score = 100.0 * penalty * np.exp(np.log(counted / np.maximum(total, 1.0)).mean(axis=-1))
    defined = (matched > 0).any(axis=-1) & (total > 0).all(axis=-1)
    return np.where(defined, score, 0.0)


def _chrf(sums: Floats) -> Floats:
    """Corpus chrF2 from [..., 18] sums: n-grams of prediction, of reference and shared, of character orders 1 to 6.

    chrF = (1 + 4) P R / (4 P + R),  P and R averaged over the orders that both sides have
    """
    predicted, expected, shared = sums[..., 0::3], sums[..., 1::3], sums[..., 2::3]
    used = (predicted > 0) & (expected > 0)
    orders = np.maximum(used.sum(axis=-1), 1)
    precision = np.where(used, shared / np.maximum(predicted, 1.0), 0.0).sum(axis=-1) / orders
    recall = np.where(used, shared / np.maximum(expected, 1.0), 0.0).sum(axis=-1) / orders
    denominator = 4.0 * precision + recall
    score: Floats = 100.0 * 5.0 * precision * recall / np.where(denominator > 0, denominator, 1.0)
    return score


def _rouge(metric: str, predictions: Sequence[str], references: Sequence[str]) -> Statistics:
    """Per-example F-measures. rouge_score keeps only ASCII letters and digits; an answer without any scores 0."""
    from rouge_score import rouge_scorer  # type: ignore[import-untyped]  # the package ships no types

    scorer = rouge_scorer.RougeScorer([metric], use_stemmer=True)
    scores = [scorer.score(r, p)[metric].fmeasure for p, r in zip(predictions, references, strict=True)]
    version = importlib.metadata.version("rouge-score")
    return _mean(scores, f"{metric}|measure:f|stemmer:porter|average:mean|version:rouge_score {version}")
