"""A tied head that drifts from its embedding, is saved twice, or comes back untied."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ftlab.config import AdamWConfig, FullConfig
from ftlab.methods import make_method
from ftlab.models.llama import LlamaForCausalLM
from ftlab.models.loading import load_model
from ftlab.optim.adamw import build_optimizer
from tests.helpers.training import collate, loss_sum, ragged_examples, tiny_llama


def train(model: LlamaForCausalLM, steps: int = 3) -> None:
    method = make_method(FullConfig())
    optimizer = build_optimizer(AdamWConfig(lr=0.02), model, method.apply(model))
    batch = collate(ragged_examples(4), 4)[0]
    for _ in range(steps):
        (loss_sum(model.train(), batch) / batch.num_supervised).backward()
        optimizer.step()
        optimizer.zero_grad()


def untie(model: LlamaForCausalLM) -> None:
    """The mistake: the head gets a copy of its own while the configuration still says tied."""
    vocabulary, width = model.head_weight.shape
    model.lm_head = nn.Linear(width, vocabulary, bias=False)
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight.data)


def assert_one_tensor(model: LlamaForCausalLM) -> None:
    embedding, head = model.model.embed_tokens.weight, model.head_weight
    assert head.data_ptr() == embedding.data_ptr()
    assert torch.equal(head, embedding)
    assert sum(p.shape == embedding.shape for p in model.parameters()) == 1


def test_trained_and_reloaded_they_are_still_one(tmp_path: Path) -> None:
    model = tiny_llama()
    train(model)
    assert_one_tensor(model)
    trained = model.head_weight.detach().clone()
    assert not torch.equal(trained, tiny_llama().head_weight)

    make_method(FullConfig()).save(model, tmp_path / "model", "file:base")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")
    again = load_model(tmp_path / "model", dtype=torch.float32, device="cpu")
    assert_one_tensor(again)
    assert torch.equal(again.head_weight, trained)

    method = make_method(FullConfig())
    filled = tiny_llama(seed=1)
    method.apply(filled)
    method.load(filled, tmp_path / "model")
    assert_one_tensor(filled)
    assert torch.equal(filled.head_weight, trained)


def test_an_untied_copy_fails_the_same_assertion() -> None:
    model = tiny_llama()
    untie(model)
    train(model)
    with pytest.raises(AssertionError):
        assert_one_tensor(model)


def test_both_uses_reach_the_one_gradient() -> None:
    """The gradient of the tied tensor is the sum of what the embedding and the head would get apart."""
    tied, apart = tiny_llama(), tiny_llama()
    untie(apart)
    batch = collate(ragged_examples(4), 4)[0]
    loss_sum(tied, batch).backward()
    loss_sum(apart, batch).backward()
    assert apart.lm_head is not None
    parts = [apart.model.embed_tokens.weight.grad, apart.lm_head.weight.grad]
    assert all(part is not None and part.any() for part in parts)
    torch.testing.assert_close(tied.head_weight.grad, parts[0] + parts[1])


def test_a_frozen_embedding_freezes_the_tied_head() -> None:
    model = tiny_llama()
    make_method(FullConfig(train_embeddings=False)).apply(model)
    assert not model.head_weight.requires_grad
    loss_sum(model, collate(ragged_examples(4), 4)[0]).backward()
    assert model.head_weight.grad is None
