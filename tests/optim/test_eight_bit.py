"""AdamW with 8-bit moments: near torch's AdamW, right in the mean, small, and resumed bit for bit."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from ftlab_kernels import adamw_cpu
from ftlab_kernels.adamw_kernels import decode_moments
from torch import Tensor

from ftlab import build
from ftlab.compose import compose
from ftlab.config import AdamWConfig
from ftlab.methods.trainable import Rule, TrainableTable
from ftlab.models.llama import LlamaForCausalLM
from ftlab.optim.adamw import AdamW, build_optimizer
from ftlab.optim.eight_bit import AdamW8bit
from ftlab.training.parallel import start_ranks
from ftlab.training.precision import Precision
from ftlab.training.preflight import static_memory
from tests.helpers.models import random_ids, tiny_llama

TABLE = TrainableTable([Rule(".*", True)])


def setting(state: str, path: str = "torch") -> tuple[LlamaForCausalLM, torch.optim.Optimizer]:
    model = tiny_llama()
    TABLE.apply(model)
    return model, build_optimizer(AdamWConfig(lr=1e-3, weight_decay=0.01, state=state), model, TABLE, path=path)


def steps(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, first: int, end: int) -> None:
    for number in range(first, end):
        ids = random_ids(2, 12, seed=number)
        torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model: LlamaForCausalLM) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_it_moves_as_torchs_adamw() -> None:
    (ours, eight), (theirs, full) = setting("8bit"), setting("fp32")
    assert isinstance(eight, AdamW8bit)
    assert isinstance(full, AdamW)
    steps(ours, eight, 0, 1)
    steps(theirs, full, 0, 1)
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-5, atol=1e-7)  # the first step reads no moment
    steps(ours, eight, 1, 20)
    steps(theirs, full, 1, 20)
    start = weights(tiny_llama())
    moved, apart = weights(theirs) - start, weights(ours) - weights(theirs)
    assert 0 < float(apart.norm() / moved.norm()) < 0.1


def test_moments_are_near_and_small() -> None:
    (ours, eight), (theirs, full) = setting("8bit"), setting("fp32")
    steps(ours, eight, 0, 1)
    steps(theirs, full, 0, 1)
    held = 0
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        state = eight.state[p]
        assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype) == (torch.int8, torch.uint8)
        held += sum(x.numel() * x.element_size() for name, x in state.items() if name != "step")
        scales = state["exp_avg_absmax"], state["exp_avg_sq_absmax"]
        m, v = decode_moments(state["exp_avg"].flatten(), state["exp_avg_sq"].flatten(), *scales)
        for found, name, bound in ((m, "exp_avg", 0.02), (v, "exp_avg_sq", 0.02)):
            expected = full.state[q][name].flatten()
            assert float((found - expected).abs().max() / expected.abs().max()) < bound
    assert held == static_memory(ours.parameters(), state="8bit")["optimizer"]
    assert held < static_memory(ours.parameters())["optimizer"] / 3.5


@pytest.fixture
def steps_in_c(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many parameters each step in C has moved so far."""
    found: list[int] = []
    step = adamw_cpu.eight_bit_step

    def counted(params: Sequence[Tensor], *others: Any) -> Tensor:
        found.append(len(params))
        return step(params, *others)

    monkeypatch.setattr(adamw_cpu, "eight_bit_step", counted)
    return found


def test_in_c_and_in_torch_the_bits_are_the_same(steps_in_c: list[int]) -> None:
    """Groups with and without decay, a parameter without a gradient, and a run that goes from one to the other."""
    ends = []
    for paths in (("torch", "torch"), ("native", "native"), ("native", "torch"), ("torch", "native")):
        model, optimizer = setting("8bit", paths[0])
        assert len(optimizer.param_groups) == 2
        steps(model, optimizer, 0, 2)
        again, fresh = setting("8bit", paths[1])
        again.load_state_dict(model.state_dict())
        fresh.load_state_dict(optimizer.state_dict())
        fresh.param_groups[0]["params"][1].requires_grad_(False)
        steps(again, fresh, 2, 4)
        ends.append(weights(again))
    assert all(torch.equal(ends[0], other) for other in ends[1:])
    assert sorted(set(steps_in_c)) == [5, 6, 14]
    assert len(steps_in_c) == 2 * (4 + 2 + 2)


def test_a_run_takes_the_c(steps_in_c: list[int]) -> None:
    for kernels, native in (("native", True), ("auto", True), ("reference", False)):
        config, _ = compose(
            ["+experiment=full_tiny", "optimizer.state=8bit", f"kernels={kernels}", "parallel.device=cpu"]
        )
        with start_ranks(config.parallel) as ranks:
            base, method = build.build_base(config, build.build_tokenizer(config), ranks, None)
            built = build.build_training(config, base, method, Precision(config.precision, ranks.device))
        assert isinstance(built.optimizer, AdamW8bit)
        for parameter in base.parameters():
            parameter.grad = torch.ones_like(parameter)
        built.optimizer.step()
        assert bool(steps_in_c) == native
        steps_in_c.clear()


def test_a_copy_goes_on_alike() -> None:
    model, optimizer = setting("8bit", "native")
    steps(model, optimizer, 0, 2)
    copied, again = copy.deepcopy((model, optimizer))
    assert isinstance(again, AdamW8bit)
    assert again.native
    steps(model, optimizer, 2, 3)
    steps(copied, again, 2, 3)
    assert torch.equal(weights(model), weights(copied))


@pytest.mark.parametrize("through_a_file", [False, True])
def test_resumed_it_is_bit_equal(through_a_file: bool) -> None:
    whole, optimizer = setting("8bit")
    steps(whole, optimizer, 0, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    if through_a_file:
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
    again, fresh = setting("8bit")
    again.load_state_dict(whole.state_dict())
    fresh.load_state_dict(saved)
    steps(whole, optimizer, 3, 6)
    steps(again, fresh, 3, 6)
    assert torch.equal(weights(whole), weights(again))
