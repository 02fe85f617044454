"""Saving or validating on rank 0 while the others go on hangs them, or mixes up their collectives."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from ftlab.config import CheckpointConfig
from ftlab.evaluation.loss import evaluate_loss
from ftlab.training.checkpoint import Checkpoints
from ftlab.training.loop import fit
from ftlab.training.parallel import Ranks
from tests.helpers.training import collate, lora_fit, loss_sum, ragged_examples, run_ranks


def _train(ranks: Ranks, folder: Path, broken: bool) -> None:
    """Checkpoints at every step with a slow disk on rank 0, validation with unequal shares of the batches."""
    batches = collate(ragged_examples(7), 2)

    def validate(step: int) -> dict[str, float]:
        if broken and ranks.rank != 0:
            return {"loss": 1.0}  # the mistake: only rank 0 takes part in the sum
        share = batches[ranks.rank :: ranks.world]
        return evaluate_loss(state.model, share, loss_sum, ranks.sum)

    state, run = lora_fit(
        folder / f"run-{broken}",
        ranks=ranks,
        total_steps=4,
        validate=validate,
        validate_at=frozenset({2, 4}),
        checkpoint=CheckpointConfig(every_steps=1, every_minutes=None),
    )
    save = Checkpoints.save

    def slow_save(self: Checkpoints, content: dict[str, object]) -> bool:
        time.sleep(0.2)
        return save(self, content)

    Checkpoints.save = slow_save  # type: ignore[method-assign,assignment]
    fit(state, run)
    values = ranks.gather([line["loss"] for line in run.tracker.lines if line.get("split") == "train"])  # type: ignore[attr-defined]
    assert values[0] == values[1]
    if ranks.rank == 0:
        torch.save(run.checkpoints.steps(), folder / "steps.pt")


def test_every_rank_saves_and_validates_together(tmp_path: Path) -> None:
    begin = time.monotonic()
    run_ranks(_train, tmp_path, tmp_path, False)
    assert time.monotonic() - begin < 60
    assert torch.load(tmp_path / "steps.pt", weights_only=True) == [4, 3]


def test_validating_on_rank_0_alone_fails(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"process \d|terminated|AssertionError|[Gg]loo|Connection|size"):
        run_ranks(_train, tmp_path, tmp_path, True)
