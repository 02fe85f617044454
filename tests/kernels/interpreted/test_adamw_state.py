"""The state of AdamW in one pass: saved, loaded, resumed, left alone when a step must not be taken; and no waiting."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from ftlab_kernels import adamw, adamw_kernels, adamw_table
from ftlab_kernels.adamw import Anchor, FusedAdamW
from torch import Tensor, nn

from tests.kernels.harness import device, random
from tests.kernels.interpreted.test_adamw import SIZES, VARIANTS, give_gradients, optimizer, weights

# --- state ------------------------------------------------------------------------------------------------------------


def saved(of: torch.optim.Optimizer) -> Any:
    """A state_dict through a file, read back without code."""
    file = io.BytesIO()
    torch.save(of.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("fused", [True, None])
@pytest.mark.parametrize("ours_first", [True, False])
def test_states_are_interchangeable_with_torchs(fused: bool | None, ours_first: bool) -> None:
    """Three steps with one, three with the other, against six with torch's: to 1e-6."""

    def make(params: list[nn.Parameter], ours: bool) -> torch.optim.Optimizer:
        return FusedAdamW(params, lr=0.01) if ours else torch.optim.AdamW(params, lr=0.01, fused=fused)

    params, whole = weights(), weights()
    first, torchs = make(params, ours_first), torch.optim.AdamW(whole, lr=0.01)
    second = make(params, not ours_first)
    for number in range(6):
        give_gradients(params, number)
        give_gradients(whole, number)
        if number == 3:
            second.load_state_dict(saved(first))
        (first if number < 3 else second).step()
        torchs.step()
    assert float(second.state[params[0]]["step"]) == 6
    for p, q in zip(params, whole, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_loading_copies_and_the_groups_stay_torchs() -> None:
    params = weights()
    made, again = FusedAdamW(params, lr=0.01, seed=7), FusedAdamW(params, lr=0.5)
    give_gradients(params, 0)
    made.step()
    again.load_state_dict(made.state_dict())
    assert again.param_groups[0]["lr"] == 0.01
    assert again.param_groups[0]["seed"] == 7
    for name, x in made.state[params[0]].items():
        assert torch.equal(again.state[params[0]][name], x)
        assert again.state[params[0]][name].data_ptr() != x.data_ptr()
    theirs = set(torch.optim.AdamW(params).param_groups[0])
    assert theirs <= set(made.param_groups[0])
    assert set(made.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq"}


def test_hooks_see_the_whole_state() -> None:
    params = weights()
    made = FusedAdamW(params)
    give_gradients(params, 0)
    made.step()
    seen = []
    made.register_load_state_dict_pre_hook(lambda _, state: seen.append(len(state["state"])))
    made.register_load_state_dict_post_hook(lambda each: seen.append(len(each.state)))
    made.load_state_dict(made.state_dict())
    assert seen == [2, 2]


def test_what_does_not_suit_is_not_loaded() -> None:
    params = weights()
    give_gradients(params, 0)
    plain, held_ones = FusedAdamW(params), FusedAdamW(params, anchors={params[0]: Anchor(params[0].detach(), 1.0)})
    with pytest.raises(ValueError, match="anchored"):
        held_ones.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="states"):
        FusedAdamW(params, states="8bit").load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="fp32 moments"):
        FusedAdamW(params, states="8bit").load_state_dict(torch.optim.AdamW(params).state_dict())
    with pytest.raises(ValueError, match="amsgrad"):
        plain.load_state_dict(torch.optim.AdamW(params, amsgrad=True).state_dict())
    with pytest.raises(ValueError, match="group"):
        plain.load_state_dict(FusedAdamW(params[:1]).state_dict())


def test_a_copy_goes_on_alone() -> None:
    params = weights()
    made = FusedAdamW(params, max_grad_norm=1.0, anchors={params[0]: Anchor(random(5, seed=3), 1.0)})
    give_gradients(params, 0)
    made.step()
    other = copy.deepcopy(made)
    for each in (made, other):
        give_gradients(each.param_groups[0]["params"], 1)
        each.step()
    for p, q in zip(params, other.param_groups[0]["params"], strict=True):
        assert p is not q
        assert torch.equal(p, q)


# --- steps that must not be taken, and waiting ------------------------------------------------------------------------


def everything(made: FusedAdamW) -> list[Tensor]:
    params = [p.detach() for group in made.param_groups for p in group["params"]]
    return [x.clone() for x in [*params, *(x for state in made.state.values() for x in state.values())]]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan"), 1e30])
