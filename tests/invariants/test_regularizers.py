"""What every regularizer promises: a table of regularizers times properties.

The properties: a strength of zero is bitwise the run without it, a positive one changes what is trained, evaluation is
unaffected, every trainable tensor gets a gradient, recomputed activations are the first ones again, and a run that is
killed and resumed ends bit for bit where the run that was not ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ftlab import build
from ftlab.config import (
    AdamWConfig,
    AverageConfig,
    CheckpointConfig,
    Config,
    DropoutConfig,
    FullConfig,
    L1SPConfig,
    L2Config,
    L2SPConfig,
    LoRAConfig,
    LwFConfig,
    MethodConfig,
    PrecisionConfig,
    RegularizerConfig,
    ReplayConfig,
    TrainingConfig,
)
from ftlab.data.loader import Replay, RowLoader
from ftlab.losses.cross_entropy import supervised_cross_entropy
from ftlab.methods import make_method
from ftlab.models.llama import LlamaForCausalLM
from ftlab.training.averaging import Averaging
from ftlab.training.checkpoint import Checkpoints
from ftlab.training.loop import Fit, Limits, StepResult, fit
from ftlab.training.parallel import Ranks, Replica
from ftlab.training.precision import Precision
from ftlab.training.signals import StopSignal
from ftlab.training.state import TrainState
from tests.helpers.training import (
    SilentProgress,
    SilentTracker,
    collate,
    data_config,
    gradients,
    ragged_examples,
    tiny_llama,
)

STEPS = 6


@dataclass(frozen=True)
class Row:
    """A regularizer by its strength; `inside`: it acts inside the model; `logs`: the scalar that it logs."""

    of: Callable[[float], RegularizerConfig]
    strength: float
    inside: bool = False
    logs: str = ""
    without: Callable[[], RegularizerConfig] = RegularizerConfig
    methods: tuple[str, ...] = ("full", "lora")


def dropout_at(place: str) -> Row:
    return Row(lambda p: RegularizerConfig(dropout=DropoutConfig(**{place: p})), 0.3, inside=True)


REGULARIZERS: dict[str, Row] = {
    "l2_sp": Row(lambda s: RegularizerConfig(l2_sp=L2SPConfig(s)), 0.1, logs="penalty/l2_sp"),
    "l1_sp": Row(lambda s: RegularizerConfig(l1_sp=L1SPConfig(s)), 0.01, logs="penalty/l1_sp"),
    "l2": Row(lambda s: RegularizerConfig(l2=L2Config(s)), 0.1, logs="penalty/l2"),
    "label smoothing": Row(lambda s: RegularizerConfig(label_smoothing=s), 0.2),
    **{f"dropout {p}": dropout_at(p) for p in ("embedding", "attention", "residual", "hidden", "head")},
    "stochastic depth": Row(lambda s: RegularizerConfig(stochastic_depth=s), 0.6, inside=True),
    "neftune": Row(lambda s: RegularizerConfig(neftune=s), 5.0, inside=True),
}
REGULARIZERS |= {
    kind: Row(lambda s, kind=kind: RegularizerConfig(average=AverageConfig(kind if s else "none", 0.5, 0.3)), 1.0)  # type: ignore[misc]
    for kind in ("ema", "swa")
}
REGULARIZERS["r_drop"] = Row(
    # zero strength is held against the run with the same dropout: see `without`
    lambda s: RegularizerConfig(r_drop=s, dropout=DropoutConfig(residual=0.1)),
    2.0,
    inside=True,
    without=lambda: RegularizerConfig(dropout=DropoutConfig(residual=0.1)),
)
REGULARIZERS["sam"] = Row(lambda s: RegularizerConfig(sam=s), 0.1)
REGULARIZERS["mixout"] = Row(lambda s: RegularizerConfig(mixout=s), 0.5, methods=("full",))
REGULARIZERS["lwf"] = Row(lambda s: RegularizerConfig(lwf=LwFConfig(s)), 2.0, inside=True)
REGULARIZERS["replay"] = Row(lambda s: RegularizerConfig(replay=ReplayConfig(s)), 0.4)
METHODS: dict[str, Callable[[], MethodConfig]] = {
    "full": FullConfig,
    "lora": lambda: LoRAConfig(rank=4, alpha=8.0, dropout=0.2),
}
PAIRS = [(name, method) for name, row in REGULARIZERS.items() for method in METHODS if method in row.methods]
every_pair = pytest.mark.parametrize(("name", "method"), PAIRS)
every_inside = pytest.mark.parametrize(("name", "method"), [pair for pair in PAIRS if REGULARIZERS[pair[0]].inside])


class Killed(Exception):  # noqa: N818 - stands for a signal, not for a mistake
    pass


def made(method: str, regularizer: RegularizerConfig, *, checkpointing: bool = False) -> tuple[Config, build.Built]:
    config = Config(
        method=METHODS[method](),
        regularizer=regularizer,
        optimizer=AdamWConfig(lr=1e-2),
        training=TrainingConfig(max_steps=STEPS, activation_checkpointing=checkpointing),
    )
    precision = Precision(PrecisionConfig(), torch.device("cpu"))
    return config, build.build_training(config, tiny_llama(), make_method(config.method, seed=0), precision)


def objective(built: build.Built) -> Tensor:
    """The training loss of a batch of eight examples, in training mode, from a fixed seed."""
    built.model.train()
    torch.manual_seed(5)
    return built.objective(built.model, collate(ragged_examples(8), 8)[0])


def train(
    folder: Path, method: str, regularizer: RegularizerConfig, *, kill_after: int = 0, resume: bool = False
) -> dict[str, Any]:
    """A run of `STEPS` steps: its losses, weights, averages, log lines and the random state it ends with."""
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
        replica=Replica(built.model, built.objective, Ranks()),
        loader=RowLoader(ragged_examples(16), data, seed=0, pad_id=1, replay=replay),
        schedule=lambda step: 1e-2,
        penalties=built.penalties,
        limits=Limits(STEPS, frozenset({2, STEPS}), 1, 5, 1.0),
        checkpoint=CheckpointConfig(every_steps=1, every_minutes=None),
        checkpoints=Checkpoints(folder, 2, progress.message),
        tracker=tracker,
        progress=progress,
        stop=StopSignal(),
        validate=lambda step: {"loss": 1.0 / step},
        micro_batch_size=data.micro_batch_size,
        on_step=on_step,
        climb=build.climb_of(config),
        hooks=build.build_hooks(config, make_method(config.method, seed=0), STEPS),
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
        assert isinstance(hook, Averaging)
        hook.settle(state, None)
    trace["weights"] = {key: tensor.clone() for key, tensor in state.trainable().items()}
    trace["rng"] = torch.get_rng_state()
    trace["lines"] = [line for line in tracker.lines if line["split"] == "train"]
    return trace


def assert_same_weights(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert all(torch.equal(ours["weights"][key], tensor) for key, tensor in theirs["weights"].items())
    assert torch.equal(ours["rng"], theirs["rng"])


@every_pair
def test_zero_strength_is_bitwise_the_run_without_it(tmp_path: Path, name: str, method: str) -> None:
    without = train(tmp_path / "without", method, REGULARIZERS[name].without())
    zero = train(tmp_path / "zero", method, REGULARIZERS[name].of(0.0))
    assert_same_weights(zero, without)
    assert zero["losses"] == without["losses"]


@every_pair
def test_a_positive_strength_trains_something_else(tmp_path: Path, name: str, method: str) -> None:
    row = REGULARIZERS[name]
    without = train(tmp_path / "without", method, row.without())
    some = train(tmp_path / "some", method, row.of(row.strength))
    assert any(not torch.equal(some["weights"][key], tensor) for key, tensor in without["weights"].items())
    logged = {key for key in some["lines"][-1] if key.startswith("penalty/")}
    assert logged == ({row.logs} if row.logs else set())


@every_pair
def test_killed_and_resumed_it_ends_where_it_would_have_ended(tmp_path: Path, name: str, method: str) -> None:
    row = REGULARIZERS[name]
    whole = train(tmp_path / "whole", method, row.of(row.strength))
    for kill_after in (2, 5):
        folder = tmp_path / f"killed-{kill_after}"
        train(folder, method, row.of(row.strength), kill_after=kill_after)
        later = train(folder, method, row.of(row.strength), resume=True)
        assert_same_weights(later, whole)
        assert later["losses"] == {step: whole["losses"][step] for step in later["losses"]}


@every_pair
def test_evaluation_does_not_know_of_it(name: str, method: str) -> None:
    row = REGULARIZERS[name]

    def measured(regularizer: RegularizerConfig) -> tuple[Tensor, Tensor]:
        config, built = made(method, regularizer)
        built.model.eval()
        torch.manual_seed(0)
        batch = collate(ragged_examples(8), 8)[0]
        with torch.no_grad():
            loss: Tensor = build.loss_sum_of(config)(built.model, batch)
        assert torch.equal(loss, plain_loss(built.model))
        return loss, torch.get_rng_state()

    def plain_loss(model: LlamaForCausalLM) -> Tensor:
        with torch.no_grad():
            return supervised_cross_entropy(model, collate(ragged_examples(8), 8)[0], 256)

    (loss, rng), (expected, untouched) = measured(row.of(row.strength)), measured(RegularizerConfig())
    assert torch.equal(loss, expected)
    assert torch.equal(rng, untouched)


@every_inside
def test_recomputed_activations_are_the_first_ones_again(name: str, method: str) -> None:
    row = REGULARIZERS[name]

    def step(checkpointing: bool) -> tuple[dict[str, Tensor], Tensor]:
        _, built = made(method, row.of(row.strength), checkpointing=checkpointing)
        with torch.no_grad():
            for key, parameter in built.model.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(generator=torch.Generator().manual_seed(1))
        objective(built).backward()
        return gradients(built.model), torch.get_rng_state()

    (plain, rng), (again, rng_again) = step(False), step(True)
    assert plain.keys() == again.keys()
    assert all(torch.equal(again[key], gradient) for key, gradient in plain.items())
    assert torch.equal(rng, rng_again)


@every_pair
def test_every_tensor_that_trains_gets_a_gradient(name: str, method: str) -> None:
    row = REGULARIZERS[name]
    _, built = made(method, row.of(row.strength))
    objective(built).backward()
    expected = {key for key, parameter in built.model.named_parameters() if parameter.requires_grad}
    assert gradients(built.model).keys() == expected


def test_all_of_them_act_together(tmp_path: Path) -> None:
    everything = RegularizerConfig()
    for row in REGULARIZERS.values():
        one = row.of(row.strength)
        changed = {key: value for key, value in vars(one).items() if value != getattr(RegularizerConfig(), key)}
        if "dropout" in changed:
            drops = {key: p for key, p in vars(changed["dropout"]).items() if p > 0}
            changed["dropout"] = replace(everything.dropout, **drops)
        everything = replace(everything, **changed)
    whole = train(tmp_path / "whole", "full", everything)
    train(tmp_path / "killed", "full", everything, kill_after=3)
    assert_same_weights(train(tmp_path / "killed", "full", everything, resume=True), whole)
