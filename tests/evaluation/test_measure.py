"""Loss and answers of one split are measured on the same inputs."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence

import pytest

from ftlab.config import EvaluationConfig
from ftlab.data.records import Message, Record
from ftlab.data.templates import ChatTemplate
from ftlab.data.tokenization import encode
from ftlab.errors import DivergenceError
from ftlab.evaluation import generation
from ftlab.evaluation.measure import Measurer, require_finite
from ftlab.losses.cross_entropy import supervised_cross_entropy
from ftlab.models.tokenizer import byte_tokenizer
from ftlab.training.parallel import Ranks
from tests.helpers.models import tiny_llama

TOKENIZER = byte_tokenizer()
TEMPLATE = ChatTemplate.load("model", TOKENIZER)
RECORDS = [
    Record(f"r{n}", (Message("user", f"{n} " + "word " * 10 * n), Message("assistant", f"answer {n}")))
    for n in range(3)
]


def asked_under(max_length: int, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The prompts that reach the model, shortest first, when examples are cut to `max_length` tokens."""
    examples = [encode(record, TEMPLATE, TOKENIZER, max_length, "truncate") for record in RECORDS]
    asked: list[list[int]] = []

    def fake(model: object, prompts: Sequence[Sequence[int]], **options: object) -> list[list[int]]:
        asked.extend(list(prompt) for prompt in prompts)
        return [TOKENIZER.encode("answer 1") for _ in prompts]

    monkeypatch.setattr(generation, "generate", fake)
    loss_sum = functools.partial(supervised_cross_entropy, chunk=16)
    measurer = Measurer(EvaluationConfig(), TOKENIZER, loss_sum, contextlib.nullcontext, Ranks())
    measured = measurer.measure(
        tiny_llama(), [example for example in examples if example is not None], RECORDS, bootstrap=100
    )
    assert measured.values()["exact_match"] == pytest.approx(100 / 3)
    assert [prediction.id for prediction in measured.predictions] == ["r0", "r1", "r2"]
    return sorted(asked, key=len)


def test_a_cut_prompt_is_asked_as_it_was_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [TEMPLATE.prompt_ids(record.messages) for record in RECORDS]
    answer = len(encode(RECORDS[0], TEMPLATE, TOKENIZER, 1000, "error").token_ids) - len(whole[0])  # type: ignore[union-attr]
    asked = asked_under(60, monkeypatch)
    assert len(whole[0]) < 60 - answer < len(whole[1])
    assert asked[0] == whole[0]
    assert all(len(prompt) == 60 - answer for prompt in asked[1:])
    assert [prompt[-20:] for prompt in asked] == [prompt[-20:] for prompt in whole]
    assert asked_under(1000, monkeypatch) == whole


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_a_divergence(value: float) -> None:
    require_finite({"loss": 800.0, "perplexity": math.inf, "accuracy": 0.0})
    with pytest.raises(DivergenceError, match=r"not finite \(loss\); lower optimizer.lr"):
        require_finite({"loss": value, "perplexity": value, "accuracy": 0.0})
