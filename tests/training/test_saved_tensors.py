"""Bytes kept for the backward pass: by hand, and less the more is frozen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ftlab.config import FreezeConfig, FullConfig, LoRAConfig, MethodConfig, PrecisionConfig
from ftlab.methods import make_method
from ftlab.models.noise import Noise, disturb
from ftlab.training.parallel import Ranks, Replica
from ftlab.training.precision import Precision
from ftlab.training.preflight import SavedTensors, preflight
from tests.helpers.training import collate, loss_sum, ragged_examples, tiny_llama


def test_by_hand() -> None:
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False))
    x = torch.randn(5, 8)
    saved = SavedTensors(model)
    with saved.counting():
        loss = model(x).sum()
    # The first product keeps x, ReLU its result, which is what the second product keeps too; no weight counts.
    assert saved.bytes == 4 * (5 * 8 + 5 * 16)
    loss.backward()
    assert model[0].weight.grad is not None

    model[0].requires_grad_(False)
    saved = SavedTensors(model)
    with saved.counting():
        loss = model(x).sum()
    assert saved.bytes == 4 * 5 * 16


def measured(config: MethodConfig, *, recompute: bool = False, blocks: int = 2) -> int:
    model = tiny_llama(blocks=blocks)
    make_method(config, seed=0).apply(model)
    model.checkpoint_blocks = recompute
    precision = Precision(PrecisionConfig(), torch.device("cpu"))
    batch = collate(ragged_examples(8), 8)[0]
    gradients = preflight(Replica(model, loss_sum, Ranks()), batch, precision)
    assert all(parameter.grad is None for parameter in model.parameters())
    return gradients.activations


def test_less_is_kept_the_more_is_frozen() -> None:
    full, lora = measured(FullConfig()), measured(LoRAConfig(rank=2))
    half, top = measured(FreezeConfig(frozen_fraction=0.5)), measured(FreezeConfig(frozen_fraction=1))
    assert 0 < top < half < full
    assert top < lora
    assert 0.35 < (half - top) / (full - top) < 0.65, "half of the blocks keep half"


def test_nothing_is_kept_of_frozen_blocks_below_what_trains() -> None:
    """However many there are."""
    assert measured(FreezeConfig(frozen_fraction=0.5)) == measured(FreezeConfig(frozen_fraction=0.75), blocks=4)


def test_no_block_is_left_out_of_what_is_measured() -> None:
    """Under stochastic depth the last of two blocks is left out of every second pass at random."""
    batch = collate(ragged_examples(8), 8)[0]
    precision = Precision(PrecisionConfig(), torch.device("cpu"))
    for seed in range(8):
        model = tiny_llama()
        make_method(FullConfig(), seed=0).apply(model)
        disturb(model, Noise(depth=0.5))
        torch.manual_seed(seed)
        found = preflight(Replica(model, loss_sum, Ranks()), batch, precision)
        assert not found.silent
        assert found.activations >= measured(FullConfig())
        assert model.noise == Noise(depth=0.5)


@pytest.mark.parametrize("config", [FullConfig(), LoRAConfig(rank=2)], ids=["full", "lora"])
def test_checkpointing_keeps_the_inputs_of_the_blocks(config: MethodConfig) -> None:
    assert measured(config, recompute=True) < measured(config) / 2


def test_checkpointing_keeps_nothing_of_frozen_blocks_below_what_trains() -> None:
    assert measured(FreezeConfig(frozen_fraction=0.5), recompute=True) < measured(FullConfig(), recompute=True)
    top = measured(FreezeConfig(frozen_fraction=1))
    assert measured(FreezeConfig(frozen_fraction=1), recompute=True) == top, "no block is recomputed"
