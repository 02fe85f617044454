"""What every method promises: a table of methods times properties."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from ftlab.config import (
    AdamWConfig,
    BitFitConfig,
    FreezeConfig,
    FullConfig,
    GradualUnfreezeConfig,
    L2SPConfig,
    LoRAConfig,
    MethodConfig,
    RegularizerConfig,
)
from ftlab.errors import FtlabError
from ftlab.losses.cross_entropy import supervised_cross_entropy
from ftlab.losses.penalties import Penalty, build_penalties
from ftlab.methods import Method, make_method
from ftlab.methods.lora import lora_leaves
from ftlab.methods.nf4 import NF4Weight
from ftlab.methods.trainable import TrainableTable, trainable_parameters, trainable_state_dict
from ftlab.models.llama import LlamaForCausalLM
from ftlab.optim.adamw import build_optimizer
from tests.helpers.models import random_ids, tiny_llama

METHODS: dict[str, Callable[[], MethodConfig]] = {
    "full": FullConfig,
    "full without embeddings": lambda: FullConfig(train_embeddings=False),
    "full with decaying rates": lambda: FullConfig(layer_decay=0.8, rates=["q_proj:0.5"]),
    "upper half": lambda: FreezeConfig(frozen_fraction=0.5),
    "bitfit with norms": lambda: BitFitConfig(train_norms=True),
    "gradual unfreezing": GradualUnfreezeConfig,
    "lora": lambda: LoRAConfig(rank=4, alpha=8.0),
    "lora plus": lambda: LoRAConfig(rank=4, alpha=8.0, b_rate=16.0),
    "lora with dropout": lambda: LoRAConfig(rank=4, alpha=8.0, dropout=0.3),
    "rslora": lambda: LoRAConfig(rank=4, alpha=8.0, rslora=True),
    "lora on attention": lambda: LoRAConfig(rank=2, alpha=2.0, targets=["[qkvo]_proj"]),
    "lora of several ranks": lambda: LoRAConfig(
        rank=4, alpha=8.0, ranks=["layers.1.*:2", "mlp.*:6"], alphas=["layers.1.*:4", "mlp.*:12"]
    ),
    "dora": lambda: LoRAConfig(rank=4, alpha=8.0, dora=True),
    "qlora": lambda: LoRAConfig(rank=4, alpha=8.0, quantize="nf4", dropout=0.1),
    "pissa": lambda: LoRAConfig(rank=4, alpha=8.0, init="pissa"),
}
# Starting and switched off these are the pretrained model up to the rounding of their frozen weights; the pretrained
# model of qlora is the dequantised one.
ROUNDED = {"pissa", "qlora"}
every_method = pytest.mark.parametrize("name", list(METHODS))
IDS = random_ids(2, 12, seed=11)


@dataclass
class Applied:
    """A tiny model with a method on it."""

    model: LlamaForCausalLM
    method: Method
    table: TrainableTable

    def loss(self) -> Tensor:
        labels = torch.where(torch.arange(12) < 4, -100, IDS.roll(-1, 1))
        positions = torch.arange(12).expand_as(IDS)
        batch = SimpleNamespace(input_ids=IDS, labels=labels, position_ids=positions, documents=None)
        return supervised_cross_entropy(self.model, batch, 8) / 16

    def train(self, steps: int, penalties: list[Penalty]) -> None:
        torch.manual_seed(0)
        optimizer = build_optimizer(AdamWConfig(lr=0.01, weight_decay=0.1), self.model, self.table)
        self.model.train()
        for _ in range(steps):
            loss = self.loss()
            for penalty in penalties:
                loss = loss + penalty.value(self.model)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        self.model.eval()


def applied(name: str, seed: int = 5) -> Applied:
    model = tiny_llama()
    method = make_method(METHODS[name](), seed=seed)
    return Applied(model, method, method.apply(model))


def trained(name: str, steps: int = 3) -> Applied:
    run = applied(name)
    run.train(steps, [])
    return run


def pretrained(name: str) -> LlamaForCausalLM:
    """What the method starts from."""
    model = tiny_llama()
    if name == "qlora":
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.data = NF4Weight(layer.weight).dequantise()
    return model


def assert_pretrained(name: str, model: LlamaForCausalLM) -> None:
    """`model` computes what the pretrained one computes: bit for bit, unless `name` is in ROUNDED."""
    ours, theirs = logits(model), logits(pretrained(name))
    if name in ROUNDED:
        assert float((ours - theirs).norm() / theirs.norm()) < 2e-6
    else:
        assert torch.equal(ours, theirs)


def logits(model: LlamaForCausalLM) -> Tensor:
    with torch.no_grad():
        return model(IDS)


@every_method
def test_identity_at_the_start(name: str) -> None:
    model = applied(name).model
    for mode in (True, False):
        assert_pretrained(name, model.train(mode))


@every_method
def test_training_changes_the_model(name: str) -> None:
    assert float((logits(trained(name).model) - logits(pretrained(name))).abs().max()) > 0.01


@every_method
def test_merged_equals_unmerged(name: str) -> None:
    run = trained(name)
    weights = {key: tensor.clone() for key, tensor in run.model.state_dict().items()}
    before = logits(run.model)
    run.method.merge(run.model)
    merged = logits(run.model)
    assert float((merged - before).norm() / before.norm()) < 1e-4
    run.method.unmerge(run.model)
    assert all(torch.equal(weights[key], tensor) for key, tensor in run.model.state_dict().items())
    assert torch.equal(logits(run.model), before)
    run.method.merge(run.model)
    assert torch.equal(logits(run.method.merged(run.model)), merged)


@every_method
def test_disabled_equals_the_base(name: str) -> None:
    run = trained(name)
    after = logits(run.model)
    if run.method.keeps_base:
        with run.method.disabled(run.model):
            assert_pretrained(name, run.model)
        assert torch.equal(logits(run.model), after)
    else:
        with pytest.raises(FtlabError, match="overwrites the pretrained weights"), run.method.disabled(run.model):
            pass


@every_method
def test_save_and_load_are_bit_equal(name: str, tmp_path: Path) -> None:
    run = trained(name)
    run.method.save(run.model, tmp_path / "saved", "file:base")
    again = applied(name, seed=99)
    again.method.load(again.model, tmp_path / "saved")
    assert run.model.state_dict().keys() == again.model.state_dict().keys()
    for key, tensor in run.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[key], tensor), key
    assert torch.equal(logits(again.model.eval()), logits(run.model))


@every_method
def test_gradients_on_what_is_declared_and_nowhere_else(name: str) -> None:
    run = applied(name)
    run.loss().backward()
    declared = run.table.lr_scales(run.model).keys()
    assert {key for key, p in run.model.named_parameters() if p.grad is not None} == declared
    assert declared == trainable_parameters(run.model).keys() == trainable_state_dict(run.model).keys()
    assert all(p.dtype == torch.float32 for p in trainable_parameters(run.model).values())


@every_method
def test_what_trains_moves_and_what_is_frozen_stays(name: str) -> None:
    run = applied(name)
    before = {key: p.detach().clone() for key, p in run.model.named_parameters()}
    run.train(3, [])
    for key, parameter in run.model.named_parameters():
        assert torch.equal(parameter.detach(), before[key]) != parameter.requires_grad, key


@every_method
def test_zero_strength_is_bitwise_no_penalty(name: str) -> None:
    def weights(strength: float | None) -> dict[str, Tensor]:
        run = applied(name)
        penalties = []
        if strength is not None:
            config = RegularizerConfig(l2_sp=L2SPConfig(strength=strength))
            penalties = build_penalties(config, run.model)
            assert len(penalties) == (strength > 0)
        run.train(3, penalties)
        return run.model.state_dict()

    without, zero, some = weights(None), weights(0.0), weights(0.1)
    assert all(torch.equal(without[key], zero[key]) for key in without)
    assert not all(torch.equal(without[key], some[key]) for key in without)


@every_method
@pytest.mark.parametrize("strength", [0.0, 1e9])
def test_a_huge_strength_pulls_the_weights_back(name: str, strength: float) -> None:
    """From about 0.01 away, gradient descent at a rate fit for the penalty ends within 1e-6 of the pretrained weights.

    Without the penalty the same steps leave the weights where they were put.
    """
    run = applied(name)
    base = pretrained(name)
    penalties = build_penalties(RegularizerConfig(l2_sp=L2SPConfig(strength=strength)), run.model)
    assert len(penalties) == (strength > 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in trainable_parameters(run.model).items():
            if not key.endswith("lora_A"):  # B = 0 is where the pretrained weights are
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    # The penalty's curvature: 2 strength for a weight, at most 2 strength s^2 (||A A^T|| + ||B^T B||) for A and B.
    norms = [(leaf.scale, (leaf.lora_A.detach(), leaf.lora_B.detach())) for leaf in lora_leaves(run.model).values()]
    bounds = (s**2 * sum(float(torch.linalg.matrix_norm(x, 2)) ** 2 for x in pair) for s, pair in norms)
    curvature = 2e9 * max([1.0, *bounds])
    optimizer = torch.optim.SGD(trainable_parameters(run.model).values(), lr=1 / curvature)
    run.model.eval()
    for _ in range(100):
        optimizer.zero_grad()
        sum((penalty.value(run.model) for penalty in penalties), run.loss()).backward()
        optimizer.step()
    run.method.merge(run.model)
    state, start = run.method.merged(run.model).state_dict(), base.state_dict()
    distance = max(float((state[key] - start[key]).abs().max()) for key in start)
    assert distance < 1e-6 if strength else distance > 1e-3
