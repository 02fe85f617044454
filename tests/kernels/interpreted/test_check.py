"""A checked kernel is the kernel itself, bit for bit, and stops where it differs from its reference."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from ftlab_kernels import dropout as kernel
from ftlab_kernels.adapted import Adapted
from ftlab_kernels.check import CheckLog, Comparison, KernelMismatchError, checked, compare
from ftlab_kernels.random import draw_seed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.kernels.harness import DTYPES, device, mutant, name_of, random


def generator_state() -> Tensor:
    return torch.cuda.get_rng_state() if device().type == "cuda" else torch.get_rng_state()


def leaf(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return random(*shape, dtype=dtype, seed=seed).requires_grad_()


class _Scaled(torch.autograd.Function):
    """x * forward, whose gradient is said to be backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.backward = backward
        return x * forward

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return upstream * ctx.backward, None, None


def scaled(x: Tensor, forward: float = 1.0, backward: float = 1.0) -> Tensor:
    out: Tensor = _Scaled.apply(x, forward, backward)
    return out


# --- the kernel itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("named", [{}, {"seed": None}, {"training": True}], ids=str)
def test_a_checked_run_is_the_unchecked_one(dtype: torch.dtype, named: dict[str, Any]) -> None:
    """Outputs, gradients and the generator afterwards: bit for bit."""

    def step(dropout: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        torch.manual_seed(5)
        x = leaf(17, 37, dtype=dtype)
        y = dropout(dropout(x, 0.3, **named), 0.1, **named)
        y.backward(random(17, 37, dtype=dtype, seed=1))
        assert x.grad is not None
        return y, x.grad, generator_state()

    log = CheckLog()
    plain, compared = (
        step(kernel.dropout),
        step(checked("dropout", kernel.dropout, kernel.reference, on_result=log.add)),
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, compared, strict=True))
    assert log.counts["dropout"] == 4
    assert log.worst["dropout"].close


def test_nothing_is_drawn_where_the_kernel_draws_nothing() -> None:
    dropout = checked("dropout", kernel.dropout, kernel.reference)
    before = generator_state()
    x = leaf(3, 8)
    dropout(x, 0.0).sum().backward()
    assert torch.equal(generator_state(), before)
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))


