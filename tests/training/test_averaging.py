"""Averages of the weights: their closed forms, what validation and the result see, and what a resume finds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ftlab.compose import compose
from ftlab.config import AverageConfig, CheckpointConfig
from ftlab.session import train
from ftlab.training.averaging import Averaging
from ftlab.training.loop import Fit, fit
from ftlab.training.state import TrainState
from tests.helpers.training import lora_fit

STEPS = 8
Weights = dict[str, Tensor]


def averaged(folder: Path, config: AverageConfig, **changes: Any) -> tuple[TrainState, Fit, Averaging, list[Weights]]:
    """A run that has not begun, its hook, and a list that will hold the weights after each step."""
    path: list[Weights] = []
    state, run = lora_fit(
        folder,
        total_steps=STEPS,
        on_step=lambda *_: path.append({name: tensor.clone() for name, tensor in state.trainable().items()}),
        checkpoint=CheckpointConfig(every_steps=1, every_minutes=None),
        **changes,
    )
    hook = Averaging(config, STEPS)
    run.hooks = [hook]
    return state, run, hook, path


def assert_average(ours: Weights, path: list[Weights], coefficients: list[float]) -> None:
    """`ours` is the combination of the path's weights."""
    for name, tensor in ours.items():
        exact = sum(c * step[name].double() for c, step in zip(coefficients, path, strict=True))
        torch.testing.assert_close(tensor.double(), exact, atol=1e-6, rtol=1e-5)


def test_ema_is_its_closed_form(tmp_path: Path) -> None:
    """(1 - d) sum_i d^(n - i) theta_i over the samples after the first, which has d^(n - 1)."""
    state, run, hook, path = averaged(tmp_path, AverageConfig("ema", decay=0.8, start=0.25))
    fit(state, run)
    assert "7 samples, of steps 2 to 8" in hook.settle(state, None)
    coefficients = [0.0, 0.8**6, *(0.2 * 0.8 ** (8 - step) for step in range(3, 9))]
    assert sum(coefficients) == pytest.approx(1)
    assert_average(state.trainable(), path, coefficients)


def test_swa_is_the_mean_of_its_samples(tmp_path: Path) -> None:
    state, run, hook, path = averaged(tmp_path, AverageConfig("swa", start=0.25, every=3))
    fit(state, run)
    assert "3 samples, of steps 2 to 8" in hook.settle(state, None)
    assert_average(state.trainable(), path, [1 / 3 if step in (2, 5, 8) else 0 for step in range(1, 9)])


def test_the_distance_and_the_number_of_samples_are_logged(tmp_path: Path) -> None:
    state, run, _, path = averaged(tmp_path, AverageConfig("swa", start=0.25, every=2))
    fit(state, run)
    lines = [line for line in run.tracker.lines if line["split"] == "train"]  # type: ignore[attr-defined]
    assert not any(key.startswith("average/") for key in lines[0])
    for line in lines[1:]:
        samples = [path[step - 1] for step in (2, 4, 6, 8) if step <= line["step"]]
        assert line["average/models"] == len(samples)
        away = [
            (weight - torch.stack([sample[name] for sample in samples]).mean(0)).flatten()
            for name, weight in path[line["step"] - 1].items()
        ]
        assert line["average/distance"] == pytest.approx(float(torch.cat(away).norm()), rel=1e-4, abs=1e-6)
    assert lines[1]["average/distance"] == 0
    assert lines[2]["average/distance"] > 0


def test_validation_sees_the_average_once_there_is_one_and_training_never(tmp_path: Path) -> None:
    seen: dict[int, Weights] = {}

    def validate(step: int) -> dict[str, float]:
        seen[step] = {name: tensor.clone() for name, tensor in state.trainable().items()}
        return {"loss": 1.0 / step}

    plain, plain_run, _, plain_path = averaged(tmp_path / "plain", AverageConfig("swa"))
    plain_run.hooks = []
    fit(plain, plain_run)
    state, run, _, path = averaged(
        tmp_path / "run", AverageConfig("swa", start=0.5), validate=validate, validate_at=frozenset({2, 6, 8})
    )
    fit(state, run)
    assert all(torch.equal(mine[n], plain_path[i][n]) for i, mine in enumerate(path) for n in mine)
    assert all(torch.equal(seen[2][name], tensor) for name, tensor in path[1].items())
    assert_average(seen[6], path[3:6], [1 / 3] * 3)
    kept = run.checkpoints.load_best(8)
    assert kept is not None
    assert_average(kept, path[3:], [1 / 5] * 5)
    saved = run.checkpoints.newest()
    assert saved is not None
    assert all(torch.equal(saved["weights"][name], tensor) for name, tensor in path[-1].items())


def test_a_resume_that_forgot_the_average_would_be_noticed(tmp_path: Path) -> None:
    def ended(memory: bool) -> Weights:
        state, run, hook, _ = averaged(tmp_path, AverageConfig("swa"))
        saved = torch.load(tmp_path / "step-00000004.pt", weights_only=True)
        state.load_state_dict(saved if memory else {**saved, "memory": {}}, 0, 1)
        fit(state, run)
        hook.settle(state, None)
        return state.trainable()

    state, run, _, _ = averaged(tmp_path / "half", AverageConfig("swa"))
    run.limits = replace(run.limits, total_steps=4)
    fit(state, run)
    saved = run.checkpoints.newest()
    torch.save(saved, tmp_path / "step-00000004.pt")
    whole, whole_run, whole_hook, _ = averaged(tmp_path / "other", AverageConfig("swa"))
    fit(whole, whole_run)
    whole_hook.settle(whole, None)
    with_memory, without = ended(True), ended(False)
    assert all(torch.equal(with_memory[name], tensor) for name, tensor in whole.trainable().items())
    assert not all(torch.equal(without[name], tensor) for name, tensor in whole.trainable().items())


def test_what_is_no_average_is_said(tmp_path: Path) -> None:
    state, run, hook, path = averaged(tmp_path, AverageConfig("ema", start=0.5))
    assert "no sample was taken" in hook.settle(state, None)
    fit(state, run)
    assert "the best validation, of step 3, was before the first sample, of step 4" in hook.settle(state, 3)
    assert all(torch.equal(path[-1][name], tensor) for name, tensor in state.trainable().items())


def finished(folder: Path, *overrides: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """run.json and the exported model of a run of 6 steps, as the command makes it."""
    words = ["+experiment=full_tiny", "tracking=disabled", "evaluation=loss_only", "training.max_steps=6"]
    config, resolved = compose([*words, f"run_dir={folder}", *overrides])
    assert train(config, resolved) == 0
    return json.loads((folder / "run.json").read_text()), load_file(folder / "model/model.safetensors")


def test_the_command_exports_the_average_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftlab.session.write_report", lambda run_dir: run_dir)
    last = ["checkpoint.load_best=false", "regularizer=swa"]
    record, average = finished(tmp_path / "swa", *last)
    assert record["result"] == "swa: the result is the average of 4 samples, of steps 3 to 6"
    assert record["result"] in record["warnings"]
    _, alone = finished(tmp_path / "last", "checkpoint.load_best=false")
    assert any(not torch.equal(average[name], tensor) for name, tensor in alone.items())
    record, _ = finished(tmp_path / "best", "regularizer=swa", "evaluation.times=1")
    assert record["result"] == "swa: the result is the average as it stood at the best validation, of step 6"
