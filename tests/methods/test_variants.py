"""PiSSA and DoRA against their papers' equations, PEFT's own implementation, and every path of the operators."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ftlab.config import EWCConfig, LoRAConfig, RegularizerConfig
from ftlab.config.regularizer import L2SPConfig
from ftlab.errors import ConfigError
from ftlab.losses.ewc import EWC
from ftlab.losses.fisher import FILE, FisherFacts, save_fisher
from ftlab.losses.penalties import build_penalties
from ftlab.methods import Method, make_method
from ftlab.methods.lora import lora_leaves
from ftlab.methods.lora_linear import LoRALinear
from ftlab.models.checkpoint import save_safetensors
from ftlab.models.llama import LlamaForCausalLM
from ftlab.operators import TORCH, describe, select
from ftlab.validate import check_variants
from tests.helpers.models import random_ids, tiny_llama

IDS = random_ids(2, 11)
DORA: dict[str, Any] = {"dora": True}
PISSA: dict[str, Any] = {"init": "pissa"}


def moved(changes: dict[str, Any], size: float = 0.1, **model: Any) -> tuple[LlamaForCausalLM, Method]:
    """A tiny model whose adapters are away from their start."""
    llama = tiny_llama(**model)
    method = make_method(LoRAConfig(**({"rank": 4, "alpha": 8.0} | changes)), seed=3)
    method.apply(llama)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for leaf in lora_leaves(llama).values():
            for parameter in leaf.adapter_parameters():
                parameter += size * torch.randn(parameter.shape, generator=generator)
    return llama, method


def layer(rank: int = 3, bias: bool = True, dropout_p: float = 0.0) -> tuple[nn.Linear, LoRALinear]:
    torch.manual_seed(0)
    base = nn.Linear(12, 20, bias=bias)
    leaf = LoRALinear(
        base, rank=rank, alpha=6.0, rslora=False, dropout_p=dropout_p, generator=torch.Generator().manual_seed(1)
    )
    return base, leaf


# --- the equations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, unit", [(torch.float32, 2.0**-24), (torch.bfloat16, 2.0**-8)])
def test_pissa_takes_the_largest_singular_values_and_rounds_once(dtype: torch.dtype, unit: float) -> None:
    _, leaf = layer()
    leaf.weight.data = leaf.weight.data.to(dtype)
    pretrained = leaf.weight.detach().double()
    leaf.take_principal()
    a, b = leaf.lora_A.detach().double(), leaf.lora_B.detach().double()
    values = torch.linalg.svdvals(pretrained)
    torch.testing.assert_close(torch.linalg.svdvals(leaf.scale * b @ a)[:3], values[:3], rtol=1e-5, atol=0)
    assert float(torch.linalg.matrix_norm(leaf.weight.detach().double(), 2)) == pytest.approx(
        float(values[3]), rel=1e-2
    )
    kept = leaf.weight.detach().double()
    error = (kept + leaf.scale * b @ a - pretrained).abs()
    assert bool((error <= 1.001 * unit * kept.abs() + 1e-12).all())
    assert float(error.max()) > 0
    assert float(leaf.delta_squared_norm().detach()) == 0.0


def test_pissa_of_too_high_a_rank_is_refused() -> None:
    _, leaf = layer(rank=13)
    with pytest.raises(ConfigError, match=r"method\.rank: 13 is more than the 12 singular values"):
        leaf.take_principal()


def test_pissa_of_zeros_is_refused() -> None:
    base, leaf = layer()
    nn.init.zeros_(base.weight)
    with pytest.raises(ConfigError, match="a layer of 20 x 12 is all zero"):
        leaf.take_principal()


def test_a_row_of_zeros_stays_one_under_dora() -> None:
    base, leaf = layer()
    base.weight.data[3] = 0
    x = torch.randn(5, 12)
    expected = base(x)
    leaf.add_magnitude()
    assert torch.equal(leaf(x), expected)
    optimizer = torch.optim.AdamW(leaf.adapter_parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (leaf(x).square().sum() + leaf.delta_squared_norm()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in leaf.adapter_parameters())
        optimizer.step()
    moved = (leaf.delta_weight() != 0).any(1)
    assert not moved[3]
    assert moved.sum() == 19


@pytest.mark.parametrize("bias", [False, True])
def test_dora_is_the_paper_s_equation_with_a_detached_norm(bias: bool) -> None:
    base, leaf = layer(bias=bias)
    leaf.add_magnitude()
    x = torch.randn(5, 12, requires_grad=True)
    assert torch.equal(leaf(x), base(x))
    nn.init.normal_(leaf.lora_B)
    magnitude = leaf.lora_magnitude_vector
    assert magnitude is not None
    with torch.no_grad():
        magnitude *= torch.rand(20) + 0.5
    direction = base.weight + leaf.scale * leaf.lora_B @ leaf.lora_A
    norms = direction.norm(dim=1).detach()
    explicit = nn.functional.linear(x, (magnitude / norms)[:, None] * direction, base.bias)
    torch.testing.assert_close(leaf(x), explicit)
    upstream = torch.randn_like(explicit)
    wanted = [x, *leaf.adapter_parameters(), *([base.bias] if bias else [])]
    ours, theirs = (torch.autograd.grad(out, wanted, upstream) for out in (leaf(x), explicit))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("changes", [{}, DORA, PISSA], ids=str)
def test_the_penalty_is_the_distance_of_the_effective_weight(changes: dict[str, Any]) -> None:
    model, _ = moved(changes)
    (penalty,) = build_penalties(RegularizerConfig(l2_sp=L2SPConfig(strength=0.5)), model)
    found = penalty.value(model)
    gradients = torch.autograd.grad(found, [p for p in model.parameters() if p.requires_grad])
    pairs = [(leaf, tiny_llama().get_parameter(f"{name}.weight")) for name, leaf in lora_leaves(model).items()]
    total = torch.zeros(())
    for leaf, pretrained in pairs:
        effective = leaf.weight.detach() + leaf.scale * leaf.lora_B @ leaf.lora_A
        if leaf.lora_magnitude_vector is not None:
            effective = (leaf.lora_magnitude_vector / effective.norm(dim=1))[:, None] * effective
        total = total + 0.5 * (effective - pretrained).square().sum()
    torch.testing.assert_close(found, total, rtol=1e-4, atol=0)
    explicit = torch.autograd.grad(total, [p for p in model.parameters() if p.requires_grad])
    for ours, theirs in zip(gradients, explicit, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, DORA, PISSA, {"quantize": "nf4"}], ids=str)
def test_ewc_measures_the_effective_weight_from_its_anchor(changes: dict[str, Any], tmp_path: Path) -> None:
    """Of a task that ended elsewhere, and of one that ended where these weights begin."""
    model, method = moved(changes)
    generator = torch.Generator().manual_seed(2)
    names = [f"{name}.weight" for name in lora_leaves(model)]
    pretrained = {name: tiny_llama().get_parameter(name).detach() for name in names}
    fisher = {name: torch.rand(value.shape, generator=generator).bfloat16() for name, value in pretrained.items()}
    elsewhere = {name: value + torch.randn(value.shape, generator=generator) for name, value in pretrained.items()}
    for task, anchors in (("first", elsewhere), ("second", pretrained)):
        (tmp_path / task).mkdir()
        save_fisher(tmp_path / task / FILE, fisher, anchors, FisherFacts("true", 1, 0))
    penalty = EWC(model, EWCConfig(strength=0.3, source=[str(tmp_path / "first"), str(tmp_path / "second")]))
    found = penalty.value(model).detach()
    method.merge(model)
    state = method.merged(model).state_dict()
    total = sum(
        0.15 * float((fisher[n].float() * (state[n] - anchors[n]).square()).sum())
        for anchors in (elsewhere, pretrained)
        for n in names
    )
    assert float(found) == pytest.approx(total, rel=1e-4)


# --- PEFT -------------------------------------------------------------------------------------------------------------


def peft_model(base: Path, adapter: Path) -> Any:
    """PEFT's model of an adapter's folder, trainable."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers' and peft's own making, except for keys: asserted below
        loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        theirs = PeftModel.from_pretrained(loaded, adapter, is_trainable=True)
        result = theirs.load_adapter(adapter, adapter_name="default", is_trainable=True)
    assert not [name for name in result.missing_keys if "lora_" in name]
    assert not result.unexpected_keys
    return theirs


