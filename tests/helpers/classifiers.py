"""Tiny classifiers and labelled examples for tests."""

from __future__ import annotations

import random
from typing import Any

import torch

from ftlab.data.labelled import LabelledBatch, LabelledExample, collate_labelled
from ftlab.models.bert import BertConfig, random_bert
from ftlab.models.heads import BertClassifier, Head, LlamaClassifier
from ftlab.models.labels import LabelSet
from tests.helpers.models import tiny_llama

LABELS = LabelSet("single", ("heart", "kidney", "skin"))
MULTI = LabelSet("multi", LABELS.names)
NUMBER = LabelSet("regression", ())


def tiny_bert_classifier(labels: LabelSet = LABELS, pooling: str = "mean", seed: int = 0) -> BertClassifier:
    config = BertConfig(61, 32, 48, 2, 4, max_position_embeddings=40, initializer_range=0.3)
    return BertClassifier(random_bert(config, seed, pooler=pooling == "pooler"), Head(labels, pooling, seed=seed))


def tiny_llama_classifier(labels: LabelSet = LABELS, pooling: str = "last", **changes: Any) -> LlamaClassifier:
    return LlamaClassifier(tiny_llama(vocab_size=61, **changes), Head(labels, pooling))


def texts(labels: LabelSet = LABELS, count: int = 6, seed: int = 0) -> list[LabelledExample]:
    """Texts of 1 to 12 tokens, the second half of each in the second segment."""
    numbers = random.Random(seed)
    found = []
    for index in range(count):
        length = numbers.randint(1, 12)
        ids = [numbers.randrange(2, 61) for _ in range(length)]
        types = [int(2 * position >= length) for position in range(length)]
        target: Any = index % 3
        if labels.kind == "multi":
            target = tuple(float(numbers.random() < 0.5) for _ in labels.names)
        if labels.kind == "regression":
            target = numbers.uniform(-2, 2)
        found.append(LabelledExample(f"text-{index}", ids, [False] * length, False, types, target, f"words {index}"))
    return found


def batch_of(examples: list[LabelledExample], labels: LabelSet = LABELS, multiple: int = 1) -> LabelledBatch:
    return collate_labelled(examples, labels, pad_id=0, multiple=multiple)


def shake(model: torch.nn.Module) -> None:
    """Move every parameter that trains, so that nothing stands at its first value."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.empty(parameter.shape).normal_(0, 0.1, generator=generator))
