"""Saving or validating on rank 0 while the others go on hangs them, or mixes up their collectives."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ftlab.config import CheckpointConfig, LoRAConfig
from ftlab.evaluation.loss import evaluate_loss
from ftlab.methods import make_method
from ftlab.models.checkpoint import save_safetensors
from ftlab.models.llama import LlamaForCausalLM
from ftlab.training import parallel
from ftlab.training.checkpoint import Checkpoints
from ftlab.training.loop import fit
from ftlab.training.parallel import Ranks
from tests.helpers.training import collate, lora_fit, loss_sum, ragged_examples, run_ranks

TIMEOUT = 20.0  # seconds


def _write_everything(model: LlamaForCausalLM, folder: Path) -> None:
    """All that writes weights besides checkpoints: the adapter, the merged model, an export."""
    method = make_method(LoRAConfig(rank=4, alpha=8.0, dropout=0.3), seed=0)  # as in lora_fit
    method.save(model, folder / "adapter", "base")
    method.merge(model)
    exported = copy.deepcopy(model)
    method.merged(exported)
    save_safetensors(exported, folder / "exported")
    method.unmerge(model)


def _train(ranks: Ranks, folder: Path, broken: bool) -> dict[str, Any]:
    """Rank 0 saves all there is, slowly; validation with unequal shares of the batches. What this rank went through."""
    batches = collate(ragged_examples(7), 2)

    def validate(step: int) -> dict[str, float]:
        if broken and not ranks.is_main:
            return {"loss": 1.0}  # the mistake: only rank 0 takes part in the sum
        if ranks.is_main:
            _write_everything(state.model, folder / f"step-{step}")  # type: ignore[arg-type]
        share = batches[ranks.rank :: ranks.world]
        return evaluate_loss(state.model, share, loss_sum, ranks.sum)

    state, run = lora_fit(
        folder / "run",
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
    return {
        "losses": [line["loss"] for line in run.tracker.lines if line.get("split") == "train"],  # type: ignore[attr-defined]
        "weights": sum(float(tensor.double().abs().sum()) for tensor in state.trainable().values()),
        "best": state.counters.best_value,
        "kept": run.checkpoints.steps(),
    }


@contextlib.contextmanager
def _gradients_unchecked() -> Iterator[None]:
    """Let gradients travel in a group of their own: they are not what is looked at here.

    torch 2.13 crashes when DistributedDataParallel is put on a group whose collectives are compared.
    """
    dist.set_debug_level(dist.DebugLevel.OFF)
    plain = dist.new_group()

    class Unchecked(DistributedDataParallel):
        def __init__(self, module: torch.nn.Module, **options: Any) -> None:
            super().__init__(module, process_group=plain, **options)

    parallel.DistributedDataParallel = Unchecked  # type: ignore[misc]
    try:
        yield
    finally:
        parallel.DistributedDataParallel = DistributedDataParallel  # type: ignore[misc]


def _tell(ranks: Ranks, folder: Path, broken: bool) -> None:
    """Leave in a file what this rank saw, an error included."""
    begin = time.monotonic()
    try:
        with _gradients_unchecked():
            seen = _train(ranks, folder, broken)
    except Exception as error:
        seen = {"error": f"{type(error).__name__}: {error}"}
    gc.collect()  # the replica refers to itself; what it holds of its group must go before the group does
    seen["seconds"] = time.monotonic() - begin
    (folder / f"rank-{ranks.rank}.json").write_text(json.dumps(seen))


def train(folder: Path, monkeypatch: pytest.MonkeyPatch, *, broken: bool) -> list[dict[str, Any]]:
    """What both ranks saw. torch compares each collective between the ranks before it begins."""
    (folder / "run").mkdir()
    for step in (2, 4):
        (folder / f"step-{step}").mkdir()
    monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "DETAIL")
    run_ranks(_tell, folder, folder, broken, timeout_seconds=TIMEOUT)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def assert_together(seen: list[dict[str, Any]]) -> None:
    assert [rank.get("error") for rank in seen] == [None, None]
    assert all(rank.pop("seconds") < TIMEOUT for rank in seen)
    assert seen[0] == seen[1]
    assert len(seen[0]["losses"]) == 4


def test_every_rank_saves_and_validates_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = train(tmp_path, monkeypatch, broken=False)
    assert_together(seen)
    assert seen[0]["kept"] == [4, 3]
    for step in (2, 4):
        for name in ("adapter/adapter_model.safetensors", "exported/model.safetensors"):
            assert (tmp_path / f"step-{step}" / name).stat().st_size > 0


def test_validating_on_rank_0_alone_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = train(tmp_path, monkeypatch, broken=True)
    with pytest.raises(AssertionError):
        assert_together(copy.deepcopy(seen))
    # Not any failure: both ranks were in a collective, each in another one.
    assert all("mismatch between collectives" in rank["error"] for rank in seen), seen
    assert all("ALLREDUCE" in rank["error"] for rank in seen), seen
