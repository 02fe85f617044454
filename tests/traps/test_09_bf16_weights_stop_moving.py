"""A bf16 weight ignores an update below half its last place; what trains is therefore kept in fp32."""

from __future__ import annotations

import pytest
import torch

from ftlab.config import FullConfig, LoRAConfig, PrecisionConfig
from ftlab.methods import make_method
from ftlab.training.precision import Precision
from tests.helpers.training import tiny_llama


def drift(dtype: torch.dtype) -> float:
    weight = torch.nn.Parameter(torch.ones(8, dtype=dtype))
    optimizer = torch.optim.SGD([weight], lr=1e-4)
    for _ in range(1000):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    return float((1 - weight.detach().float()).mean())


def assert_moved(drifted: float) -> None:
    assert drifted == pytest.approx(0.1, rel=1e-3)


def test_stored_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTLAB_BF16", "always")
    for config in (FullConfig(), LoRAConfig()):
        model = tiny_llama().bfloat16()
        make_method(config, seed=0).apply(model)
        Precision(PrecisionConfig(compute="bf16", frozen="bf16"), torch.device("cpu")).store(model)
        for name, parameter in model.named_parameters():
            assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name


def test_fp32_masters_move() -> None:
    assert_moved(drift(torch.float32))


def test_bf16_weights_fail_the_same_assertion() -> None:
    with pytest.raises(AssertionError):
        assert_moved(drift(torch.bfloat16))
