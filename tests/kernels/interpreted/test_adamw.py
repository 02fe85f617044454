"""AdamW in one pass: against fp64, against torch's own in every composition, and what must not happen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ftlab_kernels import adamw, adamw_kernels, adamw_table, common
from ftlab_kernels.adamw import Anchor, Ewc, FusedAdamW, Rule, reference_step
from ftlab_kernels.common import KernelUnavailableError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.kernels.harness import assert_close, device, guarded_memory, mutant, noticed, random

SIZES = (1, 3, 1023, 1024, 1025, 4097)
FEW = (5, 1030)
LAUNCHED = ("norm_partials", "finish", "update")
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"max_grad_norm": 2.0},
    "not reached": {"max_grad_norm": 1e4},
    "unscaled": {"inv_scale": 2.0**-12, "max_grad_norm": 2.0},
    "anchored": {"pull": 3.0, "max_grad_norm": 2.0},
    "bf16 anchor": {"pull": 3.0, "anchor_dtype": torch.bfloat16},
    "ewc": {"ewc": 2.0, "max_grad_norm": 2.0},
    "all": {"pull": 3.0, "ewc": 2.0, "anchor_dtype": torch.bfloat16, "max_grad_norm": 2.0, "inv_scale": 2.0**-12},
    "no decay": {"rule": {"weight_decay": 0.0, "betas": (0.0, 0.9), "eps": 1e-3}},
}


def weights(sizes: Sequence[int] = FEW, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Parameters; their memory is guarded where a test guards what is allocated."""
    found = []
    for n in sizes:
        memory = torch.empty(n, dtype=dtype, device=device())
        found.append(nn.Parameter(memory.copy_(random(n, dtype=dtype, seed=n))))
    return found


def give_gradients(params: Sequence[Tensor], number: int, scale: float = 1.0) -> list[Tensor]:
    """The gradients of a step, the same for the same number."""
    for index, p in enumerate(params):
        p.grad = (random(*p.shape, dtype=torch.float32, seed=100 * number + index) * scale).to(p.dtype)
    return [p.grad for p in params if p.grad is not None]


def held(params: Sequence[Tensor], variant: dict[str, Any]) -> tuple[list[Anchor] | None, list[Ewc] | None]:
    """Anchors and Fisher information as a variant wants them."""
    dtype = variant.get("anchor_dtype", torch.float32)
    anchors, ewc = None, None
    if strength := variant.get("pull"):
        anchors = [Anchor(random(*p.shape, dtype=dtype, seed=50), strength + i) for i, p in enumerate(params)]
    if strength := variant.get("ewc"):
        fisher = [random(*p.shape, seed=60).abs().to(dtype) for p in params]
        ewc = [Ewc(f, random(*p.shape, dtype=dtype, seed=70), strength) for f, p in zip(fisher, params, strict=True)]
    return anchors, ewc


def optimizer(params: Sequence[nn.Parameter], variant: dict[str, Any], **more: Any) -> FusedAdamW:
    anchors, ewc = held(params, variant)
    return FusedAdamW(
        params,
        **{"lr": 0.01, **variant.get("rule", {})},
        max_grad_norm=variant.get("max_grad_norm"),
        anchors=dict(zip(params, anchors, strict=True)) if anchors else None,
        ewc=dict(zip(params, ewc, strict=True)) if ewc else None,
        **more,
    )


def by_reference(params: Sequence[Tensor], variant: dict[str, Any], steps: int, dtype: torch.dtype) -> Any:
    """The reference in another precision: weights, states and the last norm."""
    scale = variant.get("inv_scale", 1.0)
    ours: list[Any] = [p.detach().to(dtype) for p in params]
    states: list[dict[str, Any]] = [{} for _ in ours]
    anchors, ewc = held(params, variant)
    rule = Rule(**{"lr": 0.01, **variant.get("rule", {})})
    norm = None
    for number in range(steps):
        grads = [g.to(dtype) for g in give_gradients(params, number, 1 / scale)]
        limit = variant.get("max_grad_norm")
        norm = reference_step(ours, grads, states, rule, max_grad_norm=limit, inv_scale=scale, anchors=anchors, ewc=ewc)
    return ours, states, norm


