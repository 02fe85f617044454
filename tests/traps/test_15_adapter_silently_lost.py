"""An adapter that is not applied, frozen, wrapped twice, or drawn anew on load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ftlab.config import AdamWConfig, LoRAConfig
from ftlab.errors import FtlabError
from ftlab.methods import make_method
from ftlab.methods.trainable import trainable_parameters
from ftlab.models.llama import LlamaForCausalLM
from ftlab.optim.adamw import build_optimizer
from tests.helpers.training import collate, loss_sum, ragged_examples, tiny_llama

CONFIG = LoRAConfig(rank=4, alpha=8.0)
WEIGHTS = "adapter_model.safetensors"


def loss_of(model: LlamaForCausalLM) -> float:
    with torch.no_grad():
        return float(loss_sum(model.eval(), collate(ragged_examples(4), 4)[0]))


def first_run(folder: Path) -> tuple[float, int]:
    """Train a little and save; the loss and the number of trainable numbers at the end."""
    model = tiny_llama()
    method = make_method(CONFIG, seed=1)
    optimizer = build_optimizer(AdamWConfig(lr=0.02), model, method.apply(model))
    batch = collate(ragged_examples(4), 4)[0]
    for _ in range(5):
        (loss_sum(model.train(), batch) / batch.num_supervised).backward()
        optimizer.step()
        optimizer.zero_grad()
    method.save(model, folder, "file:base")
    return loss_of(model), sum(p.numel() for p in trainable_parameters(model).values())


def continued(folder: Path) -> LlamaForCausalLM:
    model = tiny_llama()
    method = make_method(CONFIG, seed=2)
    method.apply(model)
    method.load(model, folder)
    return model


def lenient(folder: Path) -> LlamaForCausalLM:
    """The mistake: names that do not match (PEFT's, here) are skipped, so the adapter stays as it was drawn."""
    model = tiny_llama()
    make_method(CONFIG, seed=2).apply(model)
    model.load_state_dict(load_file(folder / WEIGHTS), strict=False)
    return model


def frozen(folder: Path) -> LlamaForCausalLM:
    """The mistake: loading for inference, then training goes on with nothing that trains."""
    return continued(folder).requires_grad_(False)


def merged_then_wrapped(folder: Path) -> LlamaForCausalLM:
    """The mistake: a second set of adapters on a base that already holds the first, which is then loaded as well."""
    model = continued(folder)
    method = make_method(CONFIG, seed=3)
    method.merge(model)
    method.merged(model)
    method.apply(model)
    (folder / "base_sample.safetensors").unlink()
    method.load(model, folder)
    return model


def assert_goes_on(load: Callable[[Path], LlamaForCausalLM], folder: Path) -> None:
    loss, count = first_run(folder)
    model = load(folder)
    assert loss_of(model) == loss
    assert sum(p.numel() for p in trainable_parameters(model).values()) == count
    loss_sum(model.train(), collate(ragged_examples(4), 4)[0]).backward()
    assert all(p.grad is not None and p.grad.any() for p in trainable_parameters(model).values())


def test_continuing_starts_from_the_saved_loss(tmp_path: Path) -> None:
    assert_goes_on(continued, tmp_path / "adapter")
    assert first_run(tmp_path / "again")[0] < 0.99 * loss_of(tiny_llama())  # the loss had moved


@pytest.mark.parametrize("broken", [lenient, frozen, merged_then_wrapped])
def test_a_lost_adapter_fails_the_same_assertion(broken: Callable[[Path], LlamaForCausalLM], tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        assert_goes_on(broken, tmp_path / "adapter")


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_loading_is_strict_both_ways(change: str, tmp_path: Path) -> None:
    first_run(tmp_path / "adapter")
    path = tmp_path / "adapter" / WEIGHTS
    tensors = load_file(path)
    if change == "missing":
        name = sorted(tensors)[3]
        del tensors[name]
    else:
        name = "base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"
        tensors[name] = torch.zeros(4, 32)
    save_file(tensors, path)
    with pytest.raises(FtlabError, match=f"{change} {name}"):
        continued(tmp_path / "adapter")


def test_a_second_set_of_adapters_is_refused(tmp_path: Path) -> None:
    first_run(tmp_path / "adapter")
    model = continued(tmp_path / "adapter")
    loss = loss_of(model)
    with pytest.raises(FtlabError, match="already"):
        make_method(CONFIG, seed=3).apply(model)
    assert loss_of(model) == loss


def test_a_model_without_adapters_takes_none(tmp_path: Path) -> None:
    first_run(tmp_path / "adapter")
    with pytest.raises(FtlabError, match="no LoRA adapters"):
        make_method(CONFIG).load(tiny_llama(), tmp_path / "adapter")