def test_what_is_not_finite_changes_nothing(bad: float) -> None:
    """Nor does a norm beyond fp32: no bit of weights, moments and steps; and the next step is as if it had not been."""
    ours, theirs = weights(), weights()
    made, other = (optimizer(params, VARIANTS["all"]) for params in (ours, theirs))
    inv_scale = torch.ones((), device=device())
    for number in range(3):
        for params, each in ((ours, made), (theirs, other)):
            give_gradients(params, number)
            each.step(inv_scale=inv_scale)
        before = everything(made)
        give_gradients(ours, 9)[1][-1] = bad
        made.step(inv_scale=inv_scale)
        assert not torch.isfinite(made.grad_norm)
        assert all(torch.equal(x, y) for x, y in zip(everything(made), before, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(everything(made), everything(other), strict=True))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_infinite_scale_changes_nothing() -> None:
    params = weights()
    made = FusedAdamW(params)
    give_gradients(params, 0)
    made.step(inv_scale=torch.tensor(float("inf"), device=device()))
    assert [float(made.state[p]["step"]) for p in params] == [0, 0]


@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale_ before"])
@pytest.mark.parametrize("limit", [None, 1.0])
def test_with_a_grad_scaler(limit: float | None, unscale: bool) -> None:
    """Scale 2^16 and an inf in one step, against torch's order: unscale_, clip, step, update."""
    ours, theirs = weights(), weights()
    made, torchs = FusedAdamW(ours, lr=0.01, max_grad_norm=limit), torch.optim.AdamW(theirs, lr=0.01, foreach=False)
    scalers = [torch.amp.GradScaler(device().type, init_scale=2.0**16, growth_interval=2) for _ in range(2)]
    for number in range(5):
        for params, each, scaler in zip((ours, theirs), (made, torchs), scalers, strict=True):
            scale = float(scaler.scale(torch.ones((), device=device())))
            give_gradients(params, number, scale)[0][0] *= float("inf") if number == 2 else 1
            if unscale or each is torchs:
                scaler.unscale_(each)
            if each is torchs and limit is not None:
                nn.utils.clip_grad_norm_(params, limit)
            scaler.step(each)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
    assert scalers[0].get_scale() == 2.0**17
    assert float(made.state[ours[0]]["step"]) == 4
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever would make the host wait for the device raises."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("this waits for the device")

    names = ("item", "__bool__", "__float__", "__int__", "__index__", "cpu", "tolist", "numpy", "nonzero")
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(Tensor, name, refuse))
        yield


def test_nothing_waits_for_the_device() -> None:
    params = weights()
    made = optimizer(params, VARIANTS["all"], states="8bit")
    made.param_groups[0]["lr"] = torch.tensor(0.01, device=device())
    inv_scale = torch.ones(1, device=device())
    for number in range(3):  # the first makes states and table, the second has new gradients, the third is as usual
        if number < 2:
            give_gradients(params, number)
        with no_waiting():
            made.step(inv_scale=inv_scale)
    with pytest.raises(AssertionError, match="waits"), no_waiting():
        made.grad_norm.item()


def test_a_captured_step_has_its_own_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """While capturing, the column of the gradients is always copied, from memory that is not used again."""
    params = weights()
    made = FusedAdamW(params)
    on = False
    for module in (adamw, adamw_table):
        monkeypatch.setattr(module, "capturing", lambda _: on)
    give_gradients(params, 0)
    on = True
    with pytest.raises(RuntimeError, match="before one is captured"):
        made.step()
    on = False
    made.step()
    on = True
    made.step()
    table = made._table
    assert table is not None
    of_graph = table.captured[0]
    addresses = of_graph.clone()
    with pytest.raises(RuntimeError, match="outside of CUDA graphs"):
        made.step()
    on = False
    table.rows[adamw_kernels.GRAD].zero_()  # as a replay may have left it
    made.step()
    assert torch.equal(table.rows[adamw_kernels.GRAD].cpu(), addresses)
    other = give_gradients(params, 1)
    made.step()
    assert torch.equal(of_graph, addresses)
    assert table.rows[adamw_kernels.GRAD].tolist() == [g.data_ptr() for g in other]
    params[0].data = params[0].data.clone()
    made.step()
    made.load_state_dict(made.state_dict())
    assert table in made._in_graphs, "a graph may still write there"


def test_the_same_twice() -> None:
    found = []
    for _ in range(2):
        params = weights(SIZES)
        made = optimizer(params, VARIANTS["all"])
        for number in range(2):
            give_gradients(params, number)
            made.step()
        found.append([*everything(made), made.grad_norm])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