@pytest.mark.parametrize(
    "changes",
    [
        *(DORA, {**DORA, "rslora": True, "targets": ["[qv]_proj"]}, PISSA, {**PISSA, "rslora": True}),
        {"ranks": ["mlp.up_proj:2", "layers.1.*:6"], "alphas": ["layers.1.self_attn.*:3"]},
        {**PISSA, "ranks": ["up_proj:2"], "alphas": ["up_proj:3"]},
    ],
    ids=str,
)
def test_peft_loads_the_export_and_computes_the_same(changes: dict[str, Any], tmp_path: Path) -> None:
    save_safetensors(tiny_llama(), tmp_path / "base")
    model, method = moved(changes)
    method.save(model, tmp_path / "adapter", str(tmp_path / "base"))
    theirs = peft_model(tmp_path / "base", tmp_path / "adapter").eval()
    with torch.no_grad():
        ours, off = model.eval()(IDS), tiny_llama().eval()(IDS)
        torch.testing.assert_close(ours, theirs(IDS).logits, rtol=1e-4, atol=1e-4)
    assert float((ours - off).abs().max()) > 0.1


def test_dora_s_gradients_are_peft_s(tmp_path: Path) -> None:
    save_safetensors(tiny_llama(), tmp_path / "base")
    model, method = moved(DORA)
    method.save(model, tmp_path / "adapter", str(tmp_path / "base"))
    theirs = peft_model(tmp_path / "base", tmp_path / "adapter").train()
    model(IDS).square().sum().backward()
    theirs(IDS).logits.square().sum().backward()
    found = dict(theirs.named_parameters())
    for name, leaf in lora_leaves(model).items():
        start = f"base_model.model.{name}"
        parts = ("lora_A.default", "lora_B.default", "lora_magnitude_vector.default")
        for part, ours in zip(parts, leaf.adapter_parameters(), strict=True):
            expected = found[f"{start}.{part}.weight"].grad
            size = float(expected.abs().max())
            torch.testing.assert_close(ours.grad, expected, rtol=1e-3, atol=1e-4 * size, msg=f"{name} {part}")


