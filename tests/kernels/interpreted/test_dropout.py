"""Dropout and the mask that all kernels share."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from ftlab_kernels import dropout as kernel
from ftlab_kernels import random as random_module
from ftlab_kernels.common import KernelUnavailableError
from ftlab_kernels.random import (
    draw_seed,
    keep_scale,
    mask_bytes,
    philox_reference,
    threshold,
    unpack_mask,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.harness import DTYPES, device, judge, mutant, name_of, noticed, random, strided


def seed(number: int = 0x1234_5678_9ABC_DEF0) -> Tensor:
    return torch.tensor([number], dtype=torch.int64, device=device())


def check(module: ModuleType = kernel, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (17, 37)) -> None:
    x, up = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    judge(
        lambda x: module.dropout(x, 0.3, seed=seed()),
        lambda x: kernel.reference(x, 0.3, seed()),
        {"x": x},
        [up],
        ["x"],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", [(1, 8), (17, 37), (257, 16), (3, 5, 129), (2, 1100)], ids=str)
def test_output_and_gradient(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check(dtype=dtype, shape=shape)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(1, 70), st.floats(0.001, 0.999), st.integers(-(2**63), 2**63 - 1))
def test_any_shape(rows: int, columns: int, p: float, number: int) -> None:
    x = random(rows, columns)
    y = kernel.dropout(x, p, seed=seed(number))
    assert torch.equal(y, kernel.reference(x, p, seed(number)))


def test_strided_rows_are_read_right() -> None:
    x = random(9, 24)
    assert torch.equal(kernel.dropout(strided(x), 0.5, seed=seed()), kernel.dropout(x, 0.5, seed=seed()))


def test_the_mask_of_the_backward_is_that_of_the_forward() -> None:
    x = torch.ones(64, 40, device=device(), requires_grad=True)
    y = kernel.dropout(x, 0.4)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(y, dx)
    assert 0.2 < float((y == 0).float().mean()) < 0.6


def test_philox_is_the_published_one() -> None:
    """Known answers of the Random123 distribution (kat_vectors), 7 and 10 rounds, counter and key all ones or zero."""
    zero = torch.zeros(1, dtype=torch.int64)
    words = [int(word) for word in philox_reference(0, zero, 7)]
    assert words == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    words = [int(word) for word in philox_reference(0, zero, 10)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_mask_statistics(p: float) -> None:
    """The share dropped, by element, by lane and from one element to the next, within 4.5 standard errors."""
    keep = unpack_mask(mask_bytes(seed(7), 512, 512, p), 512).float()
    share, sd = threshold(p) / 65536, (p * (1 - p)) ** 0.5
    assert abs(float(1 - keep.mean()) - share) < 4.5 * sd / 512
    for lane in range(8):
        assert abs(float(1 - keep[:, lane::8].mean()) - share) < 4.5 * sd / (512 * 64) ** 0.5
    centred = keep - (1 - share)
    for shift in (1, 2, 8):
        product = float((centred[:, :-shift] * centred[:, shift:]).mean()) / (p * (1 - p))
        assert abs(product) < 4.5 / 512
    other = unpack_mask(mask_bytes(seed(8), 512, 512, p), 512).float() - (1 - share)
    assert abs(float((centred * other).mean()) / (p * (1 - p))) < 4.5 / 512


def test_the_mean_is_kept() -> None:
    for p in (0.1, 0.123456, 0.5):
        assert keep_scale(p) * (1 - threshold(p) / 65536) == pytest.approx(1.0, abs=1e-12)


def test_seeds_follow_torchs_generator() -> None:
    torch.manual_seed(3)
    first, second = draw_seed(device()), draw_seed(device())
    torch.manual_seed(3)
    assert torch.equal(draw_seed(device()), first)
    assert not torch.equal(first, second)


def test_nothing_to_drop() -> None:
    x = random(3, 5)
    assert kernel.dropout(x, 0.0) is x
    assert kernel.dropout(x, 0.5, training=False) is x
    empty = x[:0]
    assert kernel.dropout(empty, 0.5) is empty
    for p in (-0.1, 1.0):
        with pytest.raises(ValueError, match="in \\[0, 1\\)"):
            kernel.dropout(x, p)


def test_another_device_is_refused() -> None:
    with pytest.raises((KernelUnavailableError, ValueError)):
        kernel.dropout(torch.empty(2, 8, device="meta"), 0.5, seed=seed())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("x * fp32(scale), 0.0)", "x, 0.0)"),  # the 1 / (1 - p)
        ("tl.where(keep,", "tl.where(~keep,"),  # the mask the other way round
        ("byte = byte & used[None, :]", "byte = 255 - byte"),  # another mask kept than used
        ("mask=inside)\n\n\ndef", "mask=inside & (m < rows - 1)[:, None])\n\n\ndef"),  # the last row
    ],
)
def test_a_broken_kernel_is_noticed(old: str, new: str, tmp_path: Path) -> None:
    broken = mutant(kernel, tmp_path, old, new)
    assert noticed(lambda: check(broken))
    assert not noticed(check)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(_at_least(w1, low, inverse) << 2)", "(_at_least(w1, low, inverse) << 1)"),
        ("carry = (word | 0x80008000) - low", "carry = word - low"),
        ("key_1 = (key_1 + 0xBB67AE85)", "key_1 = (key_1 + 0xBB67AE84)"),
    ],
)
def test_a_broken_generator_is_noticed(old: str, new: str, tmp_path: Path) -> None:
    generator = mutant(random_module, tmp_path, old, new)
    broken = mutant(kernel, tmp_path, "from ftlab_kernels.random import (", f"from {generator.__name__} import (")
    x = torch.ones(64, 4096, device=device())
    wanted = kernel.reference(x, 0.3, seed(-1))
    assert torch.equal(kernel.dropout(x, 0.3, seed=seed(-1)), wanted)
    assert not torch.equal(broken.dropout(x, 0.3, seed=seed(-1)), wanted)
