"""What the C step of AdamW with 8-bit moments is compared on, bit for bit, with the plain one."""

from __future__ import annotations

from typing import Any

import torch
from ftlab_kernels import adamw_cpu
from ftlab_kernels.adamw import Rule, reference_step
from torch import Tensor

State = dict[str, Any]
SHAPES = [(1,), (255,), (256,), (257,), (16, 576), (3, 5, 7), (40, 256)]


def drawn(seed: int, scale: float = 1.0) -> list[Tensor]:
    """One tensor of each shape, whose magnitudes lie many powers of ten apart."""
    generator = torch.Generator().manual_seed(seed)
    normal = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [scale * x * 10 ** (2 * torch.randn(x.shape, generator=generator)) for x in normal]


def both(
    rule: Rule, grads: list[list[Tensor]]
) -> tuple[tuple[list[Tensor], list[State]], tuple[list[Tensor], list[State]]]:
    """Weights and states after a step for each of `grads`: by C, and by the reference."""
    ends = []
    for step in (adamw_cpu.eight_bit_step, reference_step):
        params, states = drawn(0), [State() for _ in SHAPES]
        for each in grads:
            step(params, each, states, rule)
        ends.append((params, states))
    return ends[0], ends[1]


def assert_same(found: tuple[list[Tensor], list[State]], wanted: tuple[list[Tensor], list[State]]) -> None:
    for p, q in zip(found[0], wanted[0], strict=True):
        assert torch.equal(p, q)
    for ours, theirs in zip(found[1], wanted[1], strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name].dtype == value.dtype
            assert torch.equal(ours[name], value), name


def steps_case(rule: Rule) -> None:
    """Seven steps of every shape."""
    assert_same(*both(rule, [drawn(seed, 1e-3) for seed in range(1, 8)]))


def tiny_case() -> None:
    """Blocks whose scale is 0, just below and above what counts as 0, and whose v is subnormal or becomes 0."""
    rule = Rule(lr=1e-3, states="8bit")
    for scale in (0.0, 1e-37, 3e-30, 1e-28, 1e-19, 1e-16):
        grads = [scale * torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in SHAPES]
        grads[-1][3, 100:110] *= 1e-6  # whose v is below the first code
        assert_same(*both(rule, [grads, grads, [torch.zeros_like(g) for g in grads]]))
