"""Killed at any step and resumed, a run has the losses, the sample order and the weights of the run never killed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from ftlab.config import CheckpointConfig
from ftlab.training.checkpoint import read_checkpoint
from ftlab.training.loop import StepResult, fit
from ftlab.training.precision import Precision
from tests.helpers.training import lora_fit
from tests.traps.test_08_grad_scaler_order import ScaledFp32

STEPS = 12
OVERFLOWING_SCALE = 2.0**126


class Killed(Exception):  # noqa: N818 - stands for a signal, not for a mistake
    pass


# What each variant forgets: counters are named with the value that a new run has.
FORGOTTEN_COUNTERS: dict[str, dict[str, Any]] = {
    "cursor": {"epoch": 0, "index": 0},
    "skipped": {"skipped": 0},
    "worse_in_a_row": {"worse_in_a_row": 0},
    "best_value": {"best_value": None},
    "best_step": {"best_step": -1},
    "validated_step": {"validated_step": -1},
}


def forgetful(saved: dict[str, Any], forget: str) -> dict[str, Any]:
    """The saved state without one part."""
    if forget == "rng":
        return {**saved, "rng": [{**saved["rng"][0], "torch": torch.get_rng_state()}]}
    if forget == "optimizer":
        return {**saved, "optimizer": {**saved["optimizer"], "state": {}}}
    if forget == "scaler":
        return {**saved, "scaler": {}}
    return {**saved, "counters": {**saved["counters"], **FORGOTTEN_COUNTERS[forget]}} if forget else saved


def overflowing() -> Precision:
    """A loss scale so large that the first steps overflow and are left out until it has been halved enough."""
    precision = ScaledFp32()
    precision.scaler.load_state_dict({**precision.scaler.state_dict(), "scale": OVERFLOWING_SCALE})
    return precision


def run(
    folder: Path,
    *,
    kill_after: int | None = None,
    resume: bool = False,
    forget: str = "",
    patience: int | None = None,
    scaled: bool = False,
) -> dict[str, Any]:
    """One process's life: every loss, the ids of every batch, the final weights, counters and loss scale.

    With `patience` every validation after the first is worse, so that the run stops early.
    """
    trace: dict[str, Any] = {"losses": {}, "ids": {}}

    def on_step(step: int, result: StepResult, ids: tuple[str, ...]) -> None:
        trace["losses"][step], trace["ids"][step] = result.nats, ids
        if step + 1 == kill_after:
            raise Killed

    state, setting = lora_fit(
        folder,
        total_steps=STEPS,
        on_step=on_step,
        validate=lambda step: {"loss": 1.0 / step if patience is None else 1.0 + step},
        validate_at=frozenset({6, 12} if patience is None else range(2, STEPS + 1, 2)),
        checkpoint=CheckpointConfig(every_steps=1, every_minutes=None, patience=patience),
    )
    if scaled:
        state.precision = overflowing()
    if resume and (saved := setting.checkpoints.newest()) is not None:
        state.load_state_dict(forgetful(saved, forget), 0, 1)
    try:
        fit(state, setting)
    except Killed:
        return trace
    trace["weights"] = {name: tensor.clone() for name, tensor in state.trainable().items()}
    trace["counters"] = asdict(state.counters)
    trace["scale"] = state.precision.scaler.get_scale()
    return trace


def assert_continues(later: dict[str, Any], whole: dict[str, Any]) -> None:
    assert later["losses"].keys() <= whole["losses"].keys()
    for step, loss in later["losses"].items():
        assert loss == whole["losses"][step], f"loss of step {step}"
        assert later["ids"][step] == whole["ids"][step], f"ids of step {step}"
    assert later["counters"] == whole["counters"]
    assert later["scale"] == whole["scale"]
    for name, tensor in whole["weights"].items():
        assert torch.equal(later["weights"][name], tensor), name


def test_killed_at_every_step(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    assert len(set(whole["losses"].values())) == STEPS
    for kill_after in range(1, STEPS + 1):
        folder = tmp_path / f"killed-{kill_after}"
        run(folder, kill_after=kill_after)
        assert_continues(run(folder, resume=True), whole)


@pytest.mark.parametrize("settings", [{"patience": 2}, {"scaled": True}], ids=["patience", "loss scale"])
def test_killed_with_patience_or_a_loss_scale(tmp_path: Path, settings: dict[str, Any]) -> None:
    whole = run(tmp_path / "whole", **settings)
    if "patience" in settings:
        assert whole["counters"]["step"] == 6  # best after step 2, worse after 4 and 6
        assert whole["counters"]["best_step"] == 2
    else:
        assert 0 < whole["counters"]["skipped"] < 4
        assert whole["scale"] == OVERFLOWING_SCALE / 2 ** whole["counters"]["skipped"]
    for kill_after in range(1, whole["counters"]["step"] + 1):
        folder = tmp_path / f"killed-{kill_after}"
        run(folder, kill_after=kill_after, **settings)
        assert_continues(run(folder, resume=True, **settings), whole)


@pytest.mark.parametrize(
    ("forget", "settings"),
    [
        ("rng", {}),
        ("cursor", {}),
        ("optimizer", {}),
        ("worse_in_a_row", {"patience": 2}),
        ("best_value", {"patience": 2}),
        ("best_step", {"patience": 2}),
        ("validated_step", {"patience": 2}),
        ("scaler", {"scaled": True}),
        ("skipped", {"scaled": True}),
    ],
)
def test_forgetting_anything_fails_the_same_assertion(tmp_path: Path, forget: str, settings: dict[str, Any]) -> None:
    whole = run(tmp_path / "whole", **settings)
    run(tmp_path / "killed", kill_after=5, **settings)
    with pytest.raises(AssertionError):
        assert_continues(run(tmp_path / "killed", resume=True, forget=forget, **settings), whole)


def test_a_half_written_checkpoint_is_ignored(tmp_path: Path) -> None:
    run(tmp_path, kill_after=5)
    newest = tmp_path / "step-00000004"
    half = tmp_path / ".step-00000005.tmp-123"
    half.mkdir()
    (half / "state.pt").write_bytes((newest / "state.pt").read_bytes()[:100])
    _, setting = lora_fit(tmp_path)
    assert not half.exists()
    saved = setting.checkpoints.newest()
    assert saved is not None
    assert saved["counters"]["step"] == 4


def test_a_checkpoint_holds_only_plain_types(tmp_path: Path) -> None:
    run(tmp_path, kill_after=2)
    assert read_checkpoint(tmp_path / "step-00000001")["counters"]["step"] == 1
