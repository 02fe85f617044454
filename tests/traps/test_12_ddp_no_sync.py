"""no_sync on the wrong micro-batch, a partial last accumulation, unequal data: weights part ways silently."""

from __future__ import annotations

import hashlib
import signal
from pathlib import Path

import pytest
import torch

from ftlab.config import CheckpointConfig
from ftlab.training.loop import fit
from ftlab.training.parallel import Ranks, Replica
from ftlab.training.signals import Interrupted, StopSignal
from tests.helpers.training import data_config, lora_fit, ragged_examples, run_ranks


def weights_hash(state: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(state[name].detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _train(ranks: Ranks, folder: Path, broken: bool) -> None:
    """9 examples in global batches of 8 by micro-batches of 1: the last batch has one, so a rank has none."""
    hashes: list[str] = []
    state, run = lora_fit(
        folder / f"run-{broken}",
        ranks=ranks,
        total_steps=6,
        dropout=0.0,
        examples=ragged_examples(9),
        data=data_config(packing=False, batch_size=8, micro_batch_size=1),
        checkpoint=CheckpointConfig(every_steps=None, every_minutes=None),
        on_step=lambda *_: hashes.append(weights_hash(state.trainable())),
    )
    if broken:
        never = Replica.sync
        Replica.sync = lambda self, last: never(self, False)  # type: ignore[method-assign]
    fit(state, run)
    everyone = ranks.gather(hashes)
    if ranks.rank == 0:
        torch.save({"hashes": everyone, "weights": state.trainable()}, folder / f"{broken}.pt")


def assert_equal_on_all_ranks(hashes: list[list[str]]) -> None:
    assert hashes[0] == hashes[1]


def test_weights_stay_equal_on_all_ranks_and_equal_one_rank(tmp_path: Path) -> None:
    run_ranks(_train, tmp_path, tmp_path, False)
    two = torch.load(tmp_path / "False.pt", weights_only=True)
    assert_equal_on_all_ranks(two["hashes"])
    assert len(set(two["hashes"][0])) == 6  # and they did move

    state, run = lora_fit(
        tmp_path / "one",
        total_steps=6,
        dropout=0.0,
        examples=ragged_examples(9),
        data=data_config(packing=False, batch_size=8, micro_batch_size=1),
    )
    fit(state, run)
    for name, tensor in state.trainable().items():
        torch.testing.assert_close(two["weights"][name], tensor, rtol=1e-4, atol=1e-5)


def test_never_exchanging_gradients_fails_the_same_assertion(tmp_path: Path) -> None:
    run_ranks(_train, tmp_path, tmp_path, True)
    broken = torch.load(tmp_path / "True.pt", weights_only=True)
    with pytest.raises(AssertionError):
        assert_equal_on_all_ranks(broken["hashes"])


def _stopped(ranks: Ranks, folder: Path) -> None:
    """SIGTERM reaches rank 1 alone, during step 3."""
    state, run = lora_fit(
        folder / "run", ranks=ranks, checkpoint=CheckpointConfig(every_steps=None, every_minutes=None)
    )
    with StopSignal() as stop, stop.deferred():
        run.stop = stop
        run.on_step = lambda step, *_: signal.raise_signal(signal.SIGTERM) if (step, ranks.rank) == (2, 1) else None
        try:
            fit(state, run)
        except Interrupted as interrupted:
            (folder / f"rank-{ranks.rank}").write_text(f"{interrupted.exit_code} after {state.counters.step}")


def test_a_signal_to_one_rank_stops_all_of_them_at_the_same_step(tmp_path: Path) -> None:
    run_ranks(_stopped, tmp_path, tmp_path)
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)] == ["143 after 3"] * 2
    assert (tmp_path / "run" / "step-00000003").exists()