def test_a_seed_may_come_from_the_caller_from_a_place_or_from_neither() -> None:
    def by_place(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
        return kernel.dropout(x, p, seed=seed)

    x = random(9, 24)
    mine = torch.tensor([77], device=device())
    placed = checked("dropout", by_place, lambda x, seed, p: kernel.reference(x, p, seed))
    hidden = checked("dropout", lambda x, p: kernel.dropout(x, p), kernel.reference)  # only the reference names it
    for seed in (None, mine):
        torch.manual_seed(1)
        expected = kernel.reference(x, 0.4, draw_seed(device()) if seed is None else mine)
        torch.manual_seed(1)
        assert torch.equal(placed(x, seed, 0.4), expected)
        torch.manual_seed(1)
        assert torch.equal(checked("dropout", kernel.dropout, kernel.reference)(x, 0.4, seed=seed), expected)
    torch.manual_seed(1)
    hidden(x, 0.4)


def test_another_mask_is_a_mismatch() -> None:
    """A kernel that does not draw its seed as it should."""

    def drawn_twice(x: Tensor, p: float, seed: Tensor | None = None) -> Tensor:
        draw_seed(x.device)
        return kernel.dropout(x, p, seed=seed)

    with pytest.raises(KernelMismatchError, match="output 0"):
        checked("dropout", drawn_twice, kernel.reference)(random(9, 24), 0.4)


def test_activation_checkpointing() -> None:
    """The recomputation draws the same seed; without and with it, the same gradients."""
    log = CheckLog()
    dropout = checked("dropout", kernel.dropout, kernel.reference, on_result=log.add)

    def block(x: Tensor) -> Tensor:
        return dropout(torch.tanh(dropout(x, 0.3)), 0.3)

    found = []
    for recompute in (False, True):
        torch.manual_seed(2)
        x = leaf(8, 16)
        out = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        out.square().sum().backward()
        found.append((x.grad, generator_state()))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert log.counts["dropout"] > 8


# --- arguments and results --------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclass(frozen=True)
class Options:
    pair: Pair
    table: dict[str, Tensor]
    strict: bool = True

    def __post_init__(self) -> None:
        assert isinstance(self.pair.first, Tensor)


def linears(x: Tensor, adapted: Sequence[Adapted], *, spoil: str = "") -> tuple[Tensor, ...]:
    """Low-rank linears; `spoil` names a field whose gradient is to be wrong."""
    found = []
    for each in adapted:
        parts = {n: getattr(each, n) for n in ("weight", "lora_A", "lora_B")}
        if spoil:
            parts[spoil] = scaled(parts[spoil], 1.0, 1.02)
        low = F.linear(x, parts["lora_A"])
        found.append(F.linear(x, parts["weight"], each.bias) + F.linear(low, parts["lora_B"]) * each.scale)
    return tuple(found)


def adapted(*, frozen: bool = True) -> list[Adapted]:
    def one(out: int, seed: int) -> Adapted:
        weight = random(out, 16, seed=seed).requires_grad_(not frozen)
        return Adapted(weight, None, leaf(4, 16, seed=seed + 1), leaf(out, 4, seed=seed + 2), 0.5)

    return [one(8, 0), one(24, 10)]


def test_dataclasses_in_a_sequence_and_a_tuple_of_outputs() -> None:
    x, layers, log = leaf(5, 16, seed=3), adapted(), CheckLog()
    outputs = checked("lora", linears, linears, on_result=log.add)(x, layers)
    assert type(outputs) is tuple
    torch.autograd.backward(outputs, [random(5, n, seed=n) for n in (8, 24)])
    given = [x.grad, *(g for each in layers for g in (each.lora_A.grad, each.lora_B.grad))]
    assert layers[0].weight.grad is None
    x2, layers2 = leaf(5, 16, seed=3), adapted()
    torch.autograd.backward(linears(x2, layers2), [random(5, n, seed=n) for n in (8, 24)])
    wanted = [x2.grad, *(g for each in layers2 for g in (each.lora_A.grad, each.lora_B.grad))]
    assert all(torch.equal(a, b) for a, b in zip(given, wanted, strict=True))
    assert log.counts["lora"] == 2 + 5


@pytest.mark.parametrize("spoil", ["weight", "lora_A", "lora_B"])
def test_the_wrong_gradient_is_named(spoil: str) -> None:
    wrong = checked("lora", lambda x, layers: linears(x, layers, spoil=spoil), linears)
    outputs = wrong(random(5, 16, seed=3), adapted(frozen=False))
    with pytest.raises(KernelMismatchError, match=rf"gradient of layers\[0\].{spoil} \(float32") as caught:
        sum(out.sum() for out in outputs).backward()
    assert caught.value.comparison.ratio > 1
    assert not caught.value.comparison.close


def test_arguments_without_names_have_those_of_the_reference() -> None:
    def wrong(*arguments: Tensor) -> Tensor:
        return arguments[0] * scaled(arguments[1], 1.0, 1.02)

    def reference(x: Tensor, weight: Tensor) -> Tensor:
        return x * weight

    with pytest.raises(KernelMismatchError, match="gradient of weight"):
        checked("scale", wrong, reference)(leaf(5), leaf(5, seed=1)).sum().backward()
    with pytest.raises(KernelMismatchError, match=r"arguments: arguments\[0\] float32 \[5\], arguments\[1\]"):
        checked("scale", wrong, lambda *arguments: -arguments[0])(leaf(5), leaf(5, seed=1))


def test_a_wrong_gradient_of_a_frozen_tensor_does_not_matter() -> None:
    outputs = checked("lora", lambda x, layers: linears(x, layers, spoil="weight"), linears)(random(5, 16), adapted())
    sum(out.sum() for out in outputs).backward()


def test_what_stands_where_is_kept() -> None:
    """Nested structures come back as they were: named tuples, dictionaries, frozen dataclasses that look inside."""
    seen = []

    def function(x: Tensor, options: Options, *, names: list[Any]) -> dict[str, Any]:
        seen.append((options.strict, names[0], names[2]))
        out = x * options.pair.first + options.pair.second * options.table["third"] + names[1]
        return {"out": out, "rows": torch.tensor(len(x)), "nothing": None, "number": 3}

    x, options = leaf(4, 3), Options(Pair(leaf(3, seed=1), random(3, seed=2)), {"third": leaf(3, seed=3)}, strict=False)
    result = checked("f", function, function)(x, options, names=["a", random(3, seed=4), None])
    assert list(result) == ["out", "rows", "nothing", "number"]
    assert result["nothing"] is None
    assert (result["number"], int(result["rows"]), result["rows"].requires_grad) == (3, 4, False)
    result["out"].sum().backward()
    assert options.table["third"].grad is not None
    assert options.pair.second.grad is None
    assert set(seen) == {(False, "a", None)}


def test_the_same_tensor_twice() -> None:
    x = leaf(6)
    checked("product", torch.mul, torch.mul)(x, x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, 2 * x)


def test_an_output_that_nobody_used() -> None:
    def both(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, y * 3

    x, y = leaf(4), leaf(4, seed=1)
    checked("both", both, both)(x, y)[0].sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full_like(x, 2))
    assert y.grad is None or not y.grad.any()


def test_without_gradients_only_outputs_are_compared() -> None:
    log = CheckLog()
    double = checked("double", lambda x: scaled(x, 2.0, 7.0), lambda x: x * 2, on_result=log.add)
    with torch.no_grad():
        assert not double(leaf(4)).requires_grad
    assert not double(random(4)).requires_grad
    with torch.inference_mode():
        double(random(4))
    assert log.counts["double"] == 3


def test_keywords_that_the_reference_lacks_are_not_for_it() -> None:
    def blocked(x: Tensor, *, block: int = 4) -> Tensor:
        return torch.cat([part * 2 for part in x.split(block)])

    checked("double", blocked, lambda x: x * 2)(random(10), block=3)
    checked("double", blocked, lambda x, **named: x * named["block"])(random(10), block=2)
    with pytest.raises(TypeError):
        checked("double", blocked, lambda x: x * 2)(random(10), blok=3)


def test_autocast_is_torchs_own_for_the_kernel_and_its_reference_and_off_for_the_truth() -> None:
    seen: list[torch.dtype] = []

    def reference(x: Tensor, weight: Tensor) -> Tensor:
        out = F.linear(x, weight)
        seen.append(out.dtype)
        return out

    x, weight, log = leaf(5, 16), leaf(8, 16, seed=1), CheckLog()
    with torch.autocast(device().type, dtype=torch.bfloat16):
        out = checked("linear", F.linear, reference, on_result=log.add)(x, weight)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert seen == [torch.bfloat16, torch.float64, torch.float64, torch.bfloat16]
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert log.worst["linear"].own > 1e-4


def test_needs_a_tensor() -> None:
    with pytest.raises(ValueError, match="no tensor"):
        checked("f", lambda n: n, lambda n: n)(3)


def test_a_graph_serves_one_backward_pass() -> None:
    out = checked("double", lambda x: x * 2, lambda x: x * 2)(leaf(4)).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        out.backward()


def test_nothing_is_kept_alive_after_the_backward_pass() -> None:
    double = checked("double", lambda x, scale: x * scale, lambda x, scale: x * scale)
    x, scale = leaf(4), leaf(4, seed=1)
    middle = x * 1
    kept = weakref.ref(middle)
    out = double(middle, scale)
    del middle
    out.sum().backward()
    gc.collect()
    assert kept() is None
    assert out.requires_grad


# --- what is judged a mismatch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_the_message_says_what_to_know(dtype: torch.dtype) -> None:
    def wrong(x: Tensor, p: float, *, seed: Tensor | None = None) -> Tensor:
        return kernel.dropout(x, p, seed=seed) * 1.1

    x = random(24, 9, dtype=dtype).t()
    dropout = checked("dropout", wrong, kernel.reference)
    torch.manual_seed(3)
    seed = int(draw_seed(device()))
    torch.manual_seed(3)
    with pytest.raises(KernelMismatchError) as caught:
        dropout(x, 0.4)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"dropout: output 0 ({name_of(dtype)} [9, 24]) is off by ")
    assert "torch's own error is" in lines[0]
    assert lines[1] == f"  arguments: x {name_of(dtype)} [9, 24] with strides [1, 9], p = 0.4"
    assert lines[2] == f"  seed of its dropout: {seed}"
    assert "call 1 of dropout" in lines[3]
    assert "torch.manual_seed" in lines[3]