def check(variant: dict[str, Any] = VARIANTS["all"], sizes: Sequence[int] = FEW, steps: int = 3) -> None:
    """Weights, moments, steps and norm after some steps: at most twice the error of plain torch in fp32, and 1e-6."""
    truth, exact, exact_norm = by_reference(weights(sizes), variant, steps, torch.float64)
    eager, rough, _ = by_reference(weights(sizes), variant, steps, torch.float32)
    with guarded_memory():
        params = weights(sizes)
        made = optimizer(params, variant)
        scale = variant.get("inv_scale", 1.0)
        for number in range(steps):
            give_gradients(params, number, 1 / scale)
            made.step(inv_scale=torch.tensor([scale], device=device()) if scale != 1 else None)
    if variant.get("max_grad_norm"):
        assert made.grad_norm is not None
        assert float(made.grad_norm) == pytest.approx(float(exact_norm), rel=1e-6)
    for i, p in enumerate(params):
        assert_close(p.detach(), truth[i], eager[i], 2.0, 1e-6, f"weight {i}")
        state = made.state[p]
        assert float(state["step"]) == steps
        for name in ("exp_avg", "exp_avg_sq"):
            small = 1e-6 * float(exact[i][name].abs().max()) if p.numel() else 0.0
            assert_close(state[name], exact[i][name], rough[i][name], 2.0, small, f"{name} {i}")


# --- against fp64 and against torch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_against_fp64(variant: dict[str, Any]) -> None:
    check(variant)


def test_sizes_around_a_block_and_a_chunk() -> None:
    check(VARIANTS["clipped"], SIZES, steps=5)


@settings(max_examples=6, deadline=None)
@given(st.lists(st.integers(0, 1500), min_size=1, max_size=4), st.sampled_from(sorted(VARIANTS)))
def test_any_sizes(sizes: list[int], name: str) -> None:
    if sum(sizes):
        check(VARIANTS[name], sizes, steps=2)


def test_the_reference_is_torchs_adamw() -> None:
    """In fp64, with clip_grad_norm_: to 1e-12 after 20 steps."""
    params = [nn.Parameter(p.detach().double()) for p in weights()]
    ours, states = [p.detach().clone() for p in params], [{} for _ in params]
    torchs = torch.optim.AdamW(params, lr=0.01, weight_decay=0.1, foreach=False)
    for number in range(20):
        grads = [g.clone() for g in give_gradients(params, number)]
        norm = reference_step(ours, grads, states, Rule(lr=0.01, weight_decay=0.1), max_grad_norm=3.0)
        assert float(norm) == pytest.approx(float(nn.utils.clip_grad_norm_(params, 3.0)), rel=1e-14)
        torchs.step()
    for p, q in zip(params, ours, strict=True):
        torch.testing.assert_close(q, p.detach(), rtol=0, atol=1e-12)


def test_the_reference_of_ewc_is_its_penalty_in_the_loss() -> None:
    p = random(50).double().requires_grad_()
    fisher, anchor, g = random(50, seed=1).double().abs(), random(50, seed=2).double(), random(50, seed=3).double()
    (g * p + 0.5 * 3.0 * fisher * (p - anchor) ** 2).sum().backward()
    assert p.grad is not None
    a, b = p.detach().clone(), p.detach().clone()
    reference_step([a], [g], [{}], ewc=[Ewc(fisher, anchor, 3.0)])
    reference_step([b], [p.grad], [{}])
    torch.testing.assert_close(a, b, rtol=0, atol=1e-15)


def test_the_pull_alone_shrinks_the_distance() -> None:
    """By lr * strength in every step, whatever the moments."""
    params = weights()
    anchors = [random(*p.shape, seed=9) for p in params]
    before = [p.detach() - w for p, w in zip(params, anchors, strict=True)]
    pulls = {p: Anchor(w, 2.0) for p, w in zip(params, anchors, strict=True)}
    made = FusedAdamW(params, lr=0.05, weight_decay=0.0, anchors=pulls)
    for p in params:
        p.grad = torch.zeros_like(p)
    for _ in range(4):
        made.step()
    for p, w, distance in zip(params, anchors, before, strict=True):
        torch.testing.assert_close(p.detach() - w, distance * 0.9**4, rtol=1e-5, atol=1e-6)


