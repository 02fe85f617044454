"""Loss and generation scores of one split, for training, the final test and the evaluate command alike."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ftlab.config import EvaluationConfig
from ftlab.data.loader import Batch, eval_batches
from ftlab.data.records import Record
from ftlab.data.tokenization import Example
from ftlab.errors import DivergenceError
from ftlab.evaluation.generation import Prediction, predict
from ftlab.evaluation.loss import evaluate_loss
from ftlab.evaluation.metrics import Score, score
from ftlab.models.llama import LlamaForCausalLM
from ftlab.models.tokenizer import Tokenizer

__all__ = ["Measured", "Measurer", "Measures", "Peers", "require_finite"]

EVALUATION_MULTIPLE = 128  # tokens; see collate_rows


class Peers(Protocol):
    """What measuring needs to know of the other ranks."""

    @property
    def rank(self) -> int:
        """This rank's number."""

    @property
    def world(self) -> int:
        """How many ranks there are."""

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks."""


@dataclass(frozen=True)
class Measured:
    """The scores of one split and, if answers were generated or labels chosen, the answers.

    details: what a classifier's report shows besides, in plain types.
    """

    scores: dict[str, Score]
    predictions: list[Prediction]
    details: dict[str, Any] = field(default_factory=dict)

    def values(self) -> dict[str, float]:
        """The scores without their intervals."""
        return {name: score.value for name, score in self.scores.items()}


def require_finite(scores: Mapping[str, float], split: str = "test") -> None:
    """Errors: DivergenceError if a score of the trained model is not finite; perplexity overflows before the loss."""
    broken = [name for name, value in scores.items() if name != "perplexity" and not math.isfinite(value)]
    if broken:
        raise DivergenceError(
            f"the trained model's scores on the {split} split are not finite ({', '.join(broken)}); lower optimizer.lr "
            "or set optimizer.max_grad_norm"
        )


class Measures(Protocol):
    """What scores a model on a split: `Measurer`, or a classifier's `LabelMeasurer`."""

    def measure(
        self,
        model: Any,
        examples: Sequence[Example],
        records: Sequence[Record],
        *,
        bootstrap: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Measured:
        """See `Measurer.measure`."""


@dataclass(frozen=True)
class Measurer:
    """Measures a model as the evaluation group says. Every rank calls it; every rank gets the same result."""

    config: EvaluationConfig
    tokenizer: Tokenizer
    loss_sum: Callable[[nn.Module, Batch], Tensor]
    autocast: Callable[[], contextlib.AbstractContextManager[object]]
    peers: Peers

    def measure(
        self,
        model: LlamaForCausalLM,
        examples: Sequence[Example],
        records: Sequence[Record],
        *,
        bootstrap: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Measured:
        """Loss and perplexity of `examples`; scores of greedy answers to `records`, unless there are none.

        Each of `records` is one of `examples` and is asked with that example's tokens, cut or not. `bootstrap`
        overrides the number of resamples behind the intervals. The random state is left as it was.
        """
        scores: dict[str, Score] = {}
        predictions: list[Prediction] = []
        device = next(model.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), self.autocast():
            if examples:
                batches = eval_batches(
                    examples,
                    self.config.batch_size,
                    self.peers.rank,
                    self.peers.world,
                    pad_id=self.tokenizer.pad_id,
                    multiple=EVALUATION_MULTIPLE,
                )
                sums = evaluate_loss(model, batches, self.loss_sum, self.peers.sum)
                tokens = f"supervised tokens: {sums['tokens']:.0f}"
                for name in ("loss", "perplexity"):
                    scores[name] = Score(sums[name], None, None, tokens)
            if records:
                predictions = predict(
                    model,
                    self.tokenizer,
                    records,
                    {example.id: example.prompt_ids for example in examples},
                    self.config,
                    rank=self.peers.rank,
                    world=self.peers.world,
                    progress=progress,
                )
                scores |= score(predictions, bootstrap=bootstrap or self.config.bootstrap, seed=0)
        return Measured(scores, predictions)