def test_results_of_another_form() -> None:
    x = random(4, 3)
    for function, words in (
        (lambda x: (x, x), "outputs .* are 2, those of the reference 1"),
        (lambda x: x.t(), r"output 0 \(float32 \[3, 4\]\) is float32 \[4, 3\] by the reference"),
        (lambda x: x.half(), r"output 0 \(float16 \[4, 3\]\) is float32 \[4, 3\] by the reference"),
        (lambda x: None, "outputs .* are 0"),
    ):
        with pytest.raises(KernelMismatchError, match=words):
            checked("f", function, lambda x: x)(x)


def test_integers_must_be_equal() -> None:
    x = random(40)
    checked("sign", lambda x: (x > 0).int(), lambda x: (x > 0).int())(x)
    with pytest.raises(KernelMismatchError, match="differs in 1 of 40 elements"):
        checked("sign", lambda x: (x >= x.max()).int(), lambda x: torch.zeros_like(x, dtype=torch.int32))(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_one_wrong_element_in_many(dtype: torch.dtype, size: float) -> None:
    """Also where everything is small, as gradients are."""
    truth = random(1000, 300).double() * size
    eager = truth.to(dtype)
    assert compare(eager, truth, eager).close
    actual = eager.clone()
    actual[-1, -1] += 0.2 * size
    worse = compare(actual, truth, eager)
    assert not worse.close
    assert worse.error == pytest.approx(0.2 * size, rel=0.05)


def test_an_error_spread_over_all_elements() -> None:
    """Each is within its bound, their norm is not."""
    truth = random(1000, 300).double()
    eager = truth.bfloat16()
    worse = compare((truth + float((eager - truth).abs().max())).bfloat16(), truth, eager)
    assert worse.error < worse.bound
    assert not worse.close


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 5, 40]), st.sampled_from(DTYPES))
def test_no_alarm_for_another_order_of_the_same_sums(seed: int, rows: int, dtype: torch.dtype) -> None:
    """A summed loss is one number: torch's own error in it may be 0 by luck, and a checked run must not stop there."""

    def in_two_halves(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(hidden, weight).flip(-1).float()
        halves = torch.stack([part.logsumexp(-1) for part in logits.chunk(2, -1)])
        return (halves.logsumexp(0) - logits[:, -1]).sum()

    def reference(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(hidden, weight)
        labels = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum")

    hidden, weight = leaf(rows, 32, dtype=dtype, seed=seed), leaf(100, 32, dtype=dtype, seed=seed + 1)
    checked("loss", in_two_halves, reference)(hidden, weight).mul(1e-3).backward()


def test_nan_and_infinity() -> None:
    truth = random(100).double()
    nan, inf = truth.clone(), truth.clone()
    nan[3], inf[3] = math.nan, math.inf
    plain = truth.float()
    assert not compare(nan.float(), truth, plain).close
    assert "not finite in 1 of 100" in str(compare(nan.float(), truth, plain))
    assert compare(nan.float(), nan, nan.float()).close
    assert compare(inf.float(), nan, nan.float()).close  # not a number either way
    assert "finite in 1 elements where the reference is not" in str(compare(plain, nan, nan.float()))
    overflown = truth * 1e5
    assert compare(overflown.half(), overflown, overflown.half()).close  # where torch overflows nothing is asked
    assert compare((overflown / 2).half(), overflown, overflown.half()).close is False


def test_nothing_to_compare() -> None:
    x = torch.empty(0, 4, device=device(), requires_grad=True)
    checked("double", lambda x: x * 2, lambda x: x * 2)(x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 4)


def test_the_factor() -> None:
    x = random(64, 64)

    def off(x: Tensor) -> Tensor:
        return torch.sin(x) + 2e-5

    with pytest.raises(KernelMismatchError):
        checked("sin", off, torch.sin)(x)
    checked("sin", off, torch.sin, factor=2000)(x)


def test_what_an_intermediate_number_loses_is_no_mismatch() -> None:
    """Of a loss near 0, exp and log in fp32 leave the rounding of a logit; torch's own subtracts in another order."""

    def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logits = F.linear(hidden, weight)
        return (logits.exp().sum(-1).log() - logits.gather(1, labels[:, None])[:, 0]).sum()

    def reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight), labels, reduction="sum")

    log = CheckLog()
    weight, labels = leaf(50, 32), torch.arange(4, device=device())
    hidden = (weight.detach()[:4] * 0.5 + random(4, 32, seed=1) * 0.1).requires_grad_()
    loss = checked("loss", plain, reference, on_result=log.add)(hidden, weight, labels)
    assert float(loss.detach()) < 0.01
    (loss * 1e-4).backward()
    with pytest.raises(KernelMismatchError):
        checked("loss", lambda *three: plain(*three) + 1e-3, reference)(hidden, weight, labels)
    assert log.counts["loss"] == 3


