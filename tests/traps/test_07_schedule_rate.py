"""A schedule advanced per micro-batch, times the number of ranks, or on skipped steps; or one that starts at zero."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ftlab.config import CheckpointConfig, CosineConfig
from ftlab.optim.schedules import make_schedule
from ftlab.training.loop import fit
from ftlab.training.parallel import Ranks, Replica
from tests.helpers.training import data_config, lora_fit, loss_sum, run_ranks

STEPS, WARMUP, PEAK = 8, 3, 1e-2
SCHEDULE = make_schedule(CosineConfig(warmup_steps=WARMUP, final_factor=0.1), STEPS)
EXPECTED = [PEAK * SCHEDULE(step) for step in range(STEPS)]


def rates(
    folder: Path,
    micro: int,
    ranks: Ranks,
    *,
    schedule: Callable[[int], float] = SCHEDULE,
    by_step: bool = False,
    poisoned_step: int | None = None,
) -> list[float]:
    """The rates that the optimizer was given, step by step, in a run of global batches of 4 rows."""
    state, run = lora_fit(
        folder,
        total_steps=STEPS,
        ranks=ranks,
        data=data_config(batch_size=4, micro_batch_size=micro),
        checkpoint=CheckpointConfig(every_steps=None, every_minutes=None),
    )
    run.schedule = (lambda _: schedule(state.counters.step)) if by_step else schedule
    if poisoned_step is not None:

        def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
            return loss_sum(model, batch) * (float("inf") if state.counters.step == poisoned_step else 1.0)

        run.replica = Replica(state.model, loss, ranks)
    fit(state, run)
    return [line["lr"] for line in run.tracker.lines if line.get("split") == "train"]  # type: ignore[attr-defined]


def _in_ranks(ranks: Ranks, folder: Path) -> None:
    found = [rates(folder / f"{micro}-{ranks.rank}", micro, ranks) for micro in (1, 2)]
    if ranks.is_main:
        (folder / "rates.json").write_text(json.dumps(found))


def assert_is_the_schedule(found: list[float]) -> None:
    assert found == EXPECTED


def test_peak_end_and_first_rate_are_exact() -> None:
    assert EXPECTED[0] == pytest.approx(PEAK / WARMUP)
    assert EXPECTED[WARMUP - 1] == PEAK
    assert EXPECTED[-1] == PEAK * 0.1


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_the_curve_does_not_depend_on_accumulation(micro: int, tmp_path: Path) -> None:
    assert_is_the_schedule(rates(tmp_path, micro, Ranks()))


def test_the_curve_does_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    run_ranks(_in_ranks, tmp_path, tmp_path)
    for found in json.loads((tmp_path / "rates.json").read_text()):
        assert_is_the_schedule(found)


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda step: SCHEDULE(4 * step), id="advanced by every micro-batch, or by every rank"),
        pytest.param(lambda step: SCHEDULE(step - 1) if step else 0.0, id="first step at rate 0"),
    ],
)
def test_a_wrong_count_fails_the_same_assertion(wrong: Callable[[int], float], tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        assert_is_the_schedule(rates(tmp_path, 1, Ranks(), schedule=wrong))


def assert_waited(found: list[float], skipped: int) -> None:
    """The step after a skipped one has the rate that the skipped one had; nothing is jumped over."""
    assert found == EXPECTED[: skipped + 1] + EXPECTED[skipped : STEPS - 1]


def test_a_skipped_step_does_not_advance_it(tmp_path: Path) -> None:
    assert_waited(rates(tmp_path, 4, Ranks(), poisoned_step=2), 2)


def test_advancing_on_a_skipped_step_fails_the_same_assertion(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        assert_waited(rates(tmp_path, 4, Ranks(), poisoned_step=2, by_step=True), 2)
