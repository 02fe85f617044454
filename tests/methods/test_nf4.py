"""QLoRA: the 4-bit format against a plain reference and its definition, what is kept, and whole runs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ftlab import evaluate, export
from ftlab.compose import compose
from ftlab.config import LoRAConfig
from ftlab.errors import ConfigError
from ftlab.methods import make_method, nf4
from ftlab.methods.lora import lora_leaves, quantised_rows
from ftlab.methods.nf4 import BLOCK, LEVELS, NF4Weight, nf4_linear
from ftlab.models.checkpoint import save_safetensors
from ftlab.models.llama import LlamaForCausalLM
from ftlab.models.loading import load_model
from ftlab.operators import TORCH, describe, select
from ftlab.training.preflight import static_memory
from tests.helpers.models import random_ids, tiny_llama
from tests.methods.test_peft_folders import RUN, run
from tests.methods.test_variants import peft_model

IDS = random_ids(2, 11)
SHAPES = [(64, 64), (20, 12), (70, 100), (1, 1), (300, 64)]


def drawn(*shape: int, scale: float = 0.1) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(4))


def plain_round_trip(weight: Tensor) -> Tensor:
    """Block by block, number by number, in fp64."""
    blocks = weight.flatten().double().split(BLOCK)
    largest = torch.stack([block.abs().max() for block in blocks])
    mean = largest.mean()
    magnitudes = torch.cat(
        [
            mean + ((part - mean) / (part - mean).abs().max() * 127).round() / 127 * (part - mean).abs().max()
            if bool((part != mean).any())
            else part
            for part in largest.split(256)
        ]
    )
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    rows = [
        magnitude * levels[(block[:, None] / top - levels).abs().argmin(1)]
        for block, top, magnitude in zip(blocks, largest, magnitudes, strict=True)
    ]
    return torch.cat(rows).view(weight.shape)


def test_the_levels_are_the_quantiles_of_the_paper_s_appendix_e() -> None:
    """Eight positive and seven negative quantiles of a normal distribution, 0 among them, divided by the largest."""
    offset = 0.9677083
    above = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat((above, torch.zeros(1, dtype=torch.float64), below)).sort().values
    torch.testing.assert_close(torch.tensor(LEVELS, dtype=torch.float64), values / values.max(), rtol=0, atol=2e-7)


@pytest.mark.parametrize("at_once", [64, 1 << 20])
@pytest.mark.parametrize("shape", [*SHAPES, (256, 300)])
def test_it_is_the_plain_reference(shape: tuple[int, int], at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4, "_AT_ONCE", at_once)
    weight = drawn(*shape)
    packed = NF4Weight(weight)
    torch.testing.assert_close(packed.dequantise().double(), plain_round_trip(weight), rtol=1e-5, atol=1e-8)
    rows = [packed.dequantise(first, first + 64) for first in range(0, shape[0], 64)]
    assert torch.equal(torch.cat(rows), packed.dequantise())


def test_weights_on_the_levels_come_back_and_zeros_stay_zero() -> None:
    weight = torch.tensor(LEVELS).repeat(8, 4) * 3.0
    torch.testing.assert_close(NF4Weight(weight).dequantise(), weight)
    weight[2:4] = 0
    assert not NF4Weight(weight).dequantise()[2:4].any()
    assert not NF4Weight(torch.zeros(3, 5)).dequantise().any()


def test_the_error_is_below_half_the_widest_gap() -> None:
    weight = drawn(512, 512)
    packed = NF4Weight(weight)
    gap = max(b - a for a, b in itertools.pairwise(LEVELS)) / 2
    largest = weight.view(-1, BLOCK).abs().amax(1)
    error = (packed.dequantise() - weight).view(-1, BLOCK).abs().amax(1)
    assert bool((error <= gap * largest + float((largest - largest.mean()).abs().max()) / 254 + 1e-6).all())
    assert 8 * packed.nbytes / weight.numel() == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), rel=1e-3)


@pytest.mark.parametrize("outlier", [1.0, 3.0, 5.0, 8.0, 20.0])
def test_an_outlier_turns_no_sign_of_the_blocks_beside_it(outlier: float) -> None:
    weight = drawn(64, 256, scale=0.01)
    weight[0, 0] = outlier
    assert bool((NF4Weight(weight).dequantise() * weight >= 0).all())


@pytest.mark.parametrize("at_once", [64, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_product_and_gradient(bias: bool, dtype: torch.dtype, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4, "_AT_ONCE", at_once)
    packed = NF4Weight(drawn(150, 40))
    x = drawn(2, 7, 40, scale=1.0).to(dtype).requires_grad_()
    b = drawn(150, scale=1.0).requires_grad_() if bias else None
    dense = packed.dequantise(dtype=dtype)
    expected = nn.functional.linear(x, dense, None if b is None else b.to(dtype))
    out = nf4_linear(x, packed, b)
    tolerance = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(out, expected, **tolerance)
    upstream = torch.randn_like(out)
    wanted = [x] if b is None else [x, b]
    ours, theirs = (torch.autograd.grad(y, wanted, upstream) for y in (out, expected))
    torch.testing.assert_close(ours, theirs, **tolerance)


def qlora(**changes: Any) -> tuple[LlamaForCausalLM, Any]:
    model = tiny_llama()
    method = make_method(LoRAConfig(**({"rank": 4, "alpha": 8.0, "quantize": "nf4"} | changes)), seed=3)
    method.apply(model)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for leaf in lora_leaves(model).values():
            leaf.lora_B += 0.1 * torch.randn(leaf.lora_B.shape, generator=generator)
    return model, method


def kept_shapes(model: LlamaForCausalLM) -> set[tuple[int, ...]]:
    """The shapes of what a forward pass keeps for the backward pass, either way round; the gradients follow."""
    held: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model.train()(IDS[:, :2]).square().mean()
    loss.backward()
    assert all(leaf.lora_A.grad is not None for leaf in lora_leaves(model).values())
    return {tuple(tensor.shape) for tensor in held} | {tuple(tensor.shape[::-1]) for tensor in held}


def test_nothing_as_large_as_a_weight_is_kept_for_the_backward_pass() -> None:
    plain, _ = qlora(quantize=None)
    weights = {tuple(leaf.weight.shape) for leaf in lora_leaves(plain).values()}
    assert weights <= kept_shapes(plain)  # so would be noticed
    assert not weights & kept_shapes(qlora()[0])


def test_memory_and_the_table_count_the_quantised_weights() -> None:
    model, _ = qlora()
    (row,) = quantised_rows(model)
    linears = [layer.weight.numel() for layer in tiny_llama().modules() if isinstance(layer, nn.Linear)]
    assert (row.tensors, row.count, row.trainable) == (14, sum(linears), False)
    assert row.rule.startswith("weights in NF4, 4.")
    trained = sum(leaf.lora_A.numel() + leaf.lora_B.numel() for leaf in lora_leaves(model).values())
    stayed = sum(p.numel() for p in tiny_llama().parameters()) - sum(linears) + trained
    memory = static_memory(model.parameters(), model.buffers())
    quantised = sum(leaf.packed.nbytes for leaf in lora_leaves(model).values() if leaf.packed is not None)
    assert memory["weights"] == 4 * stayed + quantised
    assert quantised < 5.0 / 8 * sum(linears)
    assert not quantised_rows(tiny_llama())


@pytest.mark.parametrize("kernels", ["auto", "check"])
def test_the_kernel_dequantises_and_torch_does_the_adapters(kernels: str) -> None:
    model, _ = qlora()
    expected = model(IDS)
    operators = select(kernels, torch.device("cpu"))[0]
    model.use(operators)
    found = model(IDS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    found.sum().backward()
    calls = describe(operators)
    assert calls["lora_linears"] == {"torch, for nf4 weights": 14}
    # Forward each of 14 layers, backward all but q, k and v of the lowest block, whose input has no gradient.
    assert calls["nf4_dequantise"] == {"native": 14 + 11}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_products_are_the_same_bits_by_either_path(dtype: torch.dtype) -> None:
    weight = NF4Weight(drawn(130, 70))
    native = select("auto", torch.device("cpu"))[0]
    x = drawn(5, 70, scale=1.0).to(dtype)
    results = []
    for operators in (TORCH, native):
        own = x.clone().requires_grad_()
        y = nf4_linear(own, weight, None, operators)
        y.backward(torch.ones_like(y))
        results.append((y.detach(), own.grad))
    for plain, fused in zip(*results, strict=True):
        assert torch.equal(plain, fused)
    chosen = "torch, for float64 on cpu" if dtype == torch.float64 else "native"
    assert list(describe(native)["nf4_dequantise"]) == [chosen]


def test_peft_computes_the_same_over_the_dequantised_base(tmp_path: Path) -> None:
    model, method = qlora()
    base = tiny_llama()
    for name, leaf in lora_leaves(model).items():
        assert leaf.packed is not None
        base.get_submodule(name).weight.data = leaf.packed.dequantise()
    save_safetensors(base, tmp_path / "base")
    method.save(model, tmp_path / "adapter", str(tmp_path / "base"))
    theirs = peft_model(tmp_path / "base", tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(IDS), theirs(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "words, message",
    [
        (["method.dora=true"], r"method\.dora: it does not go with method\.quantize=nf4"),
        (["method.init=pissa"], r"method\.init: it does not go with"),
        (["kernels=native"], r"kernels: native has no kernel for the adapters"),
        (["training.compile=true"], r"training\.compile: true does not go with"),
        (["method.quantize=int3"], r"method\.quantize: 'int3' is none of nf4"),
    ],
)
def test_what_does_not_go_with_it_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose([*RUN, "method=qlora", *words])


def test_a_run_its_scores_and_its_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ftlab.session.write_report", lambda run_dir: run_dir)
    record = run(tmp_path / "run", "method=qlora", "training.max_steps=20")
    assert any(row["rule"].startswith("weights in NF4, 4.") for row in record["parameters"])
    out = tmp_path / "scores.json"
    assert evaluate.main([f"run={tmp_path / 'run'}", "base=also", f"out={out}"]) == 0
    scores = json.loads(out.read_text())["scores"]
    for ours, theirs in (("before", "base"), ("after", "final")):
        assert scores[ours]["loss"]["value"] == pytest.approx(record["scores"][theirs]["loss"]["value"], rel=1e-6)
    assert export.main([f"run={tmp_path / 'run'}", f"out={tmp_path / 'model'}"]) == 0
    assert "KL" in capsys.readouterr().out
    assert load_model(tmp_path / "model").config.num_hidden_layers > 0
