"""Gradual unfreezing in the loop: when blocks join, what a resume finds, what several ranks do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ftlab.compose import compose
from ftlab.config import AdamWConfig, CheckpointConfig, GradualUnfreezeConfig
from ftlab.errors import ConfigError
from ftlab.methods import make_method
from ftlab.optim.adamw import build_optimizer
from ftlab.session import train
from ftlab.training.loop import Fit, fit
from ftlab.training.parallel import Ranks, Replica
from ftlab.training.state import TrainState
from ftlab.training.unfreezing import Unfreezing
from tests.helpers.training import SilentProgress, lora_fit, loss_sum, run_ranks, tiny_llama

STEPS = 9
TOP, BOTTOM = "model.layers.1.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"


class Killed(Exception):  # noqa: N818 - stands for a signal, not for a mistake
    pass


def gradual(folder: Path, config: GradualUnfreezeConfig, **changes: Any) -> tuple[TrainState, Fit]:
    """A run of the tiny model (two blocks) by this method."""
    ranks = changes.get("ranks", Ranks())
    changes = {"total_steps": STEPS, "checkpoint": CheckpointConfig(every_steps=1, every_minutes=None), **changes}
    lora, run = lora_fit(folder, **changes)
    model = tiny_llama()
    method = make_method(config)
    table = method.apply(model)
    optimizer = build_optimizer(AdamWConfig(lr=1e-2, weight_decay=0.1), model, table)
    model.train()
    run.replica = Replica(model, loss_sum, ranks)
    run.hooks = [Unfreezing(config, method.stages)]
    return TrainState(model, optimizer, lora.precision, "hash"), run


def weights(state: TrainState) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in state.model.named_parameters()}


def test_a_block_moves_once_its_stage_has_come(tmp_path: Path) -> None:
    moved: dict[str, list[int]] = {TOP: [], BOTTOM: [], "model.embed_tokens.weight": []}
    start = weights(gradual(tmp_path / "other", GradualUnfreezeConfig())[0])

    def on_step(step: int, *_: Any) -> None:
        for name in moved:
            if not torch.equal(state.model.get_parameter(name), start[name]):
                moved[name].append(step)

    config = GradualUnfreezeConfig(trigger="step", every=3, train_embeddings=True)
    state, run = gradual(tmp_path / "run", config, on_step=on_step)
    fit(state, run)
    assert moved == {TOP: [*range(9)], BOTTOM: [*range(3, 9)], "model.embed_tokens.weight": [*range(6, 9)]}
    assert isinstance(run.progress, SilentProgress)
    stages = [message for message in run.progress.messages if "stage" in message]
    assert [line.split(":")[0] for line in stages] == ["step 0", "step 3", "step 6"]
    names = {id(p): name for name, p in state.model.named_parameters()}
    steps = {names[id(p)]: int(found["step"]) for p, found in state.optimizer.state.items()}
    assert steps[TOP] == 9
    assert steps[BOTTOM] == 6, "its moments begin when it does"
    assert steps["model.embed_tokens.weight"] == 3


@pytest.mark.parametrize(
    "config, changes",
    [
        (GradualUnfreezeConfig(trigger="step", every=3, train_embeddings=True), {}),
        (GradualUnfreezeConfig(trigger="epoch", layer_decay=0.5), {}),
        (
            GradualUnfreezeConfig(trigger="stall", every=2),
            {"validate": lambda step: {"loss": 1.0 + step}, "validate_at": frozenset(range(1, STEPS + 1))},
        ),
    ],
    ids=["step", "epoch", "stall"],
)
def test_killed_at_every_step_and_resumed_it_is_the_undisturbed_run(
    config: GradualUnfreezeConfig, changes: dict[str, Any], tmp_path: Path
) -> None:
    whole, run = gradual(tmp_path / "whole", config, **changes)
    fit(whole, run)
    expected, counters = weights(whole), whole.counters
    assert counters.stage == len(run.hooks[0].stages) - 1, "every stage was entered"  # type: ignore[attr-defined]
    for kill_after in range(1, STEPS):
        folder = tmp_path / str(kill_after)

        def killed(step: int, *_: Any, last: int = kill_after) -> None:
            if step == last:
                raise Killed

        state, run = gradual(folder, config, **changes, on_step=killed)
        with pytest.raises(Killed):
            fit(state, run)
        state, run = gradual(folder, config, **changes)
        saved = run.checkpoints.newest()
        assert saved is not None
        state.load_state_dict(saved, 0, 1)
        assert state.counters.step >= kill_after
        fit(state, run)
        assert state.counters == counters
        for name, tensor in weights(state).items():
            assert torch.equal(tensor, expected[name]), (kill_after, name)


def test_a_stall_counts_only_validations_that_are_no_better(tmp_path: Path) -> None:
    values = iter([1.0, 2.0, 0.5, 0.6, 0.7, 0.4, 0.3, 0.2, 0.1])
    config = GradualUnfreezeConfig(trigger="stall", every=2)
    every = frozenset(range(1, STEPS + 1))
    state, run = gradual(tmp_path, config, validate=lambda step: {"loss": next(values)}, validate_at=every)
    fit(state, run)
    assert isinstance(run.progress, SilentProgress)
    stages = [message for message in run.progress.messages if "stage" in message]
    assert [line.split(":")[0] for line in stages] == ["step 0", "step 5"]


def test_patience_begins_anew_with_a_stage(tmp_path: Path) -> None:
    """Stalled from step 1 on: block 0 joins after two validations, and three more end the run."""
    config = GradualUnfreezeConfig(trigger="stall", every=2)
    checkpoint = CheckpointConfig(every_steps=None, every_minutes=None, patience=3)
    every = frozenset(range(1, STEPS + 1))
    changes: dict[str, Any] = {"validate": lambda step: {"loss": 1.0 + step}, "validate_at": every}
    state, run = gradual(tmp_path, config, checkpoint=checkpoint, **changes)
    fit(state, run)
    assert isinstance(run.progress, SilentProgress)
    assert [line.split(":")[0] for line in run.progress.messages if "stage" in line] == ["step 0", "step 3"]
    assert state.counters.step == 6


@pytest.mark.parametrize("every", [1, 99], ids=["all join", "the lowest never joins"])
def test_the_rate_that_is_logged_is_the_runs_own(every: int, tmp_path: Path) -> None:
    """Whatever share of it the first of the optimizer's groups has, and whoever trains."""
    config = GradualUnfreezeConfig(trigger="step", every=every, train_embeddings=True, layer_decay=0.5)
    state, run = gradual(tmp_path, config)
    fit(state, run)
    assert {group["base_lr"] for group in state.optimizer.param_groups} == {1e-2, 0.5e-2, 0.25e-2}
    assert state.optimizer.param_groups[0]["base_lr"] == 0.25e-2
    lines = [line for line in run.tracker.lines if line["split"] == "train"]  # type: ignore[attr-defined]
    assert [line["lr"] for line in lines] == [1e-2 * (1.0 / (1 + step)) for step in range(STEPS)]


