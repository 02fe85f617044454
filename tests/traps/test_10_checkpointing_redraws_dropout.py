"""Activation checkpointing runs the forward twice; the second dropout mask must be the first one again."""

from __future__ import annotations

import pytest
import torch

from ftlab.config import LoRAConfig
from ftlab.methods import make_method
from ftlab.models import llama
from tests.helpers.training import collate, gradients, loss_sum, ragged_examples, tiny_llama


def run(checkpointing: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    model = tiny_llama()
    make_method(LoRAConfig(rank=4, dropout=0.3), seed=0).apply(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    model.checkpoint_blocks = checkpointing
    model.train()
    torch.manual_seed(5)
    loss_sum(model, collate(ragged_examples(8), 8)[0]).backward()
    return gradients(model), torch.get_rng_state()


def assert_equal(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == reference.keys()
    for name, expected in reference.items():
        assert torch.equal(ours[name], expected), name


def test_gradients_and_random_state_are_bit_equal() -> None:
    plain, state_plain = run(False)
    checkpointed, state_checkpointed = run(True)
    assert_equal(checkpointed, plain)
    assert torch.equal(state_plain, state_checkpointed)


def test_without_the_random_state_the_same_assertion_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = run(False)
    real = llama.checkpoint

    def forgetful(function, *args, **kwargs):  # type: ignore[no-untyped-def]
        return real(function, *args, **{**kwargs, "preserve_rng_state": False})

    monkeypatch.setattr(llama, "checkpoint", forgetful)
    broken, _ = run(True)
    with pytest.raises(AssertionError):
        assert_equal(broken, plain)
