"""A model learns to stop, also where EOS pads: labels are masked by position, never by id."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ftlab.config import DataConfig
from ftlab.data.loader import IGNORE, Batch, RowLoader
from ftlab.data.records import Message, Record
from ftlab.data.templates import ChatTemplate
from ftlab.data.tokenization import encode_all
from ftlab.models.generation import generate
from ftlab.models.llama import LlamaConfig
from ftlab.models.loading import random_llama
from tests.data.tokenizers_for_tests import merging_tokenizer

TOKENIZER = merging_tokenizer(pad_is_eos=True)
TEMPLATE = ChatTemplate.load("plain", TOKENIZER)
RECORDS = [
    Record(f"r{index}", (Message("user", question), Message("assistant", answer)))
    for index, (question, answer) in enumerate([("x", "yes"), ("y", "no no")])
]
LIMIT = 12


def batch() -> Batch:
    config = DataConfig(packing=False, pad_rows=True, row_length=32, shuffle=False)
    examples = encode_all(RECORDS, TEMPLATE, TOKENIZER, config)
    return RowLoader(examples, config, seed=0, pad_id=TOKENIZER.pad_id).collate([[0], [1]])


def masked_by_id(whole: Batch) -> Batch:
    """The broken variant: every label that equals the padding id is taken for padding."""
    labels = torch.where(whole.labels == TOKENIZER.pad_id, IGNORE, whole.labels)
    return replace(whole, labels=labels)


def check_labels(whole: Batch) -> None:
    assert TOKENIZER.pad_id == TOKENIZER.eos_id
    for ids, labels in zip(whole.input_ids.tolist(), whole.labels.tolist(), strict=True):
        supervised = [label for label in labels if label != IGNORE]
        assert supervised[-1] == TOKENIZER.eos_id
        assert supervised.count(TOKENIZER.eos_id) == 1
        first_eos = ids.index(TOKENIZER.eos_id)
        assert labels[first_eos:] == [IGNORE] * (len(ids) - first_eos)  # EOS itself and the padding predict nothing


def overfit(whole: Batch) -> list[str]:
    """Answers of a tiny model, trained on the batch until it knows it by heart."""
    config = LlamaConfig(
        vocab_size=TOKENIZER.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        bos_token_id=TOKENIZER.bos_id,
        eos_token_id=TOKENIZER.eos_id,
    )
    model = random_llama(config, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(80):
        logits = model(whole.input_ids, whole.position_ids, whole.documents)
        loss = F.cross_entropy(logits.flatten(0, 1), whole.labels.flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    prompts = [TEMPLATE.prompt_ids(record.messages) for record in RECORDS]
    answers = generate(model, prompts, max_new_tokens=LIMIT, stop_ids=TOKENIZER.stop_ids, pad_id=TOKENIZER.pad_id)
    return [TOKENIZER.decode(answer) for answer in answers]


def check_answers(answers: list[str]) -> None:
    assert answers == [record.reference for record in RECORDS]


def test_the_end_of_turn_is_the_last_label() -> None:
    check_labels(batch())
    with pytest.raises(AssertionError):
        check_labels(masked_by_id(batch()))


def test_a_trained_model_stops() -> None:
    check_answers(overfit(batch()))


def test_masked_by_id_it_never_stops() -> None:
    with pytest.raises(AssertionError):
        check_answers(overfit(masked_by_id(batch())))