@pytest.mark.parametrize(
    "config, stage, never",
    [
        (GradualUnfreezeConfig(trigger="step", every=8, train_embeddings=True), "2 of 3", "the embedding"),
        (GradualUnfreezeConfig(trigger="step", every=9, train_embeddings=True), "1 of 3", "block 0 and the embedding"),
        (GradualUnfreezeConfig(trigger="step", every=9, first_blocks=0), "1 of 3", "blocks 0 to 1"),
        (GradualUnfreezeConfig(trigger="epoch", every=99), "1 of 2", "block 0"),
        (
            GradualUnfreezeConfig(trigger="stall", every=8),
            "1 of 2",
            "block 0",
        ),  # the stall is known after the last step
        (GradualUnfreezeConfig(trigger="stall", every=7), None, None),
        (GradualUnfreezeConfig(trigger="step", every=8), None, None),
    ],
)
def test_what_never_trained_is_said(
    config: GradualUnfreezeConfig, stage: str | None, never: str | None, tmp_path: Path
) -> None:
    every = frozenset(range(1, STEPS + 1))
    state, run = gradual(tmp_path, config, validate=lambda step: {"loss": 1.0 + step}, validate_at=every)
    start = weights(state)
    fit(state, run)
    [hook] = run.hooks
    assert isinstance(hook, Unfreezing)
    still = {name for name, weight in weights(state).items() if torch.equal(weight, start[name])}
    still -= set() if config.train_embeddings else {"model.embed_tokens.weight"}
    line = hook.unreached(state.counters.stage)
    assert hook.foreseen(STEPS, run.loader) == (None if config.trigger == "stall" else line)
    assert (line is None) == (never is None) == (not still)
    if line is not None:
        sooner = f", lower method.every={config.every}"
        assert line == (
            f"gradual unfreezing ends at stage {stage} and leaves {never} frozen; train longer (training.epochs, "
            f"training.max_steps){sooner} or raise method.blocks=1"
        )