def test_the_pull_ends_at_the_anchor_however_strong() -> None:
    """lr * strength of 1 and 5e7 alike; unbounded, the second would throw the weights away."""
    params = weights()
    anchors = [random(*p.shape, seed=9) for p in params]
    pulls = {p: Anchor(w, s) for p, w, s in zip(params, anchors, (20.0, 1e9) * len(params), strict=False)}
    made = FusedAdamW(params, lr=0.05, weight_decay=0.0, anchors=pulls)
    reference = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    made.step()
    rule = Rule(lr=0.05, weight_decay=0.0)
    held = [pulls[p] for p in params]
    reference_step(reference, [torch.zeros_like(p) for p in reference], [{} for _ in params], rule, anchors=held)
    for p, w, other in zip(params, anchors, reference, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(other, w, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("limit", [None, 2.0])
def test_against_torchs_adamw(limit: float | None) -> None:
    """With clip_grad_norm_, in fp32, 6 steps: to 1e-6."""
    ours, theirs = weights(SIZES), weights(SIZES)
    made = FusedAdamW(ours, lr=0.01, max_grad_norm=limit)
    torchs = torch.optim.AdamW(theirs, lr=0.01)
    for number in range(6):
        give_gradients(ours, number)
        give_gradients(theirs, number)
        made.step()
        if limit is not None:
            norm = nn.utils.clip_grad_norm_(theirs, limit)
            assert made.grad_norm is not None
            assert float(made.grad_norm) == pytest.approx(float(norm), rel=1e-6)
        torchs.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_groups_have_their_own_numbers_and_one_norm() -> None:
    ours, theirs = weights((300, 20, 7)), weights((300, 20, 7))

    def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [
            {"params": params[:1], "weight_decay": 0.3},
            {"params": params[1:2], "lr": 0.003, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.0},
        ]

    made, torchs = FusedAdamW(groups(ours), lr=0.01, max_grad_norm=1.0), torch.optim.AdamW(groups(theirs), lr=0.01)
    for number in range(4):
        if number == 2:
            made.add_param_group({"params": ours[2:], "lr": 0.1})
            torchs.add_param_group({"params": theirs[2:], "lr": 0.1})
        made.param_groups[0]["lr"] = torchs.param_groups[0]["lr"] = 0.01 * number
        give_gradients(ours[: 2 + number // 2], number)
        give_gradients(theirs[: 2 + number // 2], number)
        nn.utils.clip_grad_norm_(theirs[: 2 + number // 2], 1.0)
        made.step()
        torchs.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_a_learning_rate_on_the_device() -> None:
    ours, theirs = weights(), weights()
    lr = torch.tensor(0.01, device=device())
    made, other = FusedAdamW(ours, lr=lr), FusedAdamW(theirs, lr=0.01)
    for number, rate in enumerate((0.01, 0.05)):
        lr.fill_(rate)
        other.param_groups[0]["lr"] = float(lr)
        for params, each in ((ours, made), (theirs, other)):
            give_gradients(params, number)
            each.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


# --- which tensors ----------------------------------------------------------------------------------------------------


def test_a_parameter_without_gradient_is_left_alone() -> None:
    ours, theirs = weights((40, 50, 60)), weights((40, 50, 60))
    made, torchs = FusedAdamW(ours, lr=0.01), torch.optim.AdamW(theirs, lr=0.01)
    for number, idle in enumerate((1, None, 0)):
        for params, each in ((ours, made), (theirs, torchs)):
            give_gradients(params, number)
            if idle is not None:
                params[idle].grad = None
            each.step()
    assert [float(made.state[p]["step"]) for p in ours] == [2, 2, 3]
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_nothing_to_do() -> None:
    with pytest.raises(ValueError, match="empty"):
        FusedAdamW([])
    params = weights((0, 3))
    made = FusedAdamW(params, max_grad_norm=1.0)
    made.step()
    assert made.grad_norm is None
    assert not made.state
    params[0].grad = torch.zeros_like(params[0])
    made.step()
    assert float(made.state[params[0]]["step"]) == 1
    assert float(made.grad_norm) == 0


def check_addresses() -> None:
    """Gradients anew in every step, weights and states elsewhere: never is anything written where it was before."""
    ours, theirs = weights(), weights()
    made, torchs = FusedAdamW(ours, lr=0.01), torch.optim.AdamW(theirs, lr=0.01)
    kept: list[Any] = []
    tables = []
    for number in range(6):
        for params, each in ((ours, made), (theirs, torchs)):
            kept += give_gradients(params, number)
            each.step()
            each.zero_grad(set_to_none=number != 1)
        tables.append(made._table)
        if number == 3:
            kept.append(ours[0].data)
            ours[0].data = ours[0].data.clone()
        if number == 4:
            state = made.state[ours[1]]
            kept.append((state["exp_avg"], state["exp_avg"].clone()))
            state["exp_avg"] = state["exp_avg"].clone()
    assert len({id(table) for table in tables[:4]}) == 1, "new gradients are no reason for a new table"
    assert len({id(table) for table in tables}) == 3
    assert torch.equal(*kept[-5]), "the old state"
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_new_addresses_are_noticed() -> None:
    check_addresses()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("self.rows[columns.GRAD].copy_(source, non_blocking=True)", "pass"),
        ("return _addresses(self.tensors) == self.addresses", "return True"),
    ],
)
def test_an_old_table_is_noticed(old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "Table", mutant(adamw_table, tmp_path, old, new).Table)
    assert noticed(check_addresses)


def test_gradients_of_any_strides_and_dtypes() -> None:
    """A transposed gradient is copied; one that is not at a multiple of 16 bytes goes through another kernel."""
    p, q = (nn.Parameter(random(6, 8)) for _ in range(2))
    r, s = (nn.Parameter(random(70)) for _ in range(2))
    made, other = FusedAdamW([p, r], lr=0.01, max_grad_norm=1.0), FusedAdamW([q, s], lr=0.01, max_grad_norm=1.0)
    for number in range(2):
        p.grad = random(8, 6, seed=number).t()
        q.grad = p.grad.contiguous()
        flat = random(71, seed=number)
        r.grad, s.grad = flat[1:], flat[1:].clone()
        made.step()
        other.step()
    assert torch.equal(p, q)
    torch.testing.assert_close(r, s, rtol=0, atol=1e-7)
    with torch.sparse.check_sparse_tensor_invariants():
        r.grad = r.grad.to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        made.step()


def counted(patch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched from now on."""
    launched: list[str] = []

    class Counting:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(adamw_table, name)

        def __getitem__(self, grid: Any) -> Any:
            launched.append(self.name)
            return self.kernel[grid]

    for name in LAUNCHED:
        patch.setattr(adamw_table, name, Counting(name))
    return launched


def test_many_tensors_are_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    params = weights(range(1, 51))
    anchors = {p: Anchor(p.detach() + 1, 1.0) for p in params[::2]}
    made = FusedAdamW(params, lr=0.01, max_grad_norm=1.0, anchors=anchors)
    give_gradients(params, 0)
    launched = counted(monkeypatch)
    made.step()
    assert launched == ["norm_partials", "finish", "update"]
    truth = [p.detach().double() for p in weights(range(1, 51))]
    pulls = [Anchor(p.detach() + 1, 1.0) if i % 2 == 0 else None for i, p in enumerate(truth)]
    grads = [g.double() for g in give_gradients(params, 0)]
    reference_step(truth, grads, [{} for _ in truth], Rule(lr=0.01), max_grad_norm=1.0, anchors=pulls)
    for p, q in zip(params, truth, strict=True):
        torch.testing.assert_close(p.detach().double(), q, rtol=0, atol=1e-6)


def test_the_norm_is_measured_only_where_something_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    params = weights()
    launched = counted(monkeypatch)
    made = FusedAdamW([{"params": params[:1]}, {"params": params[1:]}])
    give_gradients(params, 0)
    made.step()
    assert launched == ["finish", "update", "update"]
    assert made.grad_norm is None
    launched.clear()
    made.step(inv_scale=torch.ones((), device=device()))
    assert launched == ["norm_partials", "finish", "update", "update"]
    assert made.grad_norm is not None


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    p = nn.Parameter(random(4, 6))
    for name, value in {
        "lr": -1,
        "betas": (0.9, 1.0),
        "eps": -1,
        "rounding": "up",
        "states": "4bit",
        "seed": -1,
    }.items():
        with pytest.raises(ValueError, match=name):
            FusedAdamW([p], **{name: value})
    with pytest.raises(ValueError, match="max_grad_norm"):
        FusedAdamW([p], max_grad_norm=0.0)
    with pytest.raises(TypeError, match="amsgrad"):
        FusedAdamW([p], amsgrad=True)
    with pytest.raises(ValueError, match="contiguous"):
        FusedAdamW([nn.Parameter(random(4, 6).t())])
    with pytest.raises(ValueError, match="fp32 and bf16"):
        FusedAdamW([nn.Parameter(random(4).half())])
    with pytest.raises(ValueError, match="rounding"):
        FusedAdamW([nn.Parameter(random(4).bfloat16())])
    for anchor in (Anchor(random(3), 1.0), Anchor(random(4, 6).half(), 1.0), Anchor(random(4, 6), -1.0)):
        with pytest.raises(ValueError):
            FusedAdamW([p], anchors={p: anchor})
    with pytest.raises(ValueError, match="not a parameter"):
        FusedAdamW([p], anchors={random(4, 6): Anchor(random(4, 6), 1.0)})
    made = FusedAdamW([p])
    give_gradients([p], 0)
    with pytest.raises(ValueError, match="one element"):
        made.step(inv_scale=random(2))
    monkeypatch.setattr(common, "INTERPRETED", False)
    with pytest.raises(KernelUnavailableError, match="not on cpu"):
        FusedAdamW([nn.Parameter(torch.zeros(3))])


@pytest.mark.parametrize("kind", ["anchors", "ewc"])
def test_strength_0_changes_no_bit(kind: str) -> None:
    """And of two parameters of which one is held, the other is as if none were."""
    ours, theirs = weights((1030, 1030)), weights((1030, 1030))
    far = random(1030, seed=5) * 1e30
    given = {"anchors": Anchor(far, 0.0), "ewc": Ewc(far, far, 0.0)}[kind]
    holding = {"anchors": Anchor(far, 1e-9), "ewc": Ewc(far * 0, far, 1.0)}[kind]
    made = FusedAdamW(ours, lr=0.01, **{kind: {ours[0]: given, ours[1]: holding}})
    other = FusedAdamW(theirs, lr=0.01)
    for number in range(3):
        for params, each in ((ours, made), (theirs, other)):
            give_gradients(params, number)
            each.step()
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(made.state[ours[0]]["exp_avg"], other.state[theirs[0]]["exp_avg"])


# --- deliberately broken ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("1.0 / first).to", "1.0 / first).to"),  # unbroken
        ("1.0 / first).to", "first / first).to"),  # no correction of m
        ("1.0 / tl.sqrt(second)", "second / second"),  # nor of v
        ("tl.load(rates_ptr + tensor, mask", "tl.load(rates_ptr + tensors + tensor, mask"),  # that of v for m
        ("tl.fma(g - m, rate_1, m)", "tl.fma(g - m, rate_2, m)"),  # the betas swapped
        ("tl.load(chunks_ptr + 2 * row + 1)", "tl.maximum(tl.load(chunks_ptr + 2 * row + 1) - 1, 0)"),  # the last chunk
        ("x, mask=within < left)", "x, mask=within < left - 1)"),  # the last element
        ("factor = factor * tl.minimum(", "factor = factor + 0.0 * tl.minimum("),  # clipping
        ("tl.fma(away, -pull, kept)", "tl.fma(away, pull, kept)"),  # the pull the other way
        ("tl.fma(fisher * ewc, away, g)", "tl.fma(fisher * ewc, -away, g)"),
        ("tl.fma(fisher * ewc, away, g)", "tl.fma(fisher * ewc, away, g / factor) * factor"),  # EWC clipped too
        ("1.0 - rate * fp32(weight_decay)", "1.0 - fp32(weight_decay)"),
        ("factor = factor * tl.load(inv_scale_ptr)", "factor = factor / tl.load(inv_scale_ptr)"),
        ("for at in range(start, full, WIDTH):", "for at in range(start + WIDTH, full, WIDTH):"),  # of the norm
        ("start + lane < count", "start + lane < count - 1"),
    ],
)
def test_a_broken_kernel_is_noticed(old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = mutant(adamw_kernels, tmp_path, old, new)
    monkeypatch.setattr(adamw_table, "chunk_size", lambda _: 2048)
    for name in LAUNCHED:
        monkeypatch.setattr(adamw_table, name, getattr(broken, name))
    # A whole chunk, which is one block of the norm and two of the step, and the rest of it.
    assert noticed(lambda: check(sizes=(5, 2100), steps=2)) == (old != new)
