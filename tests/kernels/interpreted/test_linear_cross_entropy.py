"""The head and its loss: every option against all logits at once, and what must not be made, read or waited for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ftlab_kernels import linear_cross_entropy as kernel
from ftlab_kernels.common import INTERPRETED, KernelUnavailableError
from ftlab_kernels.linear_cross_entropy import SoftTargets, rows_per_chunk
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.harness import (
    ABSOLUTE,
    DTYPES,
    assert_close,
    device,
    guarded_memory,
    mutant,
    name_of,
    noticed,
    random,
    run,
    strided,
)

IGNORED = -100
WIDTH = 24
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.2},
    "z": {"z_loss": 0.01},
    "soft": {"temperature": 2.0, "mix": 0.4},
    "all": {"label_smoothing": 0.1, "z_loss": 0.002, "temperature": 0.7, "mix": 0.6},
}


def labels_for(rows: int, vocabulary: int, ignored: float = 0.0, seed: int = 0) -> Tensor:
    """Labels with both ends of the vocabulary among them; a share of the rows has none."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    labels[: min(rows, 2)] = torch.tensor([vocabulary - 1, 0])[: min(rows, 2)]
    labels[torch.rand(rows, generator=generator) < ignored] = IGNORED
    return labels.to(device())


def problem(rows: int, vocabulary: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> dict[str, Tensor]:
    """hidden and weight whose logits have the deviation `scale`, and a teacher's logits."""
    return {
        "hidden": random(rows, WIDTH, dtype=dtype, scale=scale),
        "weight": random(vocabulary, WIDTH, dtype=dtype, scale=WIDTH**-0.5, seed=1),
        "teacher": random(rows, vocabulary, dtype=dtype, scale=max(scale, 1.5), seed=2),
    }


def asked(options: Mapping[str, Any], teacher: Tensor) -> dict[str, Any]:
    """Keywords of one call; temperature and mix become soft targets."""
    rest = {name: value for name, value in options.items() if name not in ("temperature", "mix")}
    if "mix" in options:
        rest["soft_targets"] = SoftTargets(teacher, temperature=options["temperature"], mix=options["mix"])
    return rest


def check(
    module: ModuleType = kernel,
    shape: tuple[int, int] = (17, 1000),
    dtype: torch.dtype = torch.float32,
    options: Mapping[str, Any] = OPTIONS["plain"],
    ignored: float = 0.3,
    scale: float = 1.0,
    chunk: int | None = 7,
) -> None:
    """The loss and both gradients by the rule of `judge`, with an absolute term in proportion to what is judged.

    Torch's own error in a sum can be zero by luck, so that twice that is no bound.
    """
    labels = labels_for(*shape, ignored)

    def ours(hidden: Tensor, weight: Tensor, teacher: Tensor) -> Tensor:
        soft = asked(options, teacher)
        if "soft_targets" in soft:
            soft["soft_targets"] = module.SoftTargets(**vars(soft["soft_targets"]))
        return module.linear_cross_entropy(hidden, weight, labels, chunk=chunk, **soft)

    def theirs(hidden: Tensor, weight: Tensor, teacher: Tensor) -> Tensor:
        return kernel.reference(hidden, weight, labels, **asked(options, teacher))

    compare(ours, theirs, problem(*shape, dtype, scale))


def compare(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], inputs: Mapping[str, Tensor]) -> None:
    wanted, upstream = ["hidden", "weight"], random(1, seed=5).squeeze()
    truth = run(theirs, {name: x.double() for name, x in inputs.items()}, [upstream.double()], wanted)
    eager = run(theirs, inputs, [upstream], wanted)
    with guarded_memory():
        actual = run(ours, inputs, [upstream], wanted)
    dtype = inputs["hidden"].dtype
    assert actual["out0"].dtype == torch.float32
    assert actual["out0"].dim() == 0
    assert actual["d_hidden"].dtype == dtype
    of_loss = max(torch.finfo(torch.float32).eps, torch.finfo(dtype).eps / 8)
    for name, exact in truth.items():
        size = float(exact.abs().max()) if exact.numel() else 0.0
        absolute = of_loss * size + ABSOLUTE[dtype] if name == "out0" else ABSOLUTE[dtype] * max(size, 1.0)
        assert_close(actual[name], exact, eager[name], 2.0, absolute, name)


