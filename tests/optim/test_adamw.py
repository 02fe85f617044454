from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ftlab.config import AdamWConfig, LoRAConfig, OptimizerConfig
from ftlab.errors import ConfigError, FtlabError
from ftlab.methods import make_method
from ftlab.methods.trainable import Rule, TrainableTable
from ftlab.optim.adamw import AdamW, build_optimizer, decayed, set_lr
from tests.helpers.models import tiny_llama

CONFIG = AdamWConfig(lr=0.1, weight_decay=0.01, beta1=0.8, beta2=0.95, eps=1e-6)


def table() -> TrainableTable:
    return TrainableTable([Rule(r".*layers\.0\..*", True, lr_scale=0.5), Rule(r".*o_proj.*", False), Rule(".*", True)])


def test_groups_follow_decay_and_rate() -> None:
    model = tiny_llama()
    table().apply(model)
    optimizer = build_optimizer(CONFIG, model, table())
    names = {name: group for group in optimizer.param_groups for name in group["param_names"]}
    assert set(names) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    for name, group in names.items():
        assert group["base_lr"] == group["lr"] == (0.05 if ".layers.0." in name else 0.1)
        vector_or_embedding = "norm" in name or "embed" in name
        assert group["weight_decay"] == (0.0 if vector_or_embedding else 0.01)
        assert any(model.get_parameter(name) is p for p in group["params"])


def test_an_untied_head_decays_and_a_tied_one_does_not() -> None:
    assert "lm_head.weight" in decayed(tiny_llama(tie_word_embeddings=False))
    assert "model.embed_tokens.weight" not in decayed(tiny_llama())


def test_set_lr_scales_every_group() -> None:
    model = tiny_llama()
    table().apply(model)
    optimizer = build_optimizer(CONFIG, model, table())
    set_lr(optimizer, 0.5)
    rate = set_lr(optimizer, 0.25)  # the factor is of the peak, not of the present rate
    assert {group["lr"] for group in optimizer.param_groups} == {0.025, 0.0125}
    assert rate == 0.025


def test_one_step_by_hand() -> None:
    model = tiny_llama()
    TrainableTable([Rule(".*", True)]).apply(model)
    optimizer = build_optimizer(CONFIG, model, TrainableTable([Rule(".*", True)]))
    weight = model.model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    gradients = [torch.randn(weight.shape, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    first, second, expected = torch.zeros_like(before), torch.zeros_like(before), before.clone()
    for step, gradient in enumerate(gradients, start=1):
        weight.grad = gradient
        optimizer.step()
        first = 0.8 * first + 0.2 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        expected *= 1 - 0.1 * 0.01
        expected -= 0.1 * (first / (1 - 0.8**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-6)
    torch.testing.assert_close(weight.detach(), expected)


def test_a_state_of_other_parameters_is_refused() -> None:
    def optimizer(*targets: str) -> torch.optim.Optimizer:
        model = tiny_llama()
        method = make_method(LoRAConfig(rank=2, targets=list(targets)))
        return build_optimizer(CONFIG, model, method.apply(model))

    state = optimizer("q_proj", "k_proj").state_dict()
    optimizer("k_proj", "q_proj").load_state_dict(state)  # the order of targets is not that of parameters
    with pytest.raises(FtlabError, match="other parameters"):
        optimizer("q_proj", "v_proj").load_state_dict(state)


def test_state_survives_a_round_trip_bit_for_bit() -> None:
    def run(interrupted: bool) -> list[torch.Tensor]:
        model = tiny_llama()
        method = make_method(LoRAConfig(rank=2))
        rules = method.apply(model)
        optimizer = build_optimizer(CONFIG, model, rules)
        for step in range(4):
            if interrupted and step == 2:
                state = optimizer.state_dict()
                optimizer = build_optimizer(CONFIG, model, rules)
                optimizer.load_state_dict(state)
            set_lr(optimizer, 1 / (step + 1))
            for index, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
                generator = torch.Generator().manual_seed(100 * step + index)
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(run(False), run(True), strict=True))


def test_nothing_to_train_and_no_choice() -> None:
    model = tiny_llama()
    with pytest.raises(FtlabError, match="no parameter trains"):
        build_optimizer(CONFIG, model, TrainableTable([Rule(".*", False)]))
    with pytest.raises(ConfigError, match="optimizer: choose"):
        build_optimizer(OptimizerConfig(), model, TrainableTable([Rule(".*", True)]))


def test_it_is_torchs_own() -> None:
    """The same methods without the notes to the compiler: equal weights and state, before and after a resume."""
    from torch.optim import AdamW as Torchs

    def trained(
        cls: type[torch.optim.Optimizer], steps: int, saved: dict[str, Any] | None, weight: torch.Tensor
    ) -> Any:
        parameter = nn.Parameter(weight.clone())
        optimizer = cls([("w", parameter)], lr=0.1, weight_decay=0.01, fused=True)  # type: ignore[call-arg]
        if saved is not None:
            optimizer.load_state_dict(saved)
        for step in range(steps):
            parameter.grad = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
            optimizer.step()
            optimizer.zero_grad()
            assert parameter.grad is None
        return parameter.detach(), optimizer.state_dict()

    begin = torch.randn(5, 3, generator=torch.Generator().manual_seed(9))
    ours, theirs = (trained(cls, 3, None, begin) for cls in (AdamW, Torchs))
    assert_equal(ours, theirs)
    assert_equal(trained(AdamW, 2, theirs[1], theirs[0]), trained(Torchs, 2, ours[1], ours[0]))


def assert_equal(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=0)
    assert ours[1].keys() == theirs[1].keys()
    assert ours[1]["param_groups"] == theirs[1]["param_groups"]
    torch.testing.assert_close(ours[1]["state"], theirs[1]["state"], rtol=0, atol=0)
