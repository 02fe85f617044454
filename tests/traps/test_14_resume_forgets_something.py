"""Killed at any step and resumed, a run has the losses, the sample order and the weights of the run never killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ftlab.config import CheckpointConfig
from ftlab.training.checkpoint import read_checkpoint
from ftlab.training.loop import StepResult, fit
from tests.helpers.training import lora_fit

STEPS = 12


class Killed(Exception):  # noqa: N818 - stands for a signal, not for a mistake
    pass


def run(folder: Path, *, kill_after: int | None = None, resume: bool = False, forget: str = "") -> dict[str, Any]:
    """One process's life: every loss, the ids of every batch, the final weights."""
    trace: dict[str, Any] = {"losses": {}, "ids": {}}

    def on_step(step: int, result: StepResult, ids: tuple[str, ...]) -> None:
        trace["losses"][step], trace["ids"][step] = result.nats, ids
        if step + 1 == kill_after:
            raise Killed

    state, setting = lora_fit(
        folder,
        total_steps=STEPS,
        on_step=on_step,
        validate_at=frozenset({6, 12}),
        checkpoint=CheckpointConfig(every_steps=1, every_minutes=None),
    )
    if resume:
        saved = setting.checkpoints.newest()
        if saved is not None:
            if forget == "rng":
                saved["rng"] = [{**saved["rng"][0], "torch": torch.get_rng_state()}]
            if forget == "cursor":
                saved["counters"] = {**saved["counters"], "epoch": 0, "index": 0}
            if forget == "optimizer":
                saved["optimizer"] = {**saved["optimizer"], "state": {}}
            state.load_state_dict(saved, 0, 1)
    try:
        fit(state, setting)
    except Killed:
        return trace
    trace["weights"] = {name: tensor.clone() for name, tensor in state.trainable().items()}
    trace["digest"] = state.counters.data_digest
    return trace


def assert_continues(later: dict[str, Any], whole: dict[str, Any]) -> None:
    for step, loss in later["losses"].items():
        assert loss == whole["losses"][step], f"loss of step {step}"
        assert later["ids"][step] == whole["ids"][step], f"ids of step {step}"
    assert later["digest"] == whole["digest"]
    for name, tensor in whole["weights"].items():
        assert torch.equal(later["weights"][name], tensor), name


def test_killed_at_every_step(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    assert len(set(whole["losses"].values())) == STEPS
    for kill_after in range(1, STEPS + 1):
        folder = tmp_path / f"killed-{kill_after}"
        run(folder, kill_after=kill_after)
        assert_continues(run(folder, resume=True), whole)


@pytest.mark.parametrize("forget", ["rng", "cursor", "optimizer"])
def test_forgetting_anything_fails_the_same_assertion(tmp_path: Path, forget: str) -> None:
    whole = run(tmp_path / "whole")
    run(tmp_path / "killed", kill_after=5)
    with pytest.raises(AssertionError):
        assert_continues(run(tmp_path / "killed", resume=True, forget=forget), whole)


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
