from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ftlab.config import (
    FullConfig,
    L1SPConfig,
    L2SPConfig,
    LinearProbeConfig,
    LoRAConfig,
    MethodConfig,
    RegularizerConfig,
)
from ftlab.errors import ConfigError, FtlabError
from ftlab.losses.penalties import L1SP, L2SP, Penalty, build_penalties
from ftlab.methods import make_method
from ftlab.methods.lora import lora_leaves
from tests.helpers.classifiers import tiny_bert_classifier
from tests.helpers.models import tiny_llama


class MeanOfSquares(Penalty):
    """A user's own penalty."""

    name = "mean_of_squares"

    def __init__(self, model: nn.Module, strength: float) -> None:
        self.strength = strength

    def value(self, model: nn.Module) -> Tensor:
        squares = [p.square().mean() for p in model.parameters() if p.requires_grad]
        return self.strength * torch.stack(squares).mean()


class NoPenalty:
    def __init__(self, model: nn.Module) -> None:
        self.name = "none"


def jiggle(model: nn.Module, seed: int = 0) -> None:
    """Move everything that trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.1


def test_full_is_the_squared_distance() -> None:
    model = tiny_llama()
    make_method(FullConfig()).apply(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    penalty = L2SP(model, 0.3)
    assert penalty.value(model) == 0
    jiggle(model)
    value = penalty.value(model)
    value.backward()
    expected = 0.3 * sum((p.detach().double() - before[n]).square().sum() for n, p in model.named_parameters())
    torch.testing.assert_close(value.detach().double(), expected, rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 0.6 * (parameter.detach() - before[name]))


def test_frozen_tensors_are_not_anchored() -> None:
    model = tiny_llama()
    make_method(FullConfig(train_embeddings=False)).apply(model)
    penalty = L2SP(model, 1.0)
    assert "model.embed_tokens.weight" not in penalty.anchors
    assert len(penalty.anchors) == len(list(model.parameters())) - 1


@pytest.mark.parametrize("autocast", [False, True])
def test_lora_is_the_distance_of_the_effective_weight(autocast: bool) -> None:
    model = tiny_llama()
    make_method(LoRAConfig(rank=4, alpha=8.0)).apply(model)
    penalty = L2SP(model, 0.3)
    assert not penalty.anchors
    assert penalty.value(model) == 0
    jiggle(model)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        value = penalty.value(model)
    assert value.dtype == torch.float32
    value.backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    explicit = 0.3 * sum(
        (leaf.scale * leaf.lora_B @ leaf.lora_A).square().sum() for leaf in lora_leaves(model).values()
    )
    torch.testing.assert_close(value, explicit, rtol=1e-5, atol=0)
    for parameter, expected in zip(parameters, torch.autograd.grad(explicit, parameters), strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)


def test_a_trained_base_under_an_adapter_is_refused() -> None:
    model = tiny_llama()
    make_method(LoRAConfig(rank=2, targets=["q_proj"])).apply(model)
    model.get_parameter("model.layers.1.self_attn.q_proj.weight").requires_grad_()
    with pytest.raises(FtlabError, match=r"model\.layers\.1\.self_attn\.q_proj"):
        L2SP(model, 1.0)


def test_fingerprint_follows_the_anchors() -> None:
    def fingerprint(seed: int) -> str:
        model = tiny_llama(seed)
        make_method(FullConfig()).apply(model)
        penalty = L2SP(model, 1.0)
        jiggle(model, seed)  # what training does later does not count
        return penalty.fingerprint()

    assert fingerprint(0) == fingerprint(0) != fingerprint(1)
    assert len(fingerprint(0)) == 16


def extra(**entries: Any) -> RegularizerConfig:
    return RegularizerConfig(extra=entries)


def test_build_penalties() -> None:
    model = tiny_llama()
    own = {"_target_": "tests.losses.test_penalties.MeanOfSquares", "strength": 0.5}
    config = RegularizerConfig(l2_sp=L2SPConfig(strength=0.1), extra={"mine": own})
    assert [penalty.name for penalty in build_penalties(config, model)] == ["l2_sp", "mean_of_squares"]
    assert build_penalties(config, model)[1].fingerprint() == ""
    assert build_penalties(RegularizerConfig(), model) == []
    assert build_penalties(extra(mine=own | {"strength": 0.0}), model) == []


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"strength": 1.0}, "regularizer.extra.mine: needs _target_"),
        ("tests.losses.test_penalties.MeanOfSquares", "needs _target_"),
        ({"_target_": "no_such_module.Class"}, "cannot import 'no_such_module.Class'"),
        ({"_target_": "tests.losses.test_penalties.Absent"}, "cannot import"),
        ({"_target_": "Absent"}, "cannot import"),
        ({"_target_": "tests.losses.test_penalties.MeanOfSquares", "strenth": 1.0}, "strenth"),
        ({"_target_": "tests.losses.test_penalties.NoPenalty"}, "has no value, fingerprint"),
    ],
)
def test_a_wrong_entry_is_named(entry: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_penalties(extra(mine=entry), tiny_llama())
    assert "regularizer.extra.mine" in str(caught.value)


def test_two_penalties_of_one_name_are_refused() -> None:
    own = {"_target_": "tests.losses.test_penalties.MeanOfSquares", "strength": 0.5}
    with pytest.raises(ConfigError, match="same name"):
        build_penalties(extra(a=own, b=own), tiny_llama())


NEW_ALONE = r"only what has no pretrained value trains \(classifier\.weight, classifier\.bias\).*method="
FROZEN_HEAD = FullConfig(rates=["classifier:0"])


@pytest.mark.parametrize(
    ("method", "config", "message"),
    [
        (LinearProbeConfig(), RegularizerConfig(l1_sp=L1SPConfig(0.1)), rf"regularizer\.l1_sp: {NEW_ALONE}"),
        (LinearProbeConfig(), RegularizerConfig(l2_sp=L2SPConfig(0.1)), rf"regularizer\.l2_sp: {NEW_ALONE}.*beta"),
        (
            LinearProbeConfig(),
            RegularizerConfig(l2_sp=L2SPConfig(0.1, mode="decoupled")),
            rf"regularizer\.l2_sp: {NEW_ALONE}.*beta",
        ),
        (FROZEN_HEAD, RegularizerConfig(l2_sp=L2SPConfig(beta=0.1)), r"regularizer\.l2_sp\.beta: .* set it to 0"),
        (
            FullConfig(),
            RegularizerConfig(l2_sp=L2SPConfig(0.1, rules=[".*:0"])),
            r"regularizer\.l2_sp\.rules: .*above 0",
        ),
        (
            LinearProbeConfig(),
            RegularizerConfig(l2_sp=L2SPConfig(0.1, rules=["query:2"])),
            "matches nothing that is held: nothing that has a pretrained value trains",
        ),
    ],
)
def test_nothing_to_hold_is_refused_when_it_is_built(
    method: MethodConfig, config: RegularizerConfig, message: str
) -> None:
    model = tiny_bert_classifier()
    make_method(method).apply(model)
    with pytest.raises(ConfigError, match=message):
        build_penalties(config, model)


@pytest.mark.parametrize(
    ("method", "config"),
    [
        (LinearProbeConfig(), RegularizerConfig(l2_sp=L2SPConfig(0.1, beta=0.2))),
        (LinearProbeConfig(), RegularizerConfig(l2_sp=L2SPConfig(beta=0.2))),
        (LinearProbeConfig(), RegularizerConfig(l2_sp=L2SPConfig(beta=0.2, mode="decoupled"))),
        (FullConfig(), RegularizerConfig(l2_sp=L2SPConfig(0.1, beta=0.2, rules=[".*:0"]))),
        (FROZEN_HEAD, RegularizerConfig(l2_sp=L2SPConfig(0.1, beta=0.2))),
        (LoRAConfig(rank=2, targets=["query"]), RegularizerConfig(l2_sp=L2SPConfig(0.1))),
        (LoRAConfig(rank=2, targets=["query"]), RegularizerConfig(l1_sp=L1SPConfig(0.1))),
    ],
)
def test_something_to_hold_is_enough(method: MethodConfig, config: RegularizerConfig) -> None:
    model = tiny_bert_classifier()
    make_method(method).apply(model)
    (penalty,) = build_penalties(config, model)
    jiggle(model)
    assert float(penalty.value(model).detach()) > 0


def test_a_strength_of_0_has_nothing_to_hold_and_a_causal_head_is_pretrained() -> None:
    model = tiny_bert_classifier()
    make_method(LinearProbeConfig()).apply(model)
    assert build_penalties(RegularizerConfig(), model) == []
    assert not L2SP(model, 0.0).anchors
    causal = tiny_llama(tie_word_embeddings=False)
    make_method(LinearProbeConfig()).apply(causal)
    assert set(L2SP(causal, 0.1).anchors) == set(L1SP(causal, 0.1).anchors) == {"lm_head.weight"}
