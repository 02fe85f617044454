"""Evaluation averaged by batch or by rank, and samplers that repeat examples to make shards even.

Seven ragged examples over two ranks in batches of 1, 3 and 8 must give the numbers of one process that looks at one
example at a time.
"""

from __future__ import annotations

import functools
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from ftlab.config import EvaluationConfig
from ftlab.data.loader import collate_rows, eval_batches
from ftlab.data.records import Message, Record
from ftlab.data.templates import ChatTemplate
from ftlab.data.tokenization import Example
from ftlab.evaluation.generation import Prediction, predict
from ftlab.evaluation.loss import evaluate_loss
from ftlab.evaluation.metrics import score
from ftlab.losses.cross_entropy import supervised_cross_entropy
from ftlab.models.tokenizer import byte_tokenizer
from ftlab.training.parallel import Ranks
from tests.helpers.models import tiny_llama
from tests.helpers.training import run_ranks

BATCH_SIZES = (1, 3, 8)
SPLIT = [Example(f"e{i}", list(range(50, 55 + 4 * i)), [j > 2 for j in range(5 + 4 * i)]) for i in range(7)]
loss_sum = functools.partial(supervised_cross_entropy, chunk=16)


def prompts_of(given: list[Record]) -> dict[str, list[int]]:
    template = ChatTemplate.load("model", byte_tokenizer())
    return {record.id: template.prompt_ids(record.messages) for record in given}


def records() -> list[Record]:
    """For every other record the reference is what the model says by itself, so that there is something to count."""
    tokenizer, model = byte_tokenizer(), tiny_llama()
    asked = [Record(f"r{i}", (Message("user", "ab " * i), Message("assistant", ""))) for i in range(1, 8)]
    prompts, settings = prompts_of(asked), EvaluationConfig(max_new_tokens=6)
    said = [predict(model, tokenizer, [record], prompts, settings)[0] for record in asked]
    references = [p.prediction if i % 2 else f"x y {p.prediction} z" for i, p in enumerate(said)]
    return [
        Record(record.id, (record.messages[0], Message("assistant", reference)))
        for record, reference in zip(asked, references, strict=True)
    ]


def scores_of(predictions: list[Prediction]) -> dict[str, float]:
    return {name: result.value for name, result in score(predictions, bootstrap=100).items()}


def _evaluate(ranks: Ranks, folder: Path) -> None:
    model, tokenizer, asked = tiny_llama(), byte_tokenizer(), records()
    prompts = prompts_of(asked)
    found: dict[str, Any] = {}
    for size in BATCH_SIZES:
        batches = eval_batches(SPLIT, size, ranks.rank, ranks.world, pad_id=258)
        settings = EvaluationConfig(generate_batch_size=size, max_new_tokens=6)
        predictions = predict(model, tokenizer, asked, prompts, settings, rank=ranks.rank, world=ranks.world)
        found[str(size)] = {
            "loss": evaluate_loss(model, batches, loss_sum, ranks.sum),
            "scores": scores_of(predictions),
            "ids": [p.id for p in predictions],
        }
    found["failure"] = failure_on_one_rank(ranks)
    (folder / f"{ranks.rank}.json").write_text(json.dumps(found))


def failure_on_one_rank(ranks: Ranks) -> str:
    """What each rank raises when only rank 1 fails to generate."""
    tokenizer = byte_tokenizer()

    def interrupt(done: int, total: int) -> None:
        if ranks.rank == 1:
            raise MemoryError("no room")

    asked, settings = records(), EvaluationConfig(generate_batch_size=1, max_new_tokens=2)
    prompts = prompts_of(asked)
    try:
        predict(tiny_llama(), tokenizer, asked, prompts, settings, rank=ranks.rank, world=2, progress=interrupt)
    except Exception as error:
        return str(error)
    return "nothing"


def one_by_one() -> tuple[dict[str, float], dict[str, float]]:
    """Loss and scores by one process that looks at each example by itself."""
    model, tokenizer, asked = tiny_llama(), byte_tokenizer(), records()
    prompts, settings = prompts_of(asked), EvaluationConfig(max_new_tokens=6)
    sums = [float(loss_sum(model, collate_rows([[example]], 258)).detach()) for example in SPLIT]
    tokens = sum(sum(example.supervised) for example in SPLIT)
    predictions = [predict(model, tokenizer, [record], prompts, settings)[0] for record in asked]
    return {"loss": sum(sums) / tokens, "tokens": tokens}, scores_of(predictions)


def assert_same_loss(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found["tokens"] == expected["tokens"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_batches_and_ranks_change_nothing(tmp_path: Path) -> None:
    run_ranks(_evaluate, tmp_path, tmp_path)
    expected_loss, expected_scores = one_by_one()
    assert 0 < expected_scores["exact_match"] < 100
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for size in BATCH_SIZES:
            assert_same_loss(found[str(size)]["loss"], expected_loss)
            assert found[str(size)]["scores"] == pytest.approx(expected_scores)
            assert found[str(size)]["ids"] == [f"r{i}" for i in range(1, 8)]  # seven, each once, in order
        assert "rank 1: MemoryError: no room" in found["failure"]  # on both ranks: none waits for the other


def means_of_batches(batch_size: int) -> dict[str, float]:
    """The broken variant: a mean for each batch, then their mean."""
    model = tiny_llama()
    results = [
        evaluate_loss(model, [batch], loss_sum, lambda totals: totals)
        for batch in eval_batches(SPLIT, batch_size, pad_id=258)
    ]
    return {"loss": statistics.mean(r["loss"] for r in results), "tokens": sum(r["tokens"] for r in results)}


def means_of_ranks() -> dict[str, float]:
    """The broken variant: each rank divides by its own tokens, then the ranks are averaged."""
    model = tiny_llama()
    results = [
        evaluate_loss(model, eval_batches(SPLIT, 8, rank, 2, pad_id=258), loss_sum, lambda totals: totals)
        for rank in (0, 1)
    ]
    return {"loss": statistics.mean(r["loss"] for r in results), "tokens": sum(r["tokens"] for r in results)}


def even_shards() -> dict[str, float]:
    """The broken variant: the first example is repeated so that both ranks have four."""
    model, padded, totals = tiny_llama(), [*SPLIT, SPLIT[0]], list[Tensor]()
    for rank in (0, 1):

        def keep(sums: Tensor) -> Tensor:
            totals.append(sums.clone())
            return sum(totals[1:], totals[0])

        result = evaluate_loss(model, eval_batches(padded, 8, rank, 2, pad_id=258), loss_sum, keep)
    return result


BROKEN = [functools.partial(means_of_batches, 1), functools.partial(means_of_batches, 3), means_of_ranks, even_shards]


@pytest.mark.parametrize("broken", BROKEN, ids=["batches of 1", "batches of 3", "ranks", "even shards"])
def test_the_broken_variants_fail_the_same_assertion(broken: Any) -> None:
    expected, _ = one_by_one()
    with pytest.raises(AssertionError):
        assert_same_loss(broken(), expected)


def test_the_loss_assertion_passes_for_one_batch_of_everything() -> None:
    assert_same_loss(means_of_batches(8), one_by_one()[0])
