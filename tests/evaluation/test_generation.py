from __future__ import annotations

import pytest

from ftlab.config import EvaluationConfig
from ftlab.data.records import Message, Record
from ftlab.data.templates import ChatTemplate
from ftlab.evaluation import generation
from ftlab.evaluation.generation import Prediction, predict, prompt_text
from ftlab.models.tokenizer import byte_tokenizer
from tests.helpers.models import tiny_llama

SETTINGS = EvaluationConfig(generate_batch_size=3, max_new_tokens=6)


def prompts_of(given: list[Record]) -> dict[str, list[int]]:
    template = ChatTemplate.load("model", byte_tokenizer())
    return {record.id: template.prompt_ids(record.messages) for record in given}


def records(count: int = 7) -> list[Record]:
    """Prompts of very different lengths, not in order of length."""
    texts = ["slow " * (3 * i % 7) + f"heart {i}" for i in range(count)]
    return [
        Record(f"r{i}", (Message("user", text), Message("assistant", f"answer {i}"))) for i, text in enumerate(texts)
    ]


def test_predictions_do_not_depend_on_batches_and_keep_the_order() -> None:
    model, tokenizer, prompts = tiny_llama(), byte_tokenizer(), prompts_of(records())
    alone = [predict(model, tokenizer, [record], prompts, SETTINGS)[0] for record in records()]
    assert [p.id for p in alone] == [f"r{i}" for i in range(7)]
    assert alone[2].prompt == records()[2].messages[0].content
    assert alone[2].reference == "answer 2"
    assert len({p.prediction for p in alone}) > 1
    for size in (1, 2, 3, 50):
        settings = EvaluationConfig(generate_batch_size=size, max_new_tokens=6)
        assert predict(model, tokenizer, records(), prompts, settings) == alone


def test_like_lengths_share_a_batch_longest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    lengths: list[list[int]] = []

    def fake(model: object, prompts: list[list[int]], **options: object) -> list[list[int]]:
        lengths.append([len(prompt) for prompt in prompts])
        assert options == {"max_new_tokens": 6, "stop_ids": tokenizer.stop_ids, "pad_id": tokenizer.pad_id}
        return [tokenizer.encode("fever") for _ in prompts]

    monkeypatch.setattr(generation, "generate", fake)
    shown: list[tuple[int, int]] = []
    model = tiny_llama()
    made = predict(
        model,
        tokenizer,
        records(),
        prompts_of(records()),
        SETTINGS,
        progress=lambda done, of: shown.append((done, of)),
    )
    assert [p.prediction for p in made] == ["fever"] * 7
    flat = [length for batch in lengths for length in batch]
    assert flat == sorted(flat, reverse=True)
    assert [len(batch) for batch in lengths] == [3, 3, 1]
    assert shown == [(3, 7), (6, 7), (7, 7)]


def test_no_records_is_no_predictions() -> None:
    assert predict(tiny_llama(), byte_tokenizer(), [], {}, SETTINGS) == []


def test_prompt_text() -> None:
    system, user, answer = Message("system", "be brief"), Message("user", "why?"), Message("assistant", "because")
    assert prompt_text([system, user]) == "why?"
    assert prompt_text([user, answer, user]) == "user: why?\nassistant: because\nuser: why?"
    assert Prediction("a", "p", "r", "x").as_dict() == {"id": "a", "prompt": "p", "reference": "r", "prediction": "x"}
