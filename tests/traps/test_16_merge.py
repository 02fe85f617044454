"""A merge that loses precision, is done twice, cannot be undone, or goes into another base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ftlab.config import LoRAConfig
from ftlab.errors import FtlabError
from ftlab.methods import Method, make_method
from ftlab.methods.lora import lora_leaves
from ftlab.models.llama import LlamaForCausalLM
from tests.helpers.models import random_ids, tiny_llama

CONFIG = LoRAConfig(rank=4, alpha=8.0)
IDS = random_ids(2, 10)


def adapted(dtype: torch.dtype = torch.float32, size: float = 0.05) -> tuple[LlamaForCausalLM, Method]:
    """A model whose base weights are in `dtype`, with adapters that do something."""
    model = tiny_llama()
    method = make_method(CONFIG, seed=0)
    method.apply(model)
    torch.manual_seed(0)
    for leaf in lora_leaves(model).values():
        nn.init.normal_(leaf.lora_B, std=size)
        leaf.weight.data = leaf.weight.data.to(dtype)
    return model.eval(), method


def logits(model: LlamaForCausalLM) -> Tensor:
    with torch.no_grad():
        return model(IDS)


def base_bits(model: LlamaForCausalLM) -> dict[str, Tensor]:
    return {name: leaf.weight.detach().clone() for name, leaf in lora_leaves(model).items()}


def merge_in_bf16(model: LlamaForCausalLM) -> None:
    """The mistake: the update is rounded to bf16 before it is added."""
    for leaf in lora_leaves(model).values():
        delta = leaf.scale * (leaf.lora_B.bfloat16() @ leaf.lora_A.bfloat16())
        leaf.weight.data += delta.float()
        leaf.enabled = False


def assert_same_logits(merged: Tensor, adapter: Tensor) -> None:
    assert float((merged - adapter).abs().max()) <= 1e-4


def test_fp32_merge() -> None:
    model, method = adapted()
    before = logits(model)
    drift = method.merge(model)
    assert_same_logits(logits(model), before)
    assert drift.keys() == lora_leaves(model).keys()
    assert max(drift.values()) < 1e-5


def test_merging_a_rounded_update_fails_the_same_assertion() -> None:
    model, _ = adapted()
    before = logits(model)
    merge_in_bf16(model)
    with pytest.raises(AssertionError):
        assert_same_logits(logits(model), before)


@pytest.mark.parametrize("size", [1e-4, 0.05])
def test_what_bf16_storage_loses_is_measured(size: float) -> None:
    model, method = adapted(torch.bfloat16, size)
    expected = {}
    for name, leaf in lora_leaves(model).items():
        delta = leaf.scale * leaf.lora_B.detach() @ leaf.lora_A.detach()
        exact = leaf.weight.detach().float() + delta
        expected[name] = float((exact.bfloat16().float() - exact).norm() / delta.norm())
    assert method.merge(model) == pytest.approx(expected, rel=1e-4)
    # A small update drowns in the rounding of the weights, a large one survives it.
    assert min(expected.values()) > 0.5 if size == 1e-4 else max(expected.values()) < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerge_gives_the_base_back_bit_for_bit(dtype: torch.dtype) -> None:
    model, method = adapted(dtype)
    before = base_bits(model)
    method.merge(model)
    after = base_bits(model)
    assert not any(torch.equal(after[name], before[name]) for name in before)
    method.unmerge(model)
    after = base_bits(model)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_subtracting_the_update_would_not(dtype: torch.dtype) -> None:
    model, method = adapted(dtype)
    before = base_bits(model)
    method.merge(model)
    subtracted = {
        name: (leaf.weight.float() - leaf.delta_weight()).to(dtype) for name, leaf in lora_leaves(model).items()
    }
    assert not all(torch.equal(subtracted[name], before[name]) for name in before)


def test_merging_twice_is_refused_and_changes_nothing() -> None:
    model, method = adapted()
    method.merge(model)
    once = base_bits(model)
    with pytest.raises(FtlabError, match="already merged"):
        method.merge(model)
    assert all(torch.equal(weight, once[name]) for name, weight in base_bits(model).items())


def load_onto(base: LlamaForCausalLM, folder: Path) -> None:
    method = make_method(CONFIG, seed=1)
    method.apply(base)
    method.load(base, folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_base_in_another_dtype_is_known(dtype: torch.dtype, tmp_path: Path) -> None:
    model, method = adapted()
    method.save(model, tmp_path / "adapter", "file:base")
    load_onto(tiny_llama().to(dtype), tmp_path / "adapter")


def test_another_base_is_refused(tmp_path: Path) -> None:
    model, method = adapted()
    method.save(model, tmp_path / "adapter", "file:base")
    with pytest.raises(FtlabError, match="trained on other base weights"):
        load_onto(tiny_llama(seed=1), tmp_path / "adapter")
    method.merge(model)  # the base that holds the update already is another base too
    with pytest.raises(FtlabError, match="trained on other base weights"):
        load_onto(method.merged(model), tmp_path / "adapter")
