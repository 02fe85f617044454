"""The formats of AdamW in one pass: stochastic rounding, a master in two halves, moments of 8 bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from ftlab_kernels import adamw_kernels as kernels
from ftlab_kernels import adamw_table
from ftlab_kernels.adamw import Anchor, Ewc, FusedAdamW, Rule, reference_step
from ftlab_kernels.adamw_kernels import (
    BLOCK,
    decode_moments,
    encode_moments,
    join_master,
    random_bits,
    round_stochastic,
    split_master,
)
from ftlab_kernels.common import tl, triton
from torch import Tensor, nn

from tests.kernels.harness import device, guarded_memory, mutant, noticed, random
from tests.kernels.interpreted.test_adamw import LAUNCHED, give_gradients, weights
from tests.kernels.interpreted.test_adamw_state import everything, saved

FORMATS = [("stochastic", "fp32"), ("split", "fp32"), ("stochastic", "8bit"), ("split", "8bit"), ("none", "8bit")]
SIZES = (3, 255, 257, 1030)
# Upper halves of fp32: both signs of 0, subnormals, the smallest normal, ordinary, the largest before inf.
UPPERS = (0x0000, 0x8000, 0x0001, 0x807F, 0x0080, 0x3F7F, 0x3F80, 0xC1FE, 0x7EFF, 0x7F7E, 0xFF7F)


def from_bits(bits: Tensor) -> Tensor:
    """fp32 of int64 bits."""
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)


def bits_of(x: Tensor) -> Tensor:
    return x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def dtype_of(rounding: str) -> torch.dtype:
    return torch.float32 if rounding == "none" else torch.bfloat16


def make(params: Sequence[nn.Parameter], rounding: str, states: str, **more: Any) -> FusedAdamW:
    return FusedAdamW(params, **{"lr": 0.01, "seed": 2**40 + 5, **more}, rounding=rounding, states=states)


def check(rounding: str, states: str, module: ModuleType = kernels, steps: int = 3) -> None:
    """Against the reference with the same random bits: an fp32 result in the last bit rarely meets a threshold.

    At most 1 weight in 1000 is the other neighbour, at most 1 code in 100 the next one; scales to 1e-6.
    """
    with pytest.MonkeyPatch.context() as patch, guarded_memory():
        for name in LAUNCHED:
            patch.setattr(adamw_table, name, getattr(module, name))
        params = weights(SIZES, dtype_of(rounding))
        anchors = {p: Anchor(random(*p.shape, dtype=torch.bfloat16, seed=4), 2.0) for p in params[1:]}
        ewc = {params[3]: Ewc(random(1030, seed=5).abs(), random(1030, dtype=torch.bfloat16, seed=6), 0.5)}
        made = make(params, rounding, states, max_grad_norm=3.0, anchors=anchors, ewc=ewc)
        ours, theirs = [p.detach().clone() for p in params], [{} for _ in params]
        for number in range(steps):
            grads = give_gradients(params, number)
            made.step()
            reference_step(
                ours,
                grads,
                theirs,
                Rule.of(made.param_groups[0]),
                max_grad_norm=3.0,
                anchors=[anchors.get(p) for p in params],
                ewc=[ewc.get(p) for p in params],
            )
    near = {"rtol": 1e-5, "atol": 1e-7}
    for p, q, state in zip(params, ours, theirs, strict=True):
        if rounding == "stochastic":
            assert int((p != q).sum()) <= 1 + p.numel() // 1000
            torch.testing.assert_close(p.detach(), q, rtol=2**-7, atol=0)
        elif states == "fp32":
            torch.testing.assert_close(made.master(p), join_master(q, state["remainder"]), **near)
        else:
            wanted = join_master(q, state["remainder"]) if rounding == "split" else q
            assert float((made.master(p) - wanted).abs().mean()) < 1e-5
        for name, x in state.items():
            actual = made.state[p][name]
            assert actual.dtype == x.dtype, name
            if name in ("exp_avg", "exp_avg_sq") and states == "8bit":
                apart = (actual.int() - x.int()).abs()
                assert int(apart.max()) <= 1, name
                assert int((apart > 0).sum()) <= 1 + p.numel() // 100, name
            elif name != "remainder":
                torch.testing.assert_close(actual, x, **near)


@pytest.mark.parametrize(("rounding", "states"), FORMATS)
def test_against_the_reference(rounding: str, states: str) -> None:
    check(rounding, states)


@pytest.mark.parametrize(("rounding", "states"), FORMATS)
def test_a_resumed_run_draws_the_same(rounding: str, states: str) -> None:
    """Bit for bit, through a file, at every step."""
    params = weights(SIZES, dtype_of(rounding))
    made = make(params, rounding, states)
    whole = []
    for number in range(3):
        give_gradients(params, number)
        made.step()
        whole.append((everything(made), saved(made)))
    for cut in (1, 2):
        before, state = whole[cut - 1]
        again = [nn.Parameter(x) for x in before[: len(SIZES)]]
        resumed = make(again, rounding, states, lr=0.5, seed=1)
        resumed.load_state_dict(state)
        for number in range(cut, 3):
            give_gradients(again, number)
            resumed.step()
        assert all(torch.equal(x, y) for x, y in zip(everything(resumed), whole[2][0], strict=True))


def test_fp32_and_bf16_in_one_group() -> None:
    """Each as if it were alone; a launch for each dtype."""
    params = [*weights((300,)), *weights((70,), torch.bfloat16), *weights((20,))]
    made = make(params, "split", "8bit", max_grad_norm=1.0)
    ours, states = [p.detach().clone() for p in params], [{} for _ in params]
    for number in range(2):
        grads = give_gradients(params, number)
        made.step()
        norm = reference_step(ours, grads, states, Rule.of(made.param_groups[0]), max_grad_norm=1.0)
        assert made.grad_norm is not None
        assert float(made.grad_norm) == pytest.approx(float(norm), rel=1e-5)
    assert made._table is not None
    assert len(made._table.updates) == len(made._table.norms) == 2
    for p, q in zip(params, ours, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=2**-8, atol=1e-6)


def test_another_format_is_not_loaded() -> None:
    params = weights((9,), torch.bfloat16)
    for one, other in (("split", "stochastic"), ("stochastic", "split")):
        with pytest.raises(ValueError, match="rounding"):
            make(params, one, "fp32").load_state_dict(make(params, other, "fp32").state_dict())


def test_torchs_bf16_state_is_widened() -> None:
    params = weights((9,), torch.bfloat16)
    torchs = torch.optim.AdamW(params)
    give_gradients(params, 0)
    torchs.step()
    made = make(params, "split", "fp32")
    made.load_state_dict(torchs.state_dict())
    state = made.state[params[0]]
    assert state["exp_avg"].dtype == torch.float32
    assert torch.equal(state["exp_avg"], torchs.state[params[0]]["exp_avg"].float())
    assert torch.equal(made.master(params[0]), params[0].float())
    made.step()


# --- random bits ------------------------------------------------------------------------------------------------------


@triton.jit
def draw(key, out_ptr, first, BLOCKS: tl.constexpr):
    group = tl.arange(0, BLOCKS)[:, None] * 32 + tl.arange(0, 32)[None, :]
    bits = kernels._random(tl.to_tensor(key).to(tl.int64), group + tl.to_tensor(first).to(tl.int64))
    tl.store(out_ptr + kernels._within(BLOCKS), bits.to(tl.int32))


def test_the_kernels_bits_are_the_references() -> None:
    seed, step, place = 2**62 + 12345, 3, 70
    out = torch.empty(1024, dtype=torch.int32, device=device())
    draw[(1,)](seed ^ (step << 32), out, place << kernels.PLACE_SHIFT, 4)
    assert torch.equal(out.to(torch.int64).cpu(), random_bits(seed, step, place, 1024))


def test_bits_are_uniform_and_those_of_steps_and_parameters_have_nothing_in_common() -> None:
    """Mean, every bit, and correlations between steps, places, neighbours and halves, within 4.5 standard errors."""
    n = 1 << 16
    one = random_bits(1, 1, 0, n)
    for bit in range(16):
        assert abs(float(((one >> bit) & 1).double().mean()) - 0.5) < 4.5 * 0.5 / n**0.5
    unit = (one.double() - 32767.5) / (65536 / 12**0.5)
    others = [random_bits(*each, n) for each in ((1, 2, 0), (1, 1, 1), (2, 1, 0), (1 << 33, 1, 0))]
    for other in (*others, one.roll(1), one.roll(8), (one & 0xFF) << 8):
        again = (other.double() - 32767.5) / (65536 / 12**0.5)
        assert abs(float((unit * again).mean())) < 4.5 / n**0.5


# --- stochastic rounding ----------------------------------------------------------------------------------------------


@triton.jit
def round_all(x_ptr, random_ptr, up_ptr, w_ptr, low_ptr, back_ptr, BLOCK_SIZE: tl.constexpr):
    """Rounds at random; splits and joins."""
    at = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    x = tl.load(x_ptr + at)
    tl.store(
        up_ptr + at, kernels._round_stochastic(x, tl.load(random_ptr + at).to(tl.uint32)).to(tl.int16, bitcast=True)
    )
    w, low = kernels._split(x)
    tl.store(w_ptr + at, w.to(tl.int16, bitcast=True))
    tl.store(low_ptr + at, low)
    tl.store(back_ptr + at, kernels._join(w, low))


def rounded(x: Tensor, bits: Tensor) -> dict[str, Tensor]:
    """What the kernels make of fp32 x; a multiple of 4096 numbers."""
    found = {name: torch.empty(len(x), dtype=torch.int16, device=device()) for name in ("up", "w", "low")}
    found["back"] = torch.empty(len(x), device=device())
    round_all[(len(x) // 4096,)](x.to(device()), bits.to(torch.int32).to(device()), *found.values(), 4096)
    return {name: value.cpu() for name, value in found.items()}


@pytest.mark.parametrize("upper", UPPERS, ids=hex)
def test_every_lower_half(upper: int) -> None:
    """All 65536 lower halves of an upper half: the kernels are the helpers bit for bit, and the helpers are right."""
    low = torch.arange(1 << 16)
    x = from_bits((upper << 16) + low)
    bits = random_bits(9, upper, 0, 1 << 16)
    made = rounded(x, bits)
    up = round_stochastic(x, bits)
    assert torch.equal(made["up"], up.view(torch.int16))
    higher = from_bits((upper << 16) + torch.full_like(low, 1 << 16))
    expected = torch.where(low + bits >= 1 << 16, higher, from_bits(low * 0 + (upper << 16)))
    assert torch.equal(bits_of(up.float()), bits_of(expected)), "a neighbour, and which one by the bits"

    w, remainder = split_master(x)
    assert torch.equal(made["w"], w.view(torch.int16))
    assert torch.equal(made["low"], remainder)
    assert torch.equal(bits_of(join_master(w, remainder)), bits_of(x)), "exact"
    assert torch.equal(bits_of(made["back"]), bits_of(x))
    nearest = x.to(torch.bfloat16)
    assert torch.equal(w[low != 0x8000], nearest[low != 0x8000]), "to nearest; only ties may differ from torch"
    assert bits_of(w[low == 0x8000].float()) == bits_of(higher[:1]), "ties away from zero"


def test_not_a_number_stays_one_and_inf_inf() -> None:
    x = torch.tensor([math.nan, -math.nan, math.inf, -math.inf] * 1024)
    x[:8] = from_bits(torch.tensor([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001, 0x7F800000, 0xFF800000, 1, 0]))
    bits = torch.full((4096,), 0xFFFF)
    made = rounded(x, bits)
    for name, wanted in (("up", round_stochastic(x, bits)), ("w", split_master(x)[0])):
        actual = made[name].view(torch.bfloat16)
        for y in (actual, wanted):
            assert torch.equal(torch.isnan(y), torch.isnan(x))
            assert torch.equal(y[8:][torch.isinf(x[8:])].float(), x[8:][torch.isinf(x[8:])])
    assert torch.equal(torch.isnan(made["back"]), torch.isnan(x))


def test_over_all_random_numbers_the_mean_is_the_number() -> None:
    """Exactly: of 65536 equally likely numbers as many round up as the lower half says, for either sign."""
    every = torch.arange(1 << 16)
    for low in (0, 1, 0x1234, 0x7FFF, 0x8000, 0xFFFF):
        for upper in (0x3F80, 0xBF80, 0x0001):
            x = from_bits(torch.full_like(every, (upper << 16) + low))
            assert float(round_stochastic(x, every).double().mean()) == float(x[0].double())


def drift(steps: int, made: Any, p: Tensor) -> None:
    """Tiny equal steps from 1: to nearest nothing would ever move. Within 3 standard errors of where fp32 ends."""
    for _ in range(steps):
        made()
    moved = 1 - p.detach().double()
    gap = 2.0**-8  # below 1; a step rounds with a variance of at most gap^2 share (1 - share)
    expected = 1e-4 * steps
    variance = steps * gap * 1e-4
    error = 3 * (variance / p.numel()) ** 0.5
    assert abs(float(moved.mean()) - expected) < error, (float(moved.mean()), expected, error)
    assert float(moved.std()) < 1.5 * variance**0.5
    assert float(moved.std()) > 0.5 * variance**0.5


def test_a_thousand_tiny_steps_reach_where_fp32_does() -> None:
    """With the reference, which is the kernel bit for bit (test_against_the_reference)."""
    p, state = torch.ones(2048, dtype=torch.bfloat16), {}
    rule = Rule(lr=1e-4, weight_decay=0.0, rounding="stochastic", seed=3)
    gradient = torch.full_like(p, 0.5)
    drift(1000, lambda: reference_step([p], [gradient], [state], rule), p)


@pytest.mark.parametrize("steps", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_tiny_steps_of_the_kernel(steps: int) -> None:
    p = nn.Parameter(torch.ones(1024, dtype=torch.bfloat16, device=device()))
    made = make([p], "stochastic", "fp32", lr=1e-4, weight_decay=0.0)
    p.grad = torch.full_like(p, 0.5)
    drift(steps, made.step, p)


def test_decay_alone_shrinks_at_the_right_rate() -> None:
    """By 1 - 1e-4 in a step, a fortieth of the gap between two bf16 numbers: to 3 standard errors after 40 steps."""
    p = nn.Parameter(torch.full((1024,), 0.99, dtype=torch.bfloat16, device=device()))
    before = float(p[0].detach())
    made = make([p], "stochastic", "fp32", lr=1e-3, weight_decay=0.1)
    p.grad = torch.zeros_like(p)
    for _ in range(40):
        made.step()
    expected = before * (1 - 1e-4) ** 40
    error = 3 * (40 * 1e-4 * 2.0**-8 / p.numel()) ** 0.5
    assert abs(float(p.detach().double().mean()) - expected) < error


# --- the master in two halves -----------------------------------------------------------------------------------------


def test_the_split_master_is_the_fp32_run() -> None:
    """The same gradients: the master is bit for bit what fp32 parameters become, and the weight is its nearest bf16."""
    halves, wholes = (
        weights(SIZES, torch.bfloat16),
        [nn.Parameter(p.detach().float()) for p in weights(SIZES, torch.bfloat16)],
    )
    split, plain = make(halves, "split", "fp32"), make(wholes, "none", "fp32")
    for number in range(4):
        for p, q in zip(wholes, halves, strict=True):
            q.grad = random(*q.shape, dtype=torch.bfloat16, seed=number)
            p.grad = q.grad.float()
        split.step()
        plain.step()
    for p, q in zip(wholes, halves, strict=True):
        assert torch.equal(split.master(q), p.detach())
        assert float((q.detach() != p.detach().bfloat16()).float().mean()) < 0.01, "ties only"


# --- moments of 8 bits ------------------------------------------------------------------------------------------------


def moments(n: int = 4 * BLOCK, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    """m and v over some decades."""
    size = 10 ** (-spread * torch.rand(n, generator=torch.Generator().manual_seed(n)))
    return random(n).cpu() * size, (random(n, seed=1).cpu() * size).square()


def test_codes_keep_the_mean() -> None:
    """Over the 256 equally likely numbers a moment comes back to 1/256 of the gap between its codes on average."""
    m, v = moments()
    total_m, total_v = torch.zeros(len(m), dtype=torch.float64), torch.zeros(len(v), dtype=torch.float64)
    for r in range(256):
        codes = encode_moments(m, v, torch.full((len(m),), r * 257))
        back = decode_moments(*codes)
        total_m += back[0]
        total_v += back[1]
    scale_m, scale_v = (x.repeat_interleave(BLOCK) for x in codes[2:])
    gap_m = 2 * (m.abs() / scale_m).sqrt() / 127 + 1 / 127**2
    gap_v = (((v / scale_v) ** 0.25 + 1 / 255) ** 4 - v / scale_v) * 1.2
    assert bool(((total_m / 256 - m).abs() <= gap_m * scale_m / 256).all())
    large = v / scale_v > 255.0**-4
    assert bool(((total_v / 256 - v).abs() <= gap_v * scale_v / 256 + 1e-6 * v)[large].all())


def test_codes_are_near_and_no_v_is_lost() -> None:
    m, v = moments()
    v[::7] *= 1e-20
    v[3] = m[3] = 0
    m_code, v_code, m_scale, v_scale = encode_moments(m, v, random_bits(0, 1, 0, len(m)))
    back_m, back_v = decode_moments(m_code, v_code, m_scale, v_scale)
    share = (v / v_scale.repeat_interleave(BLOCK)).sqrt()
    gap = (share.sqrt() + 1 / 255) ** 2 - share
    assert bool(((back_v.sqrt() - v.sqrt()).abs() <= 1.01 * gap * v_scale.sqrt().repeat_interleave(BLOCK)).all())
    usual = share > 0.1
    assert float(((back_v / v).sqrt() - 1)[usual].abs().max()) < 0.03
    assert bool(((v_code > 0) == (v > 0)).all())
    assert bool((m_code[m != 0].sign() * m[m != 0].sign() >= 0).all())
    largest = m.abs().view(-1, BLOCK).argmax(1) + torch.arange(4) * BLOCK
    assert torch.equal(back_m[largest].abs(), m_scale)
    assert bool((m_code.abs()[largest] == 127).all())
    assert int(m_code[3]) == int(v_code[3]) == 0


def test_a_block_of_zeros_and_tiny_numbers() -> None:
    for value in (0.0, 1e-38, 1e-44):
        m = v = torch.full((300,), value)
        assert all(float(x.float().abs().max()) == 0 for x in encode_moments(m, v, random_bits(0, 1, 0, 300)))


def test_a_v_that_shrinks_slowly_gets_there() -> None:
    """By 0.1% a step, a tenth of the gap between two codes: to nearest it would stay beside its block's largest."""
    p, state = torch.zeros(BLOCK), {}
    rule = Rule(betas=(0.9, 0.999), states="8bit", seed=1)
    gradient = torch.ones(BLOCK)
    for _ in range(20):
        reference_step([p], [gradient], [state], rule)
    gradient[: BLOCK // 2] = 0.0
    start = float(decode_moments(state["exp_avg"], state["exp_avg_sq"], *scales(state))[1][: BLOCK // 2].mean())
    for _ in range(500):
        reference_step([p], [gradient], [state], rule)
    v = decode_moments(state["exp_avg"], state["exp_avg_sq"], *scales(state))[1][: BLOCK // 2]
    assert float(v.mean()) == pytest.approx(start * 0.999**500, rel=0.05)


def scales(state: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return state["exp_avg_absmax"], state["exp_avg_sq_absmax"]


def test_8_bits_train_like_fp32() -> None:
    """A least-squares problem of badly scaled columns: after 300 steps a loss within 5% of that with fp32 moments."""
    x = random(200, 64).cpu() * torch.logspace(-2, 0, 64)
    y = x @ random(64, 1, seed=1).cpu() + 0.1 * random(200, 1, seed=2).cpu()
    losses = []
    for states in ("fp32", "8bit"):
        w = torch.zeros(64, 1)
        state: dict[str, Any] = {}
        rule = Rule(lr=0.02, weight_decay=0.0, states=states)
        for _ in range(300):
            reference_step([w], [x.t() @ (x @ w - y) / 200], [state], rule)
        losses.append(float((x @ w - y).square().mean()))
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[0] < 0.05 * float(y.square().mean())


def test_bytes_of_the_state() -> None:
    """10.06 bytes a parameter move in a step: 2 + 2 of bf16, 2 of the gradient, 2 + 2 of codes, 16 / 256 of scales."""
    p = nn.Parameter(torch.zeros(4096, dtype=torch.bfloat16, device=device()))
    made = make([p], "stochastic", "8bit")
    give_gradients([p], 0)
    made.step()
    kept = sum(x.nbytes for name, x in made.state[p].items() if name != "step")
    assert kept / 4096 == 2 + 8 / 256


# --- deliberately broken ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rounding", "states", "old", "new"),
    [
        ("stochastic", "fp32", "(bits + random) >> 16", "(bits + 0x8000) >> 16"),  # to nearest
        ("stochastic", "fp32", "((lane & 1) * 16)", "((lane & 1) * 8)"),  # half of the bits twice
        ("stochastic", "fp32", "^ (step.to(tl.int64) << 32)", ""),  # the same bits in every step
        ("stochastic", "fp32", "group + at // _GROUP + groups", "group + groups"),  # and in every block
        ("split", "fp32", "p = _join(p, _read(low_ptr + at, within, left, MASKED))", "p = _widen(p)"),
        ("split", "fp32", "_write(low_ptr + at, within, left, low, MASKED)", "pass"),
        ("stochastic", "8bit", "up = _chance(random << 1)", "up = 0.5 + 0 * _chance(random << 1)"),
        ("none", "8bit", "up = _chance(random >> 7)", "up = 0.5 + 0 * _chance(random >> 7)"),
        ("none", "8bit", "tl.where(m < 0, -bits, bits)", "bits"),
        ("none", "8bit", "tl.store(v_scale_ptr + block_at + block, v_scale, mask=inside)", "pass"),
        ("none", "8bit", "return root * root\n", "return root\n"),
    ],
)
def test_a_broken_format_is_noticed(rounding: str, states: str, old: str, new: str, tmp_path: Path) -> None:
    broken = mutant(kernels, tmp_path, old, new)
    assert noticed(lambda: check(rounding, states, broken, steps=2))