CASES = [((65, 37), "plain"), ((17, 1000), "all"), ((17, 37), "soft"), ((9, 1000), "smoothed"), ((5, 1000), "z")]
CASES += [((5, 4099), "plain"), ((5, 4099), "all")]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(("shape", "options"), CASES, ids=str)
def test_loss_and_gradients(shape: tuple[int, int], options: str, dtype: torch.dtype) -> None:
    check(shape=shape, dtype=dtype, options=OPTIONS[options])


@pytest.mark.parametrize("shape", [(1, 37), (3, 1), (2, 16), (2, 2048), (2, 2049), (1, 8191), (1, 16400)], ids=str)
def test_edges_of_the_blocks(shape: tuple[int, int]) -> None:
    for options in ("all", "smoothed"):  # a teacher halves the block
        check(shape=shape, options=OPTIONS[options], ignored=0.0)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 12), st.integers(1, 90), st.integers(1, 25), st.floats(0, 1), st.sampled_from(sorted(OPTIONS)))
def test_any_shape(rows: int, vocabulary: int, chunk: int, ignored: float, options: str) -> None:
    check(shape=(rows, vocabulary), chunk=chunk, ignored=ignored, options=OPTIONS[options])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_large_logits(options: dict[str, Any]) -> None:
    check(shape=(6, 300), options=options, scale=1e4)


def test_a_large_offset_changes_nothing() -> None:
    """Logits near 1e4 that differ by about 1: what is lost when log-sum-exp is made before the difference."""
    inputs = problem(5, 300)
    inputs["hidden"][:, 0], inputs["weight"][:, 0] = 100.0, 100.0
    labels = labels_for(5, 300)
    compare(
        lambda hidden, weight, teacher: kernel.linear_cross_entropy(hidden, weight, labels),
        lambda hidden, weight, teacher: kernel.reference(hidden, weight, labels),
        inputs,
    )


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
def test_it_is_torchs_cross_entropy(label_smoothing: float) -> None:
    x, labels = problem(9, 50), labels_for(9, 50, 0.4)
    ours = kernel.linear_cross_entropy(x["hidden"], x["weight"], labels, label_smoothing=label_smoothing)
    logits = x["hidden"] @ x["weight"].t()
    theirs = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)
    torch.testing.assert_close(ours, theirs)


