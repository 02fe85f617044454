"""Dividing each micro-batch's mean loss by the number of micro-batches weighs tokens by the company they keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ftlab.config import PrecisionConfig
from ftlab.data.loader import split_rows
from ftlab.training.loop import StepResult, train_step
from ftlab.training.parallel import Ranks, Replica
from ftlab.training.precision import Precision
from tests.helpers.training import (
    KeepGradients,
    collate,
    data_config,
    gradients,
    loss_sum,
    ragged_examples,
    run_ranks,
    tiny_llama,
)

FP32 = Precision(PrecisionConfig(), torch.device("cpu"))


def step_gradients(micro: int, count: int = 8) -> tuple[dict[str, torch.Tensor], StepResult]:
    model = tiny_llama()
    optimizer = KeepGradients(model)
    result = train_step(
        Replica(model, loss_sum, Ranks()), optimizer, collate(ragged_examples(count), micro), precision=FP32
    )
    return optimizer.seen, result


def assert_same(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> None:
    """Relative error of 1e-6 over each tensor."""
    assert ours.keys() == reference.keys()
    for name, expected in reference.items():
        error = torch.linalg.vector_norm(ours[name] - expected) / torch.linalg.vector_norm(expected)
        assert error < 1e-6, f"{name}: {error:.2e}"


@pytest.mark.parametrize("count", [8, 7])  # 7: a short last micro-batch
@pytest.mark.parametrize("micro", [1, 2, 3])
def test_gradient_and_loss_do_not_depend_on_the_split(micro: int, count: int) -> None:
    whole, measured_whole = step_gradients(8, count)
    parts, measured_parts = step_gradients(micro, count)
    assert_same(parts, whole)
    assert measured_parts.supervised == measured_whole.supervised
    assert measured_parts.nats == pytest.approx(measured_whole.nats, rel=1e-6)


def test_mean_of_means_fails_the_same_assertion() -> None:
    whole, _ = step_gradients(8)
    model = tiny_llama()
    micro_batches = collate(ragged_examples(8), 2)
    for batch in micro_batches:
        (loss_sum(model, batch) / batch.num_supervised / len(micro_batches)).backward()
    with pytest.raises(AssertionError):
        assert_same(gradients(model), whole)


def _two_ranks(ranks: Ranks, folder: Path, counts: list[int]) -> None:
    """For each count: the gradients of (micro 2, accum 2, world 2), saved by rank 0."""
    for count in counts:
        model = tiny_llama()
        optimizer = KeepGradients(model)
        examples = ragged_examples(count)
        rows = [[index] for index in range(count)]
        from ftlab.data.loader import RowLoader

        loader = RowLoader(examples, data_config(), seed=0, pad_id=1)
        mine = [loader.collate(part) for part in split_rows(rows, ranks.rank, ranks.world, 2)]
        mine = mine or [loader.collate(rows[:1]).unsupervised()]
        result = train_step(Replica(model, loss_sum, ranks), optimizer, mine, precision=FP32)
        if ranks.rank == 0:
            torch.save((optimizer.seen, result.supervised, result.nats), folder / f"{count}.pt")


def test_two_ranks_give_the_gradient_of_one(tmp_path: Path) -> None:
    counts = [8, 7, 1]  # even; short; one rank without a single supervised token
    run_ranks(_two_ranks, tmp_path, tmp_path, counts)
    for count in counts:
        whole, measured = step_gradients(8, count)
        saved: Any = torch.load(tmp_path / f"{count}.pt", weights_only=True)
        assert_same(saved[0], whole)
        assert saved[1] == measured.supervised
        assert saved[2] == pytest.approx(measured.nats, rel=1e-6)