def test_the_log() -> None:
    log = CheckLog()
    assert str(log) == "no kernel was compared"
    double = checked("double", lambda x: x * 2, lambda x: x * 2, on_result=log.add)
    double(random(4))
    double(leaf(4)).sum().backward()
    wrong = checked("wrong", lambda x: x * 2.5, lambda x: x * 2, on_result=log.add)
    with pytest.raises(KernelMismatchError) as caught:
        wrong(random(4))
    assert log.counts == {"double": 3, "wrong": 1}
    assert log.worst["wrong"] is caught.value.comparison
    assert isinstance(log.worst["double"], Comparison)
    lines = log.lines()
    assert lines[0] == "double: 3 comparisons, at most 0 of what is allowed (output 0)"
    assert lines[1].startswith("wrong: 1 comparison, at most ")
    assert str(log) == "\n".join(lines)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("x * fp32(scale), 0.0)", "x, 0.0)"),
        ("tl.where(keep,", "tl.where(~keep,"),
        ("_launch(dy, dx, mask, mask, ctx.p, draw=False)", "_launch(dy, dx, mask, mask, ctx.p / 2, draw=False)"),
        ("dy = dy.contiguous()", "dy = dy.contiguous().flip(0)"),
    ],
)
def test_a_broken_kernel_is_noticed(old: str, new: str, tmp_path: Path) -> None:
    """The forward ones in the call, the others in the backward pass."""
    broken = mutant(kernel, tmp_path, old, new)
    x = leaf(17, 37)
    with pytest.raises(KernelMismatchError, match="gradient of x" if "dy" in old else "output 0"):
        checked("dropout", broken.dropout, kernel.reference)(x, 0.3).backward(random(17, 37, seed=1))
    checked("dropout", kernel.dropout, kernel.reference)(x, 0.3).backward(random(17, 37, seed=1))