def test_the_references_gradient() -> None:
    """By finite differences, in fp64."""
    x = {name: value.double() for name, value in problem(3, 7).items()}
    hidden, weight = x["hidden"].requires_grad_(), x["weight"].requires_grad_()
    labels = labels_for(3, 7)
    assert torch.autograd.gradcheck(
        lambda h, w: kernel.reference(h, w, labels, **asked(OPTIONS["all"], x["teacher"])), (hidden, weight)
    )


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def leaves(rows: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x = problem(rows, vocabulary, dtype)
    return x["hidden"].requires_grad_(), x["weight"].requires_grad_()


@pytest.mark.parametrize("ignore_index", [IGNORED, None, 7])
def test_no_rows(ignore_index: int | None) -> None:
    """No row at all, and rows of which none has a label: 0, connected, with gradients of zeros."""
    for rows in (0, 4) if ignore_index is not None else (0,):
        hidden, weight = leaves(rows, 37)
        labels = torch.full((rows,), ignore_index or 0, dtype=torch.int64, device=device())
        with guarded_memory():
            loss = kernel.linear_cross_entropy(hidden, weight, labels, ignore_index=ignore_index, z_loss=1.0)
            value, d_hidden, d_weight = gradients(loss, hidden, weight)
        assert float(value) == 0
        assert torch.equal(d_hidden, torch.zeros_like(hidden))
        assert torch.equal(d_weight, torch.zeros_like(weight))


@pytest.mark.parametrize("chunk", [1, 5, 16, 100])
def test_chunks_add_up(chunk: int) -> None:
    hidden, weight = leaves(17, 200)
    labels = labels_for(17, 200, 0.2)
    whole = gradients(kernel.linear_cross_entropy(hidden, weight, labels, chunk=17), hidden, weight)
    parts = gradients(kernel.linear_cross_entropy(hidden, weight, labels, chunk=chunk), hidden, weight)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_twice_the_same(dtype: torch.dtype) -> None:
    hidden, weight = leaves(9, 300, dtype)
    labels = labels_for(9, 300, 0.3)
    first, second = (
        gradients(kernel.linear_cross_entropy(hidden, weight, labels, chunk=4, z_loss=0.1), hidden, weight)
        for _ in range(2)
    )
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_rows_without_a_label_are_as_if_not_there() -> None:
    hidden, weight = leaves(24, 60)
    labels = labels_for(24, 60, 0.5)
    kept = labels != IGNORED
    teacher = problem(24, 60)["teacher"]
    loss = kernel.linear_cross_entropy(hidden, weight, labels, chunk=5, soft_targets=SoftTargets(teacher))
    value, d_hidden, d_weight = gradients(loss, hidden, weight)
    few = hidden.detach()[kept].requires_grad_()
    alone = kernel.linear_cross_entropy(
        few, weight, labels[kept], ignore_index=None, chunk=5, soft_targets=SoftTargets(teacher[kept])
    )
    only, d_few, d_same = gradients(alone, few, weight)
    assert torch.equal(value, only)
    assert torch.equal(d_hidden[kept], d_few)
    assert not d_hidden[~kept].any()
    assert torch.equal(d_weight, d_same)


@pytest.mark.parametrize("options", ["soft", "all"])
@pytest.mark.parametrize("ignored", [0.0, 0.5])
def test_a_teachers_logits_may_be_made_here(options: str, ignored: float) -> None:
    hidden, weight = leaves(11, 75)
    labels = labels_for(11, 75, ignored)
    states, head = random(11, 40, seed=6), random(75, 40, scale=0.2, seed=7)
    given_options = asked(OPTIONS[options], states @ head.t())
    soft = given_options.pop("soft_targets")
    made = SoftTargets(hidden=states, weight=head, temperature=soft.temperature, mix=soft.mix)
    one, other = (
        gradients(
            kernel.linear_cross_entropy(hidden, weight, labels, chunk=4, soft_targets=targets, **given_options),
            *(hidden, weight),
        )
        for targets in (soft, made)
    )
    for x, y in zip(one, other, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_a_teacher_may_rule_tokens_out() -> None:
    hidden, weight = leaves(4, 50)
    teacher = problem(4, 50)["teacher"]
    teacher[:, 20:] = -math.inf
    labels = labels_for(4, 50)
    soft = SoftTargets(teacher, mix=1.0)
    loss = kernel.linear_cross_entropy(hidden, weight, labels, soft_targets=soft)
    student, wanted = F.log_softmax(hidden @ weight.t(), -1)[:, :20], F.log_softmax(teacher[:, :20], -1)
    torch.testing.assert_close(loss, F.kl_div(student, wanted, reduction="sum", log_target=True))
    assert all(bool(x.isfinite().all()) for x in gradients(loss, hidden, weight))


def test_a_teacher_like_the_student_teaches_nothing() -> None:
    hidden, weight = leaves(4, 50)
    soft = SoftTargets(hidden=hidden.detach(), weight=weight.detach(), temperature=3.0, mix=1.0)
    loss = kernel.linear_cross_entropy(hidden, weight, labels_for(4, 50), soft_targets=soft)
    for x in gradients(loss, hidden, weight):
        torch.testing.assert_close(x, torch.zeros_like(x), rtol=0, atol=2e-5)


@pytest.mark.parametrize("wrong", [60, -1, 2**40, IGNORED, -(2**63)])
def test_a_label_outside_the_vocabulary_is_not_a_number(wrong: int) -> None:
    hidden, weight = leaves(5, 60)
    labels = labels_for(5, 60)
    right = gradients(kernel.linear_cross_entropy(hidden, weight, labels), hidden, weight)
    labels[3] = wrong
    with guarded_memory():
        loss = kernel.linear_cross_entropy(hidden, weight, labels, ignore_index=None)
        value, d_hidden, d_weight = gradients(loss, hidden, weight)
    assert bool(value.isnan())
    assert bool(d_hidden[3].isnan().all())
    assert bool(d_weight.isnan().all())
    others = torch.tensor([0, 1, 2, 4], device=device())
    assert torch.equal(d_hidden[others], right[1][others])


def test_a_logit_that_is_not_a_number_shows() -> None:
    hidden, weight = leaves(3, 60)
    with torch.no_grad():
        weight[40, 3] = math.nan
    loss = kernel.linear_cross_entropy(hidden, weight, labels_for(3, 60))
    assert bool(loss.isnan())


# --- what must not be made, read or waited for --------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Writes down each operation's name, the shapes of its tensors, and the bytes of the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[tuple[int, ...]]]] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func.overloadpacket.__name__, [tuple(x.shape) for x in args if isinstance(x, Tensor)]))
        for x in out if isinstance(out, (list, tuple)) else (out,):
            self.largest = max(self.largest, x.nbytes if isinstance(x, Tensor) else 0)
        return out

    def names(self) -> set[str]:
        return {name for name, _ in self.calls}

    def product_rows(self, vocabulary: int) -> list[int]:
        """Of each product with a matrix of logits: their rows."""
        shapes = [shapes for name, shapes in self.calls if name in ("mm", "addmm", "addmm_")]
        pairs = [(left, right) for *_, left, right in shapes]
        return [left[1] if left[0] == vocabulary else left[0] for left, _ in pairs]


@pytest.mark.parametrize(
    ("wants", "products"), [((True, False), 2), ((False, True), 2), ((True, True), 3), ((False, False), 1)]
)
def test_only_the_products_that_are_needed(wants: tuple[bool, bool], products: int) -> None:
    hidden, weight = (x.detach().requires_grad_(want) for x, want in zip(leaves(20, 90), wants, strict=True))
    labels = labels_for(20, 90, 0.5)
    with Recorder() as seen:
        loss = kernel.linear_cross_entropy(hidden, weight, labels, chunk=1000)
    assert loss.requires_grad == any(wants)
    assert seen.product_rows(90) == [int((labels != IGNORED).sum())] * products


def test_no_gradients_under_no_grad() -> None:
    hidden, weight = leaves(6, 90)
    labels = labels_for(6, 90)
    with torch.no_grad(), Recorder() as seen:
        loss = kernel.linear_cross_entropy(hidden, weight, labels)
    assert not loss.requires_grad
    assert len(seen.product_rows(90)) == 1
    torch.testing.assert_close(loss, kernel.linear_cross_entropy(hidden, weight, labels).detach(), rtol=1e-6, atol=0)


def test_never_all_logits() -> None:
    """40 rows of 1000 logits in chunks of 5: nothing larger than a chunk of logits or a gradient is made or kept."""
    hidden, weight = leaves(40, 1000)
    labels = labels_for(40, 1000, 0.2)
    soft = SoftTargets(hidden=random(40, 12, seed=3), weight=random(1000, 12, seed=4))
    kept: list[int] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with Recorder() as seen, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = kernel.linear_cross_entropy(hidden, weight, labels, chunk=5, soft_targets=soft)
        gradients(loss, hidden, weight)
    assert seen.largest == 4 * max(5 * 1008, 1000 * WIDTH) < 4 * 40 * 1000
    assert max(kept) == 1000 * WIDTH


def test_nothing_waits_for_the_device() -> None:
    hidden, weight = leaves(9, 90)
    labels = labels_for(9, 90)
    soft = SoftTargets(problem(9, 90)["teacher"])
    loss = kernel.linear_cross_entropy(hidden, weight, labels, ignore_index=None, soft_targets=soft)  # compiled now
    gradients(loss, hidden, weight)
    waiting = {"_local_scalar_dense", "nonzero", "is_nonzero", "item"}
    if not INTERPRETED:
        torch.cuda.set_sync_debug_mode("error")
    try:
        with Recorder() as seen:
            loss = kernel.linear_cross_entropy(hidden, weight, labels, ignore_index=None, soft_targets=soft)
            (loss * 0.5).backward()
    finally:
        if not INTERPRETED:
            torch.cuda.set_sync_debug_mode("default")
    assert not seen.names() & waiting
    with Recorder() as seen:
        kernel.linear_cross_entropy(hidden, weight, labels)
    assert "nonzero" in seen.names()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_the_upstream_gradient_is_not_rounded(dtype: torch.dtype) -> None:
    hidden, weight = leaves(5, 90, dtype)
    loss = kernel.linear_cross_entropy(hidden, weight, labels_for(5, 90))
    one, third = torch.ones((), device=device()), torch.full((), 1 / 3, device=device())
    (plain,) = torch.autograd.grad(loss, hidden, one, retain_graph=True)
    for _ in range(2):  # and what is kept for it is not used up
        (scaled,) = torch.autograd.grad(loss, hidden, third, retain_graph=True)
        assert torch.equal(scaled, (plain.float() * third).to(dtype))


def test_small_probabilities_in_fp16() -> None:
    """Every token but the label at 2e-7, three units of fp16: their rows of the weight's gradient keep their size."""
    fp16_gradients(kernel)


def fp16_gradients(module: ModuleType) -> None:
    hidden = torch.zeros(4, 16, dtype=torch.float16, device=device())
    hidden[:, 0] = 1.0
    weight = torch.zeros(64, 16, dtype=torch.float16, device=device())
    weight[0, 0] = 15.5
    labels = torch.zeros(4, dtype=torch.int64, device=device())
    (exact,) = torch.autograd.grad(
        kernel.reference(hidden.double(), (wide := weight.double().requires_grad_()), labels) * 4096.0, wide
    )
    loss = module.linear_cross_entropy(hidden, weight.requires_grad_(), labels)
    (d_weight,) = torch.autograd.grad(loss * 4096.0, weight)
    torch.testing.assert_close(d_weight[1:, 0].double(), exact[1:, 0], rtol=0.02, atol=0)


def test_strided_inputs_are_read_right() -> None:
    x, labels = problem(9, 70), labels_for(9, 70, 0.3)
    soft, plain = (SoftTargets(teacher) for teacher in (strided(x["teacher"]), x["teacher"]))
    variants = [
        (strided(x["hidden"]), strided(x["weight"]), soft),
        (x["hidden"], x["weight"].t().contiguous().t(), SoftTargets(x["teacher"].t().contiguous().t())),
    ]
    expected = kernel.linear_cross_entropy(x["hidden"], x["weight"], labels, soft_targets=plain)
    for hidden, weight, targets in variants:
        every_second = torch.stack([labels, labels], 1)[:, 0]
        found = kernel.linear_cross_entropy(hidden, weight, every_second, soft_targets=targets)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_under_autocast() -> None:
    """Products in autocast's dtype, gradients in each input's own."""
    hidden, weight = leaves(7, 90)
    labels = labels_for(7, 90, 0.3)
    teacher = SoftTargets(hidden=random(7, 16, seed=3), weight=random(90, 16, seed=4))
    low = SoftTargets(hidden=random(7, 16, seed=3).bfloat16(), weight=random(90, 16, seed=4).bfloat16())
    with torch.autocast(device().type, torch.bfloat16):
        loss = kernel.linear_cross_entropy(hidden, weight, labels, soft_targets=teacher)
    found = gradients(loss, hidden, weight)
    small = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    expected = gradients(kernel.linear_cross_entropy(*small, labels, soft_targets=low), *small)
    assert torch.equal(found[0], expected[0])
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one.bfloat16(), other)


def test_mixed_dtypes_follow_hidden() -> None:
    hidden, weight = leaves(4, 60)
    low = weight.detach().bfloat16().requires_grad_()
    labels = labels_for(4, 60)
    loss, d_weight = gradients(kernel.linear_cross_entropy(hidden, low, labels), low)
    assert d_weight.dtype == torch.bfloat16
    assert torch.equal(loss, kernel.linear_cross_entropy(hidden, low.float(), labels).detach())


def test_chunk_sizes() -> None:
    assert rows_per_chunk(128256, 4096, trainable=False) == 1024
    assert rows_per_chunk(128256, 4096, trainable=True) == 2048
    assert rows_per_chunk(49152, 576, trainable=False) == 2688
    assert rows_per_chunk(256000, 2304, trainable=False) == 512
    assert rows_per_chunk(10**7, 1, trainable=True) == 256
    for rows in (0, 1, 127, 1024, 1025, 5000, 8192):
        size = kernel._even(rows, 1024)
        assert size % 128 == 0
        assert size <= 1024
        assert -(-rows // size) == -(-rows // 1024), "no more chunks than needed"


def test_what_does_not_fit_is_refused() -> None:
    x, labels = problem(4, 9), labels_for(4, 9)
    hidden, weight, teacher = x["hidden"], x["weight"], x["teacher"]
    call = kernel.linear_cross_entropy
    wrong: list[tuple[str, Callable[[], object]]] = [
        ("must be \\[N, D\\]", lambda: call(hidden[:, :5], weight, labels)),
        ("must be \\[N, D\\]", lambda: call(hidden[None], weight, labels)),
        ("V > 0", lambda: call(hidden, weight[:0], labels)),
        ("int64 \\[4\\]", lambda: call(hidden, weight, labels[:3])),
        ("int64 \\[4\\]", lambda: call(hidden, weight, labels.int())),
        ("fp32, fp16 and bf16", lambda: call(hidden.double(), weight.double(), labels)),
        ("label_smoothing", lambda: call(hidden, weight, labels, label_smoothing=1.5)),
        ("z_loss", lambda: call(hidden, weight, labels, z_loss=-1.0)),
        ("chunk", lambda: call(hidden, weight, labels, chunk=0)),
        ("teacher's logits", lambda: call(hidden, weight, labels, soft_targets=SoftTargets(teacher[:, 1:]))),
        ("teacher's hidden", lambda: call(hidden, weight, labels, soft_targets=SoftTargets(None, hidden[1:], weight))),
        ("either logits", lambda: SoftTargets()),
        ("either logits", lambda: SoftTargets(teacher, hidden, weight)),
        ("either logits", lambda: SoftTargets(hidden=hidden)),
        ("temperature", lambda: SoftTargets(teacher, temperature=0.0)),
        ("mix", lambda: SoftTargets(teacher, mix=1.1)),
    ]
    for message, attempt in wrong:
        with pytest.raises(ValueError, match=message):
            attempt()
    with pytest.raises((KernelUnavailableError, ValueError)):
        call(hidden.to("meta"), weight.to("meta"), labels.to("meta"), ignore_index=None)


def broad(module: ModuleType) -> None:
    """Every option, more than one block of the vocabulary, large logits: what a mutation has to get past."""
    check(module, shape=(4, 4099), options=OPTIONS["plain"], ignored=0.0, chunk=3)
    check(module, shape=(6, 300), options=OPTIONS["all"], ignored=0.5, chunk=2)
    check(module, shape=(3, 60), options=OPTIONS["plain"], scale=1e3)
    fp16_gradients(module)


MUTATIONS = {
    "onehot dropped": ("g = tl.where(v == place, g - of_label, g)", "g = g"),
    "maximum not subtracted": ("higher = tl.maximum(peak, tl.max(z, 1))", "higher = peak * 0.0"),
    "last block skipped": ("range(0, padded, LINES * 8)", "range(0, padded - LINES * 8, LINES * 8)"),
    "last block's gradient skipped": ("for index in range(blocks)", "for index in range(1, blocks)"),
    "smoothing's sign": ("hard += smoothing", "hard -= smoothing"),
    "smoothing's sign in the gradient": ("g -= of_all", "g += of_all"),
    "smoothed label": ("(1.0 - mix) * (1.0 - smoothing)", "(1.0 - mix)"),
    "z loss without its gradient": ("2.0 * fp32(z_loss) * lse", "0.0 * lse"),
    "temperature once": ("mix * kl / (inverse_t * inverse_t)", "mix * kl / inverse_t"),
    "teacher's gradient": ("- _exp(t * inverse_t) * of_teacher", ""),
    "sums of old maxima": ("total = total * _exp(peak - higher) +", "total = total +"),
    "padding read": ("x = tl.where(v < vocabulary, x, float", "x = tl.where(v <= vocabulary, x, float"),
    "only the last chunk": ("beta=int(start > 0)", "beta=0"),
    "upstream ignored": ("y = x * tl.load(upstream_ptr).to(tl.float32)", "y = x"),
    "fp16 not scaled back": ("alpha=1 / scale)", "alpha=1)"),
    "fp16 not scaled": ("FP16_SCALE = 64.0", "FP16_SCALE = 1.0"),
    "rows not gathered for the teacher": ("GATHER=rows is not None", "GATHER=False"),
}


@pytest.mark.parametrize(("old", "new"), MUTATIONS.values(), ids=MUTATIONS.keys())
def test_a_broken_kernel_is_noticed(old: str, new: str, tmp_path: Path) -> None:
    broken = mutant(kernel, tmp_path, old, new)
    assert noticed(lambda: broad(broken))


def test_the_unbroken_kernel_passes() -> None:
    broad(kernel)
