"""L2-SP's settings: new parameters, strength by rule, kept anchors, and the pull in the optimizer's step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ftlab_kernels.adamw import Anchor, Rule, reference_step
from torch import Tensor

from ftlab.compose import compose
from ftlab.config import AdamWConfig, FreezeConfig, FullConfig, L2SPConfig, LoRAConfig, RegularizerConfig
from ftlab.errors import ConfigError
from ftlab.losses.penalties import L2SP, DecoupledL2SP, Penalty, build_penalties
from ftlab.methods import make_method
from ftlab.methods.lora import lora_leaves
from ftlab.optim.adamw import build_optimizer
from ftlab.session import train
from tests.helpers.classifiers import tiny_bert_classifier
from tests.helpers.models import tiny_llama
from tests.losses.test_penalties import jiggle

HEAD = ("classifier.weight", "classifier.bias")


def squares(model: torch.nn.Module, before: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: (p.detach().double() - before[name]).square().sum() for name, p in model.named_parameters()}


def copies(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().double().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("strength", [0.0, 0.3])
def test_a_new_head_is_pulled_to_zero(strength: float) -> None:
    model = tiny_bert_classifier()
    make_method(FullConfig()).apply(model)
    before = copies(model)
    (penalty,) = build_penalties(RegularizerConfig(l2_sp=L2SPConfig(strength, beta=0.2)), model)
    jiggle(model)
    distances = squares(model, before)
    head = sum(model.get_parameter(name).detach().double().square().sum() for name in HEAD)
    expected = strength * sum(d for name, d in distances.items() if name not in HEAD) + 0.2 * head
    torch.testing.assert_close(penalty.value(model).detach().double(), expected, rtol=1e-6, atol=0)
    plain = L2SP(model, 0.3)
    assert not set(plain.anchors) & set(HEAD), "what has no pretrained value has no anchor"
    assert isinstance(penalty, L2SP)
    assert bool(penalty.anchors) == (strength > 0), "a strength of 0 keeps nothing that it does not use"


def test_beta_without_a_new_head_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"regularizer\.l2_sp\.beta: .* set it to 0"):
        compose(["+experiment=full_tiny", "regularizer.l2_sp.beta=0.1"])


def test_rules_multiply_the_strength() -> None:
    model = tiny_llama()
    make_method(FullConfig()).apply(model)
    before = copies(model)
    penalty = L2SP(model, 0.5, rules=["layers.0.mlp:0", "mlp:4", r".*norm:0.5"])
    jiggle(model)
    total = 0.0
    for name, distance in squares(model, before).items():
        factor = 0.0 if "layers.0.mlp" in name else 4.0 if ".mlp." in name else 0.5 if "norm" in name else 1.0
        total += 0.5 * factor * float(distance)
    assert float(penalty.value(model).detach()) == pytest.approx(total, rel=1e-5)
    assert not any("layers.0.mlp" in name for name in penalty.anchors), "a strength of 0 needs no anchor"


def test_rules_know_adapted_layers() -> None:
    model = tiny_llama()
    make_method(LoRAConfig(rank=2, alpha=4.0)).apply(model)
    penalty = L2SP(model, 0.5, rules=["q_proj:3"])
    jiggle(model)
    leaves = lora_leaves(model)
    total = sum(
        (3 if "q_proj" in name else 1) * 0.5 * float(leaf.delta_weight().detach().double().square().sum())
        for name, leaf in leaves.items()
    )
    assert float(penalty.value(model).detach()) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("rule", ["q_prj:1", "q_proj", "(:1", "q_proj:-1", ":2"])
def test_a_wrong_rule_is_refused(rule: str) -> None:
    model = tiny_llama()
    make_method(FullConfig()).apply(model)
    with pytest.raises(ConfigError, match=r"regularizer\.l2_sp\.rules"):
        L2SP(model, 0.5, rules=[rule])


def test_a_wrong_rule_is_refused_before_anything_loads() -> None:
    with pytest.raises(ConfigError, match=r"regularizer\.l2_sp\.rules: 'q_proj' is not PATTERN:FACTOR"):
        compose(["+experiment=full_tiny", "regularizer.l2_sp.rules=[q_proj]"])


def test_anchors_in_half_precision_and_on_the_cpu() -> None:
    model = tiny_llama()
    make_method(FreezeConfig(frozen_fraction=0.5)).apply(model)
    before = copies(model)
    half, main = L2SP(model, 0.5, anchor="bf16"), L2SP(model, 0.5, anchor="cpu")
    assert all(at.dtype == torch.bfloat16 for at in half.anchors.values())
    assert half.anchors.keys() == main.anchors.keys()
    assert len(half.fingerprint()) == 16
    jiggle(model)
    rounded = {name: at.double() for name, at in half.anchors.items()}
    expected = 0.5 * sum((model.get_parameter(n).detach().double() - at).square().sum() for n, at in rounded.items())
    torch.testing.assert_close(half.value(model).detach().double(), expected, rtol=1e-6, atol=0)
    expected = 0.5 * sum(distance for name, distance in squares(model, before).items() if name in main.anchors)
    torch.testing.assert_close(main.value(model).detach().double(), expected, rtol=1e-6, atol=0)


def test_decoupled_is_the_pull_of_the_fused_optimizer() -> None:
    """Against the plain form of ftlab_kernels' AdamW, which has its own derivation and tests."""
    model = tiny_llama()
    table = make_method(FreezeConfig(frozen_fraction=0.5)).apply(model)
    penalty = DecoupledL2SP(model, 0.7, rules=["mlp:2"])
    jiggle(model)
    config = AdamWConfig(lr=0.05, weight_decay=0.1)
    optimizer = build_optimizer(config, model, table, pulls=penalty.pulls(model))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    theirs = [model.get_parameter(name).detach().clone() for name in names]
    states: list[dict[str, Any]] = [{} for _ in names]
    decays = {n: g["weight_decay"] for g in optimizer.param_groups for n in g["param_names"]}
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        grads = [torch.randn(p.shape, generator=generator) for p in theirs]
        for name, gradient in zip(names, grads, strict=True):
            model.get_parameter(name).grad = gradient.clone()
        optimizer.step()
        for at, name in enumerate(names):
            rule = Rule(lr=0.05, betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=decays[name])
            pull = Anchor(penalty.anchors[name], 2 * 0.7 * (2 if ".mlp." in name else 1))
            reference_step([theirs[at]], [grads[at]], [states[at]], rule, anchors=[pull])
    for name, expected in zip(names, theirs, strict=True):
        torch.testing.assert_close(model.get_parameter(name).detach(), expected, rtol=1e-5, atol=1e-6, msg=name)