# --- operators --------------------------------------------------------------------------------------------------------


def loss_and_gradients(model: LlamaForCausalLM, kernels: str) -> dict[str, Tensor]:
    operators = TORCH if kernels == "reference" else select(kernels, torch.device("cpu"))[0]
    model.use(operators)
    model.zero_grad()
    loss = model.train()(IDS).square().mean()
    loss.backward()
    if kernels != "reference":
        assert describe(operators)["lora_linears"] == {"native": 14}
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kernels", ["auto", "native", "check"])
@pytest.mark.parametrize("changes", [DORA, PISSA], ids=str)
@pytest.mark.parametrize("biases", [False, True])
def test_every_path_computes_the_same(kernels: str, changes: dict[str, Any], biases: bool) -> None:
    model, _ = moved(changes, attention_bias=biases, mlp_bias=biases)
    expected, ours = loss_and_gradients(model, "reference"), loss_and_gradients(model, kernels)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-5 * float(value.abs().max()), msg=name)


@pytest.mark.parametrize("kernels", ["native", "check"])
def test_dora_in_bf16_is_as_near_to_fp64_as_torch(kernels: str) -> None:
    model, _ = moved(DORA, mlp_bias=True)
    exact = loss_and_gradients(copy.deepcopy(model).double(), "reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs, ours = (loss_and_gradients(model, path) for path in ("reference", kernels))
    for name in exact.keys() - {"loss"}:
        error, own = (float((each[name] - exact[name]).norm() / exact[name].norm()) for each in (ours, theirs))
        assert error <= 2 * own + 1e-3, name


@pytest.mark.parametrize("kernels", ["reference", "native"])
def test_a_small_change_of_a_magnitude_survives_bf16(kernels: str) -> None:
    """1.1 and 1.1011 are one number in bf16: the mean of many outputs shows whether the factor was rounded to it."""
    _, leaf = layer(bias=False)
    leaf.add_magnitude()
    leaf.operators = TORCH if kernels == "reference" else select(kernels, torch.device("cpu"))[0]
    x = torch.randn(4096, 12)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert leaf.lora_magnitude_vector is not None
        leaf.lora_magnitude_vector *= 1.1  # away from 1, where the product, rounded already, would be rounded back
        before = leaf(x).double()
        leaf.lora_magnitude_vector *= 1.001
        after = leaf(x).double()
    assert float((after * before).sum() / before.square().sum()) == pytest.approx(1.001, abs=1e-4)


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ranks": ["q_prj:4"]}, r"method\.ranks: 'q_prj' matches none of the adapted layers"),
        ({"ranks": ["q_proj"]}, r"'q_proj' is not PATTERN:NUMBER"),
        ({"ranks": ["q_proj:2.5"]}, "is not PATTERN:NUMBER"),
        ({"ranks": ["q_proj:0"]}, r"method\.ranks: 'q_proj:0' is not PATTERN:NUMBER"),
        ({"ranks": ["q_proj:1025"]}, "is not PATTERN:NUMBER"),
        ({"ranks": ["q_proj:-8"]}, "is not PATTERN:NUMBER"),
        ({"alphas": ["q_proj:0"]}, r"method\.alphas: 'q_proj:0' is not PATTERN:NUMBER"),
        ({"alphas": [":2"]}, "is not PATTERN:NUMBER"),
        ({"alphas": ["q_proj:1e999"]}, "is not PATTERN:NUMBER"),
        ({"alphas": ["(:2"]}, r"method\.alphas: '\(' is not a regular expression"),
    ],
)
def test_wrong_patterns_are_refused(changes: dict[str, Any], message: str) -> None:
    config = LoRAConfig(rank=4, **changes)
    with pytest.raises(ConfigError, match=message):
        make_method(config).apply(tiny_llama())
    if "matches none" not in message:  # the names are known with the model, the form before it
        with pytest.raises(ConfigError, match=message):
            check_variants(config)


def test_patterns_give_each_layer_its_rank_and_scale() -> None:
    model, _ = moved({"ranks": ["layers.1.*q_proj:2", "q_proj:6"], "alphas": ["v_proj:4"]})
    leaves = lora_leaves(model)
    ranks = {name.split(".", 2)[2]: len(leaf.lora_A) for name, leaf in leaves.items()}
    assert (ranks["0.self_attn.q_proj"], ranks["1.self_attn.q_proj"], ranks["0.mlp.up_proj"]) == (6, 2, 4)
    assert leaves["model.layers.0.self_attn.v_proj"].scale == 1.0
    assert leaves["model.layers.0.self_attn.q_proj"].scale == 8.0 / 6
