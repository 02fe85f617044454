"""Deliberately broken LoRA kernels and steps, each of which the numbers must give away."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ftlab_kernels import lora, lora_kernels, lora_launch

from tests.kernels.harness import mutant, noticed
from tests.kernels.interpreted.test_lora import check

KERNELS = [
    ("cublas", "out = cast(acc * fp32(factor), ", "out = cast(acc, "),  # the 1 / (1 - p)
    ("cublas", "v = tl.where(expand_mask(byte, BM, BL), v,", "v = tl.where(~expand_mask(byte, BM, BL), v,"),
    (
        "cublas",
        "tl.where(expand_mask(byte, BM, BL), v, 0.0)\n        acc = dot(tl.trans",
        "v\n        acc = dot(tl.trans",
    ),
    ("cublas", "tl.where(expand_mask(byte, BM, BN), x, 0.0)", "x"),  # no mask in the gradient of x
    ("triton", "tl.where(expand_mask(byte, BM, BN), x, 0.0)", "x"),
    ("cublas", "inside = (p < parts)", "inside = (p < parts - 1)"),  # the last part of a sum
    ("cublas", "acc = dot(tl.trans(v), s, acc)", "acc = dot(tl.trans(v), s, tl.zeros_like(acc))"),  # only the last rows
    ("cublas", "acc = dot(tl.trans(t), v, acc)", "acc = dot(tl.trans(t), v, tl.zeros_like(acc))"),
    ("cublas", "tl.store(t_part_ptr + at, t, ", "tl.store(t_part_ptr + at, t * 0.9, "),
    ("cublas", "mask=inside_m & (r < rank)[None, :])", "mask=(m < rows - 1)[:, None] & (r < rank)[None, :])"),
    ("triton", "acc *= fp32(scale)\n", "\n"),
    ("triton", "for start in range(0, columns, BK):", "for start in range(BK, columns, BK):"),
    ("triton", "for start in range(0, features, BK):", "for start in range(BK, features, BK):"),
    ("triton", "return first + pid % in_group % height, pid", "return first, pid"),  # only the first row of tiles
    ("triton dora", "acc *= tl.load(out_scale_ptr + n", "acc += tl.load(out_scale_ptr + n"),
    ("triton dora", "acc += tl.load(bias_ptr + n", "acc -= tl.load(bias_ptr + n"),
    ("cublas dora", "cast(dy * out_scale, ", "cast(dy, "),
    ("cublas dora", "acc += dy * tl.load(z_ptr", "acc += tl.load(z_ptr"),
]

STEPS = [
    ("cublas", "factor = layer.scale * keep", "factor = layer.scale"),
    ("cublas", "factor = layer.scale * keep", "factor = keep"),
    ("cublas", "(factor, layer.scale))", "(factor, 1.0))"),
    ("cublas", "factor=layer.scale, transposed", "transposed"),
    ("cublas dora", "beta=0, alpha=layer.scale", "beta=0"),
    ("cublas", "s, B.t(), alpha=layer.scale", "s, B.t()"),
    ("cublas", "zip(dys[1:], weights[1:], strict=True)", "()"),  # the other layers' dy W
    ("cublas", "factor=keep_scale(call.p), mask", "factor=1.0, mask"),
    ("cublas", "lora_launch.outer(x, t, mask)", "lora_launch.outer(x, t, None)"),
    ("cublas", "if mask is None else lora_launch.masked_product(t, A, mask)", ""),
    ("augmented", "columns = self.weight.shape[1] + self.first", "columns = self.weight.shape[1]"),
    ("augmented", "torch.mul(lora_B.detach(), scale, ", "torch.mul(lora_B.detach(), 1.0, "),
    ("augmented", "self.buffer[:, :columns] = weight.detach()", "self.buffer[:, 1:columns] = weight.detach()[:, 1:]"),
    ("cublas dora", "dy, d_out_scale = ", "_, d_out_scale = "),
    ("cublas dora", "y += layer.bias.detach()", "pass"),
]


def check_way(way: str, module: Any = lora) -> None:
    """Two layers, the second of which takes two passes over dy. way: a path and whether DoRA is on."""
    path, _, dora = way.partition(" ")
    layers = [(70, 5), (36, 40)]
    check(module, path, rows=75, columns=44, layers=layers, bias=True, dora=bool(dora))


def wrong_numbers(check: Callable[[], None]) -> bool:
    """Whether an assertion fails; a mutation that does not run proves nothing."""

    def only_assertions() -> None:
        try:
            check()
        except AssertionError:
            raise
        except Exception as error:
            pytest.fail(f"the mutation does not run: {error!r}")

    return noticed(only_assertions)


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of several blocks at small sizes."""
    monkeypatch.setattr(lora_launch, "PROGRAMS", 4)


@pytest.mark.parametrize("way", sorted({way for way, _, _ in KERNELS + STEPS}))
def test_unbroken(way: str) -> None:
    check_way(way)


@pytest.mark.parametrize(("way", "old", "new"), KERNELS)
def test_a_broken_kernel(way: str, old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_launch, "kernels", mutant(lora_kernels, tmp_path, old, new))
    assert wrong_numbers(lambda: check_way(way))


@pytest.mark.parametrize(("way", "old", "new"), STEPS)
def test_a_broken_step(way: str, old: str, new: str, tmp_path: Path) -> None:
    broken = mutant(lora, tmp_path, old, new)
    assert wrong_numbers(lambda: check_way(way, broken))
