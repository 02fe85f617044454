"""LoRA without its scale, with the wrong one, with two random matrices, or added twice."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ftlab.config import LoRAConfig
from ftlab.methods import make_method
from ftlab.methods.lora_linear import LoRALinear
from tests.helpers.models import random_ids, tiny_llama

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))


def make(rank: int = 4, alpha: float = 8.0, rslora: bool = False) -> tuple[nn.Linear, LoRALinear]:
    torch.manual_seed(0)
    base = nn.Linear(12, 20)
    generator = torch.Generator().manual_seed(1)
    return base, LoRALinear(base, rank=rank, alpha=alpha, rslora=rslora, dropout_p=0.0, generator=generator)


class Unscaled(LoRALinear):
    """The mistake: no scale at all."""

    def forward(self, input: Tensor) -> Tensor:
        self.scale = 1.0
        return super().forward(input)


class Twice(LoRALinear):
    """The mistake: the update is added again by a second wrapper."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.scale * input @ self.lora_A.t() @ self.lora_B.t()


class BothRandom(LoRALinear):
    """The mistake: B is drawn as well."""

    def reset(self) -> None:
        nn.init.normal_(self.lora_B)


def update(leaf: LoRALinear, base: nn.Linear) -> Tensor:
    """What the adapter adds, after B has been set to something."""
    torch.manual_seed(2)
    nn.init.normal_(leaf.lora_B)
    with torch.no_grad():
        return leaf(X) - base(X)


def assert_scale(build: Callable[..., tuple[nn.Linear, LoRALinear]], rank: int, alpha: float, rslora: bool) -> None:
    """The update is exactly alpha / r, or alpha / sqrt(r), times B A x."""
    base, leaf = build(rank, alpha, rslora)
    found = update(leaf, base)
    scale = alpha / math.sqrt(rank) if rslora else alpha / rank
    explicit = scale * (X @ leaf.lora_A.detach().t() @ leaf.lora_B.detach().t())
    torch.testing.assert_close(found, explicit, rtol=1e-5, atol=1e-5)


def assert_identity(base: nn.Linear, leaf: LoRALinear) -> None:
    assert torch.equal(leaf(X), base(X))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("rank", "alpha"), [(1, 1.0), (4, 8.0), (9, 3.0)])
def test_the_scale_is_exact(rank: int, alpha: float, rslora: bool) -> None:
    assert_scale(make, rank, alpha, rslora)


@pytest.mark.parametrize("kind", [Unscaled, Twice])
def test_a_wrong_scale_fails_the_same_assertion(kind: type[LoRALinear]) -> None:
    def build(rank: int, alpha: float, rslora: bool) -> tuple[nn.Linear, LoRALinear]:
        base, leaf = make(rank, alpha, rslora)
        leaf.__class__ = kind
        return base, leaf

    with pytest.raises(AssertionError):
        assert_scale(build, 4, 8.0, False)


def test_the_update_is_linear_in_alpha() -> None:
    one, three = (update(leaf, base) for base, leaf in (make(alpha=1.0), make(alpha=3.0)))
    torch.testing.assert_close(three, 3 * one, rtol=1e-5, atol=1e-5)


def test_the_flag_changes_the_scale_only() -> None:
    plain, root = (update(leaf, base) for base, leaf in (make(rank=4), make(rank=4, rslora=True)))
    torch.testing.assert_close(root, 2 * plain, rtol=1e-5, atol=1e-5)


def test_a_new_adapter_is_the_identity_bit_for_bit() -> None:
    assert_identity(*make())
    model = tiny_llama()
    make_method(LoRAConfig(rank=4)).apply(model)
    ids = random_ids(2, 9)
    assert torch.equal(model(ids), tiny_llama()(ids))


def test_two_random_matrices_fail_the_same_assertion() -> None:
    base, leaf = make()
    leaf.__class__ = BothRandom
    leaf.reset()  # type: ignore[operator]
    with pytest.raises(AssertionError):
        assert_identity(base, leaf)


def test_the_first_gradient_reaches_b() -> None:
    """B = 0 stops the gradient of A at first, never that of B: with both 0 nothing would ever train."""
    _, leaf = make()
    leaf(X).square().sum().backward()
    assert leaf.lora_B.grad is not None
    assert leaf.lora_B.grad.any()
    assert leaf.lora_A.detach().any()


@pytest.mark.parametrize("rslora", [False, True])
def test_the_exported_settings_carry_the_flag(rslora: bool, tmp_path: Path) -> None:
    model = tiny_llama()
    method = make_method(LoRAConfig(rank=4, alpha=8.0, rslora=rslora))
    method.apply(model)
    method.save(model, tmp_path / "adapter", "file:base")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["use_rslora"], settings["lora_alpha"], settings["r"]) == (rslora, 8, 4)