def on_a_rank(ranks: Ranks, folder: Path) -> None:
    config = GradualUnfreezeConfig(trigger="step", every=3, train_embeddings=True)
    state, run = gradual(folder / f"rank-{ranks.rank}", config, ranks=ranks)
    fit(state, run)
    torch.save(weights(state), folder / f"weights-{ranks.rank}.pt")


def test_two_ranks_end_where_one_does(tmp_path: Path) -> None:
    config = GradualUnfreezeConfig(trigger="step", every=3, train_embeddings=True)
    alone, run = gradual(tmp_path / "alone", config)
    fit(alone, run)
    run_ranks(on_a_rank, tmp_path, tmp_path)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"weights-{rank}.pt", weights_only=True)
        for name, weight in weights(alone).items():
            torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-4, msg=name)


def test_the_whole_command(tmp_path: Path) -> None:
    words = ["+experiment=full_tiny", "method=gradual_unfreeze", "method.trigger=step", "method.every=4"]
    words += ["evaluation.generate=false", "training.max_steps=10", "tracking=disabled", f"run_dir={tmp_path / 'run'}"]
    assert train(*compose(words)) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    assert record["scores"]["final"]["loss"]["value"] < record["scores"]["base"]["loss"]["value"]
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert not [line for line in record["warnings"] if "unfreezing" in line]


def test_the_command_says_once_that_the_last_stage_never_came(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["+experiment=full_tiny", "method=gradual_unfreeze", "evaluation.generate=false", "evaluation.test=false"]
    words += ["training.max_steps=2", "tracking=disabled", f"run_dir={tmp_path / 'run'}"]
    assert train(*compose(words)) == 0
    [told] = [line for line in capsys.readouterr().out.splitlines() if "unfreezing" in line]
    assert told == (
        "gradual unfreezing ends at stage 1 of 2 and leaves block 0 frozen; train longer (training.epochs, "
        "training.max_steps) or raise method.blocks=1"
    )
    assert told in json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))["warnings"]


def test_a_stall_without_a_validation_example_is_refused_before_training(tmp_path: Path) -> None:
    words = ["+experiment=full_tiny", "method=gradual_unfreeze", "method.trigger=stall", "tracking=disabled"]
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "long " * 99, "completion": "yes"}) + "\n", "utf-8")
    words += [f"data.validation={tmp_path / 'long.jsonl'}", "data.validation_fraction=0", "data.too_long=drop"]
    words += [f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(ConfigError, match="stall counts validations, and no validation example is left"):
        train(*compose(words))


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["training.activation_cache_gib=1"], "stage to stage"),
        (["method.trigger=stall", "evaluation.times=0"], "needs validation"),
        (
            ["method.trigger=stall", "data.validation_fraction=0"],
            "stall needs validation, and data.validation_fraction",
        ),
        (["method.trigger=stall", "method.every=3", "checkpoint.patience=3"], "give more than method.every"),
        (["method.trigger=blocks"], "none of step, epoch, stall"),
        (["method.rates=[q_proj]"], "PATTERN:FACTOR"),
    ],
)
def test_contradictions_are_refused_before_anything_loads(words: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        compose(["+experiment=full_tiny", "method=gradual_unfreeze", *words])
