"""A tiny run of any method with any regularizer, killed and resumed if asked, on one rank or several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ftlab import build
from ftlab.config import (
    AdamWConfig,
    CheckpointConfig,
    Config,
    MethodConfig,
    PrecisionConfig,
    RegularizerConfig,
    TrainingConfig,
)
from ftlab.data.loader import Replay, RowLoader
from ftlab.methods import make_method
from ftlab.training.averaging import Averaging
from ftlab.training.checkpoint import Checkpoints
from ftlab.training.loop import Fit, Limits, StepResult, fit
from ftlab.training.parallel import Ranks, Replica
from ftlab.training.precision import Precision
from ftlab.training.signals import StopSignal
from ftlab.training.state import TrainState
from tests.helpers.training import SilentProgress, SilentTracker, data_config, ragged_examples, tiny_llama

STEPS = 6


class Killed(Exception):  # noqa: N818 - stands for a signal, not for a mistake
    pass


def made(
    method: MethodConfig, regularizer: RegularizerConfig, *, checkpointing: bool = False
) -> tuple[Config, build.Built]:
    config = Config(
        method=method,
        regularizer=regularizer,
        optimizer=AdamWConfig(lr=1e-2),
        training=TrainingConfig(max_steps=STEPS, activation_checkpointing=checkpointing),
    )
    precision = Precision(PrecisionConfig(), torch.device("cpu"))
    return config, build.build_training(config, tiny_llama(), make_method(config.method, seed=0), precision)


def train(
    folder: Path,
    method: MethodConfig,
    regularizer: RegularizerConfig,
    *,
    kill_after: int = 0,
    resume: bool = False,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """A run of `STEPS` steps: its losses, weights, averages, log lines and the random state it ends with."""
    ranks = ranks or Ranks()
    config, built = made(method, regularizer)
    trace: dict[str, Any] = {"losses": {}}

    def on_step(step: int, result: StepResult, ids: tuple[str, ...]) -> None:
        trace["losses"][step] = (result.nats, result.penalties)
        if step + 1 == kill_after:
            raise Killed

    torch.manual_seed(3)
    built.model.train()
    progress: Any = SilentProgress()
    tracker: Any = SilentTracker()
    data = data_config(packing=True)
    share = config.regularizer.replay.share
    replay = Replay(ragged_examples(9, seed=8), share) if share > 0 else None
    state = TrainState(built.model, built.optimizer, built.precision, "hash")
    run = Fit(
        replica=Replica(built.model, built.objective, ranks),
        loader=RowLoader(ragged_examples(16), data, seed=0, pad_id=1, replay=replay),
        schedule=lambda step: 1e-2,
        penalties=built.penalties,
        limits=Limits(STEPS, frozenset({2, STEPS}), 1, 5, 1.0),
        checkpoint=CheckpointConfig(every_steps=1, every_minutes=None),
        checkpoints=Checkpoints(folder, 2, progress.message, main=ranks.is_main),
        tracker=tracker,
        progress=progress,
        stop=StopSignal(),
        validate=lambda step: {"loss": 1.0 / step},
        micro_batch_size=data.micro_batch_size,
        on_step=on_step,
        climb=build.climb_of(config),
        hooks=build.build_hooks(config, built.method, STEPS),
    )
    if resume:
        saved = run.checkpoints.newest()
        assert saved is not None
        state.load_state_dict(saved, 0, 1)
    try:
        fit(state, run)
    except Killed:
        return trace
    for hook in run.hooks:
        if isinstance(hook, Averaging):
            hook.settle(state, None)
    trace["weights"] = {key: tensor.clone() for key, tensor in state.trainable().items()}
    trace["rng"] = torch.get_rng_state()
    trace["lines"] = [line for line in tracker.lines if line["split"] == "train"]
    return trace


def assert_same_weights(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert all(torch.equal(ours["weights"][key], tensor) for key, tensor in theirs["weights"].items())
    assert torch.equal(ours["rng"], theirs["rng"])
