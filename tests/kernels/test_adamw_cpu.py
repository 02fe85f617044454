"""The C step of AdamW with 8-bit moments: bit for bit the plain one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ftlab_kernels import adamw_cpu, native
from ftlab_kernels.adamw import Rule, reference_step

from tests.kernels.eight_bit_cases import SHAPES, State, assert_same, both, drawn, steps_case, tiny_case

RULES: dict[str, dict[str, Any]] = {
    "usual": {"lr": 2e-3, "weight_decay": 0.1},
    "no decay": {"lr": 1e-3, "weight_decay": 0.0, "betas": (0.8, 0.95), "eps": 1e-6},
    "no memory": {"lr": 1e-2, "weight_decay": 0.0, "betas": (0.0, 0.0)},
    "at rest": {"lr": 0.0, "weight_decay": 0.5},
}


@pytest.mark.parametrize("name", RULES)
def test_it_is_the_reference_bit_for_bit(name: str) -> None:
    steps_case(Rule(**RULES[name], states="8bit", seed=3))


def test_zeros_and_numbers_next_to_nothing() -> None:
    tiny_case()


def test_nothing_moves_where_a_gradient_is_not_finite() -> None:
    rule = Rule(states="8bit")
    params, states = drawn(0), [State() for _ in SHAPES]
    adamw_cpu.eight_bit_step(params, drawn(1), states, rule)
    before = [p.clone() for p in params], [{name: x.clone() for name, x in state.items()} for state in states]
    grads = drawn(2)
    grads[4][3, 5] = torch.inf
    assert not torch.isfinite(adamw_cpu.eight_bit_step(params, grads, states, rule))
    assert_same((params, states), before)


def test_the_number_of_threads_changes_nothing() -> None:
    rule = Rule(lr=1e-3, states="8bit")
    threads = torch.get_num_threads()
    ends = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            params, states = drawn(0), [State() for _ in SHAPES]
            adamw_cpu.eight_bit_step(params, drawn(1), states, rule)
            ends.append((params, states))
    finally:
        torch.set_num_threads(threads)
    assert_same(*ends)


def test_gradients_in_bf16_or_transposed_are_taken_and_other_weights_refused() -> None:
    rule = Rule(lr=1e-3, states="8bit")
    turned = [
        g.to(torch.bfloat16) if g.ndim == 1 else g.transpose(0, -1).contiguous().transpose(0, -1) for g in drawn(1)
    ]
    assert not turned[4].is_contiguous()
    assert_same(*both(rule, [turned]))
    assert not adamw_cpu.takes([torch.zeros(2, dtype=torch.float64)])
    assert not adamw_cpu.takes([torch.zeros(4, 4).t()])
    with pytest.raises(ValueError, match="contiguous fp32"):
        adamw_cpu.eight_bit_step([torch.zeros(2, dtype=torch.float64)], [torch.zeros(2)], [{}], rule)
    with pytest.raises(ValueError, match="of its own shape"):
        adamw_cpu.eight_bit_step([torch.zeros(2)], [torch.zeros(3)], [{}], rule)
    with pytest.raises(ValueError, match="8-bit"):
        adamw_cpu.eight_bit_step([torch.zeros(2)], [torch.zeros(2)], [{}], Rule())


def test_states_of_another_shape_are_refused() -> None:
    """The library is told addresses: it would write beyond them."""
    rule = Rule(lr=1e-3, states="8bit")
    state = State()
    adamw_cpu.eight_bit_step([torch.ones(300)], [torch.ones(300)], [state], rule)
    longer = torch.ones(600)
    for step in (adamw_cpu.eight_bit_step, reference_step):
        with pytest.raises(ValueError, match=r"exp_avg must be torch.int8 \(600,\)"):
            step([longer], [longer], [dict(state)], rule)
    assert torch.equal(longer, torch.ones(600))


def test_without_a_compiler_nothing_changes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    params, state = [torch.ones(3)], State()
    with pytest.raises(native.NativeError):
        adamw_cpu.eight_bit_step(params, params, [state], Rule(states="8bit"))
    assert not state


def test_autograd_knows_that_the_weights_changed() -> None:
    weight = torch.ones(3, requires_grad=True)
    loss = (weight * weight).sum()
    adamw_cpu.eight_bit_step([weight], [torch.ones(3)], [State()], Rule(states="8bit"))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
