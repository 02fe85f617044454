"""Loss and scores of a classifier on one split, for training, the final test and the evaluate command alike."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftlab.config import EvaluationConfig
from ftlab.data.labelled import LabelledExample, labelled_batches
from ftlab.data.records import Record
from ftlab.data.tokenization import Example
from ftlab.evaluation.classification import Answers, details, score_labels
from ftlab.evaluation.generation import Prediction
from ftlab.evaluation.measure import Measured, Peers
from ftlab.evaluation.metrics import Score
from ftlab.losses.classification import logits_loss
from ftlab.models.generation import evaluating
from ftlab.models.heads import Classifier
from ftlab.models.labels import LabelSet

__all__ = ["LabelMeasurer", "LabelPrediction", "measured_names"]


@dataclass(frozen=True)
class LabelPrediction(Prediction):
    """An answer with the probability of each label, in the order of the label set, or the number."""

    scores: tuple[float, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """A line of predictions/*.jsonl."""
        return asdict(self)


def measured_names(examples: Sequence[Example], labels: LabelSet) -> set[str]:
    """What these texts can measure, whatever is answered: auroc, for one, needs texts with and without a label."""
    targets = np.array([e.target for e in examples if isinstance(e, LabelledExample)], dtype=np.float64)
    answers = Answers(labels.kind, labels.names, np.zeros((len(targets), labels.size)), targets)
    return {"loss", *score_labels(answers, bootstrap=1)}


@dataclass(frozen=True)
class LabelMeasurer:
    """Measures a classifier. Every rank calls it; every rank gets the same result."""

    config: EvaluationConfig
    labels: LabelSet
    pad_id: int
    autocast: Callable[[], contextlib.AbstractContextManager[object]]
    peers: Peers

    def measure(
        self,
        model: Classifier,
        examples: Sequence[Example],
        records: Sequence[Record],
        *,
        bootstrap: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Measured:
        """Loss (without label smoothing), scores and answers; `records` is not needed: an example has its text.

        Scores that are not finite choose no label, so they come without answers.
        """
        texts = [example for example in examples if isinstance(example, LabelledExample)]
        logits = self._logits(model, texts, progress)
        dtype = torch.int64 if self.labels.kind == "single" else torch.float64
        targets = torch.tensor([text.target for text in texts], dtype=dtype)
        loss = float(logits_loss(logits, targets, self.labels.kind)) / len(texts)
        likelihood = {"single": logits.softmax(-1), "multi": logits.sigmoid()}.get(self.labels.kind, logits)
        answers = Answers(self.labels.kind, self.labels.names, likelihood.numpy(), targets.numpy().astype(np.float64))
        resamples = bootstrap or self.config.bootstrap
        scores = {"loss": Score(loss, None, None, f"mean over texts: {len(texts)}")}
        scores |= score_labels(answers, bootstrap=resamples, seed=0)
        predictions: list[Prediction] = []
        rows = zip(texts, likelihood.tolist(), strict=True) if answers.finite else ()
        for text, row in rows:
            answer = self.labels.predicted(row)
            rounded = tuple(round(number, 6) for number in row)
            predictions.append(LabelPrediction(text.id, text.text, text.reference, answer, rounded))
        return Measured(scores, predictions, details(answers, bootstrap=resamples, seed=0))

    def _logits(
        self, model: Classifier, texts: Sequence[Example], progress: Callable[[int, int], None] | None
    ) -> Tensor:
        """[N, C] in fp64 on the CPU, on every rank: each fills in its own texts, and the sum has them all."""
        device = next(model.parameters()).device
        found = torch.zeros(len(texts), self.labels.size, dtype=torch.float64, device=device)
        done = 0
        own = len(range(self.peers.rank, len(texts), self.peers.world))
        batches = labelled_batches(
            texts, self.labels, self.config.batch_size, self.pad_id, rank=self.peers.rank, world=self.peers.world
        )
        with evaluating(model), torch.inference_mode(), self.autocast():
            for places, batch in batches:
                found[torch.tensor(places, device=device)] = model(batch.to(device)).double()
                done += len(places)
                if progress is not None:
                    progress(done, own)
        return self.peers.sum(found).cpu()
