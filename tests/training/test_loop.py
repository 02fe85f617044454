"""The loop: logging, validation, patience, divergence, signals, and what a step measures."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from ftlab.config import CheckpointConfig, PrecisionConfig
from ftlab.errors import DivergenceError, FtlabError
from ftlab.losses.penalties import Penalty
from ftlab.losses.scalars import note
from ftlab.training.loop import fit, train_step, validation_steps
from ftlab.training.parallel import Ranks, Replica
from ftlab.training.precision import Precision
from ftlab.training.signals import Interrupted, StopSignal
from tests.helpers.training import KeepGradients, collate, lora_fit, loss_sum, ragged_examples, tiny_llama

FP32 = Precision(PrecisionConfig(), torch.device("cpu"))


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ((10, None, 4), {2, 5, 8, 10}),
        ((10, 3, 4), {3, 6, 9, 10}),
        ((10, None, 1), {10}),
        ((2, None, 5), {1, 2}),
        ((10, None, 0), set()),
    ],
)
def test_validation_steps(arguments: Any, expected: set[int]) -> None:
    assert validation_steps(*arguments) == expected


def test_training_learns(tmp_path: Path) -> None:
    state, run = lora_fit(tmp_path, total_steps=40, dropout=0.0)
    run.schedule = lambda step: 1.0
    fit(state, run)
    losses = [line["loss"] for line in run.tracker.lines if line.get("split") == "train"]  # type: ignore[attr-defined]
    assert sum(losses[-8:]) < 0.96 * sum(losses[:8])
    assert state.counters.step == 40
    assert run.checkpoints.steps()[0] == 40


def test_logged_loss_is_the_token_mean_of_the_window(tmp_path: Path) -> None:
    seen: list[tuple[float, int]] = []
    state, run = lora_fit(tmp_path, total_steps=4, on_step=lambda s, r, i: seen.append((r.nats, r.supervised)))
    run.limits = type(run.limits)(4, frozenset(), 2, 5, 1.0)
    fit(state, run)
    lines = [line for line in run.tracker.lines if line.get("split") == "train"]  # type: ignore[attr-defined]
    assert [line["step"] for line in lines] == [2, 4]
    for line, window in zip(lines, (seen[:2], seen[2:]), strict=True):
        assert line["loss"] == pytest.approx(sum(n for n, _ in window) / sum(s for _, s in window))


def test_patience_stops_and_the_best_weights_are_kept(tmp_path: Path) -> None:
    values = {2: 1.0, 4: 0.5, 6: 0.7, 8: 0.6, 10: 0.1}
    state, run = lora_fit(
        tmp_path,
        validate=lambda step: {"loss": values[step]},
        validate_at=frozenset(values),
        checkpoint=CheckpointConfig(every_steps=None, every_minutes=None, patience=2),
    )
    fit(state, run)
    assert state.counters.step == 8
    assert (state.counters.best_step, state.counters.best_value) == (4, 0.5)
    assert run.checkpoints.load_best(4).keys() == state.trainable().keys()
    assert any("stopped after step 8" in message for message in run.progress.messages)  # type: ignore[attr-defined]


def test_nan_is_never_the_best(tmp_path: Path) -> None:
    state, run = lora_fit(
        tmp_path, total_steps=4, validate=lambda step: {"loss": math.nan}, validate_at=frozenset({2, 4})
    )
    fit(state, run)
    assert state.counters.best_step == -1


def test_a_metric_nobody_measured_is_named(tmp_path: Path) -> None:
    state, run = lora_fit(
        tmp_path, validate_at=frozenset({1}), checkpoint=CheckpointConfig(metric="accuracy", every_minutes=None)
    )
    with pytest.raises(FtlabError, match=r"accuracy.*loss"):
        fit(state, run)


def test_a_bad_step_is_skipped_counted_and_does_not_advance_the_schedule(tmp_path: Path) -> None:
    state, run = lora_fit(tmp_path, total_steps=6)
    run.schedule = lambda step: 1.0 / (1 + step)
    rates: list[float] = []
    weights: list[torch.Tensor] = []

    def look(step: int, result: Any, ids: Any) -> None:
        rates.append(state.optimizer.param_groups[0]["lr"])
        weights.append(next(iter(state.trainable().values())).clone())

    run.on_step = look
    one_micro_batch_a_step(run)
    poison_steps(run, {2, 3})
    fit(state, run)
    assert state.counters.skipped == 2
    assert torch.equal(weights[1], weights[2])
    assert torch.equal(weights[1], weights[3])
    assert not torch.equal(weights[3], weights[4])
    assert rates == pytest.approx([1e-2 / n for n in (1, 2, 3, 3, 3, 4)])
    last = [line for line in run.tracker.lines if line.get("split") == "train"][-1]  # type: ignore[attr-defined]
    assert last["skipped_steps"] == 2
    assert math.isfinite(last["loss"])


def one_micro_batch_a_step(run: Any) -> None:
    run.micro_batch_size = 100


def poison_steps(run: Any, bad: set[int]) -> None:
    objective, calls = run.replica._objective, iter(range(10**6))

    def broken(batch: Any) -> torch.Tensor:
        loss: torch.Tensor = objective(batch)
        return loss * math.inf if next(calls) in bad else loss

    run.replica._objective = broken


def test_too_many_bad_steps_in_a_row_stop_the_run(tmp_path: Path) -> None:
    state, run = lora_fit(tmp_path, max_bad_steps=3)
    one_micro_batch_a_step(run)
    poison_steps(run, set(range(4, 12)))
    with pytest.raises(DivergenceError, match="3 steps in a row"):
        fit(state, run)
    assert run.checkpoints.steps()[0] == 7
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state.trainable().values())


def test_a_signal_saves_and_stops(tmp_path: Path) -> None:
    state, run = lora_fit(tmp_path, checkpoint=CheckpointConfig(every_steps=None, every_minutes=None))
    with StopSignal() as stop, stop.deferred():
        run.stop = stop
        run.on_step = lambda step, result, ids: signal.raise_signal(signal.SIGTERM) if step == 4 else None
        with pytest.raises(Interrupted) as raised:
            fit(state, run)
    assert raised.value.exit_code == 143
    assert run.checkpoints.steps() == [5]


def test_minutes_also_make_a_checkpoint(tmp_path: Path) -> None:
    state, run = lora_fit(
        tmp_path, total_steps=3, checkpoint=CheckpointConfig(every_steps=None, every_minutes=1e-9, keep_last=9)
    )
    run.checkpoints.keep_last = 9
    fit(state, run)
    assert run.checkpoints.steps() == [3, 2, 1, 0]


def test_nothing_supervised_is_an_error() -> None:
    model = tiny_llama()
    batch = collate(ragged_examples(2), 2)[0].unsupervised()
    with pytest.raises(FtlabError, match="supervised"):
        train_step(Replica(model, loss_sum, Ranks()), KeepGradients(model), [batch], precision=FP32)


def test_another_configuration_is_refused_on_resume(tmp_path: Path) -> None:
    state, run = lora_fit(tmp_path, total_steps=2)
    fit(state, run)
    saved = run.checkpoints.newest()
    assert saved is not None
    other, _ = lora_fit(tmp_path / "other")
    other.config_hash = "another"
    with pytest.raises(FtlabError, match="another configuration"):
        other.load_state_dict(saved, 0, 1)


def test_other_anchors_are_refused_on_resume(tmp_path: Path) -> None:
    state, run = lora_fit(tmp_path, total_steps=2)
    fit(state, run)
    saved = run.checkpoints.newest()
    assert saved is not None
    other, _ = lora_fit(tmp_path / "other")
    other.penalty_fingerprints = {"l2_sp": "abc"}
    with pytest.raises(FtlabError, match="the penalty l2_sp holds to something else"):
        other.load_state_dict(saved, 0, 1)


def test_the_share_of_a_penaltys_gradient(tmp_path: Path) -> None:
    """Logged on the lines of the log alone, it changes nothing: ||2 strength (theta - theta0)|| over the whole norm."""

    def run_of(name: str, every: int) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        state, run = lora_fit(tmp_path / name, total_steps=3, dropout=0.0)
        run.penalties = [SumOfSquares()]
        run.limits = type(run.limits)(3, frozenset(), every, 5, None)
        fit(state, run)
        lines = run.tracker.lines  # type: ignore[attr-defined]
        return state.trainable(), [line for line in lines if line.get("split") == "train"]

    weights, often = run_of("often", 1)
    same, rarely = run_of("rarely", 3)
    assert all(torch.equal(weights[name], same[name]) for name in same)
    assert [line["step"] for line in rarely] == [3]
    assert rarely[0]["penalty_share/squares"] == often[-1]["penalty_share/squares"]
    state, _ = lora_fit(tmp_path / "first", total_steps=3, dropout=0.0)
    expected = 2 * 0.3 * torch.nn.utils.get_total_norm(list(state.trainable().values()))
    assert often[0]["penalty_share/squares"] * often[0]["grad_norm"] == pytest.approx(float(expected), rel=1e-5)


def test_a_penalty_has_no_share_of_no_gradient(tmp_path: Path) -> None:
    state, run = lora_fit(tmp_path, total_steps=2, dropout=0.0)
    run.penalties = [SumOfSquares()]
    run.limits = type(run.limits)(2, frozenset(), 1, 5, None)
    for parameter in state.model.parameters():
        parameter.data.zero_()
    fit(state, run)
    lines = [line for line in run.tracker.lines if line.get("split") == "train"]  # type: ignore[attr-defined]
    assert [line["grad_norm"] for line in lines] == [0, 0]
    assert all("penalty/squares" in line and "penalty_share/squares" not in line for line in lines)


def noting(folder: Path, seen: list[Any]) -> tuple[Any, Any]:
    """A run with a line every three steps, whose objective notes twice its loss."""

    def objective(model: Any, batch: Any) -> torch.Tensor:
        loss: torch.Tensor = loss_sum(model, batch)
        note("test/twice", 2 * loss)
        return loss

    state, run = lora_fit(folder, total_steps=6, on_step=lambda step, result, ids: seen.append(result))
    run.replica = Replica(run.replica.model, objective, Ranks())
    run.limits = type(run.limits)(6, frozenset(), 3, 5, 1.0)
    run.checkpoint = CheckpointConfig(every_steps=1, every_minutes=None)
    return state, run


def test_what_is_noted_is_logged_as_the_loss_is_also_after_a_resume(tmp_path: Path) -> None:
    """Killed in the middle of a window, the line at its end is the same."""
    seen: list[Any] = []
    whole, run = noting(tmp_path / "whole", seen)
    fit(whole, run)
    lines = [line for line in run.tracker.lines if line["split"] == "train"]
    assert [line["step"] for line in lines] == [3, 6]
    for line, window in zip(lines, (seen[:3], seen[3:]), strict=True):
        total = sum(result.noted["test/twice"] for result in window)
        assert line["test/twice"] == pytest.approx(total / sum(result.supervised for result in window))
        assert line["test/twice"] == pytest.approx(2 * line["loss"])
    half, run = noting(tmp_path / "half", [])
    run.on_step = lambda step, result, ids: setattr(run.stop, "received", signal.SIGTERM if step == 4 else None)
    with pytest.raises(Interrupted):
        fit(half, run)
    later, run = noting(tmp_path / "half", [])
    later.load_state_dict(run.checkpoints.newest(), 0, 1)
    fit(later, run)
    (line,) = [line for line in run.tracker.lines if line["split"] == "train"]
    assert line["test/twice"] == lines[1]["test/twice"]


def test_a_skipped_step_counts_in_no_scalar(tmp_path: Path) -> None:
    seen: list[Any] = []
    state, run = noting(tmp_path, seen)
    one_micro_batch_a_step(run)
    poison_steps(run, {1})
    fit(state, run)
    first = next(line for line in run.tracker.lines if line["split"] == "train")
    kept = [seen[0], seen[2]]
    total = sum(result.noted["test/twice"] for result in kept)
    assert first["test/twice"] == pytest.approx(total / sum(result.supervised for result in kept))


class SumOfSquares(Penalty):
    name = "squares"

    def value(self, model: torch.nn.Module) -> torch.Tensor:
        trained = [p for p in model.parameters() if p.requires_grad]
        return 0.3 * torch.stack([p.square().sum() for p in trained]).sum()
