"""Activations below the lowest layer that trains: kept, exact, and the same whatever they were batched with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ftlab.compose import compose
from ftlab.config import LoRAConfig
from ftlab.errors import FtlabError
from ftlab.losses.cross_entropy import supervised_cross_entropy
from ftlab.methods import make_method
from ftlab.models.activation_cache import ActivationCache
from ftlab.models.llama import LlamaForCausalLM
from ftlab.session import train
from tests.helpers.training import collate, gradients, ragged_examples, tiny_llama

UPPER = [r"layers\.1\..*_proj"]


def upper_model(dropout: float = 0.0) -> LlamaForCausalLM:
    model = tiny_llama()
    make_method(LoRAConfig(rank=4, alpha=8.0, dropout=dropout, targets=UPPER), seed=0).apply(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def loss_and_gradients(model: LlamaForCausalLM, **changes: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    batches = collate(ragged_examples(6), 3)
    loss = torch.stack([supervised_cross_entropy(model, batch, 16, **changes) for batch in batches]).sum()
    loss.backward()
    return loss.detach(), gradients(model)


def test_equals_the_model_itself() -> None:
    model = upper_model()
    plain, plain_gradients = loss_and_gradients(model)
    cache = ActivationCache(model, 1 << 20)
    for epoch in range(2):
        loss, found = loss_and_gradients(model, hidden_states=cache.hidden_states)
        torch.testing.assert_close(loss, plain)
        assert found.keys() == plain_gradients.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, plain_gradients[name], msg=name)
        assert (cache.hits > 0) == (epoch > 0)
    assert cache.hits == cache.misses


def test_what_is_kept_does_not_depend_on_the_batch() -> None:
    """Alone, in a batch, kept or computed again: bit for bit the same."""
    model = upper_model()
    examples = ragged_examples(6)
    whole, nothing = ActivationCache(model, 1 << 20), ActivationCache(model, 0)
    first = [supervised_cross_entropy(model, b, 16, whole.hidden_states) for b in collate(examples, 3)]
    again = [supervised_cross_entropy(model, b, 16, nothing.hidden_states) for b in collate(examples, 3)]
    kept = [supervised_cross_entropy(model, b, 16, whole.hidden_states) for b in collate(examples, 3)]
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, again, kept, strict=True))
    assert nothing.bytes == 0
    assert nothing.summary()["documents"] == 0


def test_memory_is_bounded() -> None:
    model = upper_model()
    cache = ActivationCache(model, 4000)
    loss_and_gradients(model, hidden_states=cache.hidden_states)
    assert 0 < cache.bytes <= 4000


def test_a_cache_that_forgets_the_positions_is_noticed() -> None:
    """The negative case: streams in another order than the documents give another loss."""
    model = upper_model()

    class Mixed(ActivationCache):
        def _stream(self, model: LlamaForCausalLM, ids_T: torch.Tensor) -> torch.Tensor:
            return super()._stream(model, ids_T).flip(0)

    plain, _ = loss_and_gradients(model)
    loss, _ = loss_and_gradients(model, hidden_states=Mixed(model, 1 << 20).hidden_states)
    assert abs(float(loss - plain)) > 1e-3


@pytest.mark.parametrize("targets", [["q_proj"], [r"layers\.0\.mlp\.up_proj"]])
def test_nothing_to_keep_is_refused(targets: list[str]) -> None:
    model = tiny_llama()
    make_method(LoRAConfig(rank=2, targets=targets), seed=0).apply(model)
    with pytest.raises(FtlabError, match="activation_cache_gib"):
        ActivationCache(model, 1 << 20)
    with pytest.raises(FtlabError, match="activation_cache_gib"):
        ActivationCache(tiny_llama(), 1 << 20)  # the embedding trains


def test_dropout_below_is_random_so_it_ends_the_frozen_part() -> None:
    model = upper_model(dropout=0.5)
    assert model.frozen_depth() == 1
    model.model.layers[0].dropout_p = 0.1  # type: ignore[assignment]
    assert model.frozen_depth() == 0


def test_a_resumed_run_is_bit_equal(tmp_path: Path) -> None:
    """The cache is not part of a checkpoint: what is computed again after a resume must be what was kept before."""
    common = [
        *("model=tiny_random", "data=capitals", "data.template=plain", "data.limit_train=12", "data.batch_size=3"),
        *("data.micro_batch_size=3", "data.packing=false", "method=lora", r"method.targets=['layers\.1\..*_proj']"),
        *("training.epochs=3", "training.activation_cache_gib=0.1", "training.preflight=false", "evaluation=none"),
        *("checkpoint.every_steps=5", "checkpoint.keep_last=9", "tracking=disabled", "optimizer.lr=1e-2"),
    ]
    assert train(*compose([*common, f"run_dir={tmp_path / 'whole'}"])) == 0
    middle = tmp_path / "whole" / "checkpoints" / "step-00000005"
    assert train(*compose([*common, f"run_dir={tmp_path / 'resumed'}", f"resume={middle}"])) == 0
    weights = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "resumed")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    kept = json.loads((tmp_path / "whole" / "run.json").read_text("utf-8"))["activation_cache"]
    assert kept["layer"] == 1
    assert kept["hits"] > kept["misses"] >= 12