def test_decoupled_beta_pulls_a_new_head_to_zero() -> None:
    """By min(1, 2 lr beta) of it, besides AdamW's own step, which a gradient of zeros makes none."""
    model = tiny_bert_classifier()
    table = make_method(FullConfig()).apply(model)
    penalty = DecoupledL2SP(model, 0.0, beta=0.7)
    jiggle(model)
    before = copies(model)
    config = AdamWConfig(lr=0.05, weight_decay=0)
    optimizer = build_optimizer(config, model, table, pulls=penalty.pulls(model))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        kept = 1 - 2 * 0.05 * 0.7 if name in HEAD else 1
        torch.testing.assert_close(parameter.detach().double(), kept * before[name], rtol=1e-6, atol=1e-8, msg=name)


def test_decoupled_adds_nothing_to_the_gradient_and_leaves_what_waits() -> None:
    model = tiny_llama()
    table = make_method(FullConfig()).apply(model)
    penalty: Penalty = DecoupledL2SP(model, 0.7)
    jiggle(model)
    assert not penalty.value(model).requires_grad
    assert float(penalty.value(model)) > 0
    optimizer = build_optimizer(AdamWConfig(lr=0.05), model, table, pulls=penalty.pulls(model))  # type: ignore[attr-defined]
    waiting = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    kept = waiting.detach().clone()
    for parameter in model.parameters():
        parameter.grad = None if parameter is waiting else torch.ones_like(parameter)
    optimizer.step()
    assert torch.equal(waiting.detach(), kept)


def test_a_strong_pull_leaves_the_pretrained_weights(tmp_path: Path) -> None:
    """lr * 2 * strength = 1 sets each weight to its pretrained value before the step that follows moves it."""

    def moved(*words: str) -> float:
        folder = tmp_path / "_".join(words or ("plain",)).replace("=", "_")
        more = ["method=full", "training.max_steps=6", "evaluation.generate=false", "schedule=constant"]
        config = compose(["+experiment=full_tiny", "tracking=disabled", *more, *words, f"run_dir={folder}"])
        assert train(*config) == 0
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
        return float([line for line in lines if "penalty/l2_sp" in line][-1]["penalty/l2_sp"])

    strong = ["regularizer.l2_sp.mode=decoupled", "optimizer.lr=1e-3", "tracking.log_every_steps=1"]
    weak, held = moved(*strong, "regularizer.l2_sp.strength=1e-6"), moved(*strong, "regularizer.l2_sp.strength=500")
    assert held / 500 < weak / 1e-6 / 5


def test_adapters_have_no_decoupled_pull() -> None:
    model = tiny_llama()
    make_method(LoRAConfig(rank=2)).apply(model)
    with pytest.raises(ConfigError, match="mode=coupled"):
        DecoupledL2SP(model, 0.1)
