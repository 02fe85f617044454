"""What every regularizer promises: a table of regularizers times properties.

A row for each option of conf/regularizer, some in several forms ("dropout: hidden"); a column for each of PROPERTIES. A
cell is tested, or `Row.apart` says why it does not apply. What belongs to methods (identity at the start, saving,
merging, what is frozen) is in test_methods.py, closed forms are in test_closed_forms.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ftlab import build
from ftlab.config import (
    AverageConfig,
    DropoutConfig,
    EWCConfig,
    FullConfig,
    L1SPConfig,
    L2Config,
    L2SPConfig,
    LoRAConfig,
    LwFConfig,
    MethodConfig,
    RegularizerConfig,
    ReplayConfig,
)
from ftlab.losses.cross_entropy import supervised_cross_entropy
from ftlab.losses.fisher import FILE, FisherFacts, save_fisher
from ftlab.losses.scalars import collecting
from ftlab.models.llama import LlamaForCausalLM
from ftlab.training.parallel import Ranks
from tests.helpers.runs import (
    Runs,
    assert_same_weights,
    assert_two_ranks,
    made,
    one_batch,
    pulled_back,
    save_for_ranks,
    train,
)
from tests.helpers.training import collate, gradients, ragged_examples, run_ranks, tiny_llama

CONF = Path(__file__).parents[2] / "conf" / "regularizer"
PROPERTIES = {
    "zero": "a strength of zero is bitwise the run without it",
    "acts": "a positive strength trains something else, and logs what it does",
    "resume": "killed and resumed, a run ends bit for bit where the one that was not ends",
    "evaluation": "evaluation does not know of it",
    "gradients": "every tensor that trains gets a gradient",
    "recomputed": "recomputed activations are the first ones again",
    "ranks": "two ranks end where one does",
    "held": "a strength of 1e9 holds weights where they are protected",
}
OUTSIDE = "it does nothing inside the model"
DRAWN = "each rank draws masks of its own"
NO_HOLD = "it protects no weights"


@dataclass(frozen=True)
class Row:
    """A regularizer by its strength; `logs`: its scalars in the log; `apart`: why a property does not apply.

    without: what a positive strength is compared with.
    """

    of: Callable[[float], RegularizerConfig]
    strength: float
    apart: dict[str, str] = field(default_factory=lambda: {"recomputed": OUTSIDE, "held": NO_HOLD})
    logs: str = ""
    without: Callable[[], RegularizerConfig] = RegularizerConfig
    methods: tuple[str, ...] = ("full", "lora")


INSIDE = {"ranks": DRAWN, "held": NO_HOLD}
PULL = {"recomputed": OUTSIDE}


def dropout_at(place: str) -> Row:
    return Row(lambda p: RegularizerConfig(dropout=DropoutConfig(**{place: p})), 0.3, INSIDE)


def l2_sp(**options: Any) -> Callable[[float], RegularizerConfig]:
    return lambda strength: RegularizerConfig(l2_sp=L2SPConfig(strength, **options))


REGULARIZERS: dict[str, Row] = {
    "l2_sp": Row(l2_sp(), 0.1, PULL, "penalty/l2_sp"),
    "l2_sp: mmap": Row(l2_sp(anchor="mmap"), 0.1, PULL, "penalty/l2_sp", methods=("full",)),
    "l2_sp: decoupled": Row(l2_sp(mode="decoupled"), 0.1, PULL, "penalty/l2_sp", methods=("full",)),
    "l1_sp": Row(
        lambda s: RegularizerConfig(l1_sp=L1SPConfig(s)),
        0.01,
        PULL | {"held with lora": "its pull is no gradient of A and B that gets smaller near the minimum"},
        "penalty/l1_sp",
    ),
    "l2": Row(lambda s: RegularizerConfig(l2=L2Config(s)), 0.1, logs="penalty/l2"),
    "ewc": Row(lambda s: RegularizerConfig(ewc=EWCConfig(s)), 0.1, PULL, "penalty/ewc"),
    "label_smoothing": Row(lambda s: RegularizerConfig(label_smoothing=s), 0.2, logs="label_smoothing/cost"),
    **{f"dropout: {p}": dropout_at(p) for p in ("embedding", "attention", "residual", "hidden", "head")},
    "stochastic_depth": Row(lambda s: RegularizerConfig(stochastic_depth=s), 0.6, INSIDE),
    "neftune": Row(lambda s: RegularizerConfig(neftune=s), 5.0, INSIDE),
}
REGULARIZERS |= {
    kind: Row(
        lambda s, kind=kind: RegularizerConfig(average=AverageConfig(kind if s else "none", 0.5, 0.3)),  # type: ignore[misc]
        1.0,
        logs="average/distance average/models",
    )
    for kind in ("ema", "swa")
}
REGULARIZERS["r_drop"] = Row(
    lambda s: RegularizerConfig(r_drop=s, dropout=DropoutConfig(residual=0.1 if s > 0 else 0)),
    2.0,
    INSIDE,
    "r_drop/kl",
    without=lambda: RegularizerConfig(dropout=DropoutConfig(residual=0.1)),
)
REGULARIZERS["sam"] = Row(lambda s: RegularizerConfig(sam=s), 0.1, logs="sam/rise")
REGULARIZERS["mixout"] = Row(
    lambda s: RegularizerConfig(mixout=s),
    0.5,
    {"recomputed": "validate refuses it with checkpointing", "ranks": DRAWN, "held": NO_HOLD},
    "mixout/distance",
    methods=("full",),
)
REGULARIZERS["lwf"] = Row(
    lambda s: RegularizerConfig(lwf=LwFConfig(s)), 2.0, {"held": "it holds what the model says"}, "lwf/kl"
)
REGULARIZERS["replay"] = Row(lambda s: RegularizerConfig(replay=ReplayConfig(s)), 0.4)
METHODS: dict[str, Callable[[], MethodConfig]] = {
    "full": FullConfig,
    "lora": lambda: LoRAConfig(rank=4, alpha=8.0, dropout=0.2),
}
# Dropout of the adapter draws too, so ranks are compared without it.
STILL: dict[str, Callable[[], MethodConfig]] = {"full": FullConfig, "lora": lambda: LoRAConfig(rank=4, alpha=8.0)}


def regularizer(name: str, strength: float, folder: Path) -> RegularizerConfig:
    """A row of a strength; EWC finds an earlier run in `folder`, which ended at the pretrained weights."""
    config = REGULARIZERS[name].of(strength)
    if name != "ewc":
        return config
    path = folder / "earlier" / FILE
    if not path.exists():
        path.parent.mkdir()
        weights = {key: p.detach() for key, p in tiny_llama().named_parameters() if p.ndim == 2}
        save_fisher(path, {key: torch.ones_like(p) for key, p in weights.items()}, weights, FisherFacts("true", 1, 0))
    return replace(config, ewc=EWCConfig(strength, [str(path.parent)]))


def of(name: str, folder: Path) -> RegularizerConfig:
    return regularizer(name, REGULARIZERS[name].strength, folder)


def cases(column: str) -> list[tuple[str, str]]:
    """Rows times methods that a property applies to."""
    return [
        (name, method)
        for name, row in REGULARIZERS.items()
        for method in METHODS
        if method in row.methods and not {column, f"{column} with {method}"} & row.apart.keys()
    ]


COLUMNS: list[str] = []  # of each test below, the one it goes through


def every(column: str) -> pytest.MarkDecorator:
    COLUMNS.append(column)
    return pytest.mark.parametrize(("name", "method"), cases(column))


def test_the_rows_are_the_options_and_each_cell_is_tested_or_says_why_not() -> None:
    """`none` is what all rows are compared with."""
    options = {path.stem for path in CONF.glob("*.yaml")}
    assert {name.partition(":")[0] for name in REGULARIZERS} | {"none"} == options
    for name, row in REGULARIZERS.items():
        assert {key.partition(" ")[0] for key in row.apart} <= PROPERTIES.keys(), name
        assert all(len(why) > 10 for why in row.apart.values()), name
    assert sorted(COLUMNS) == sorted(PROPERTIES)


def objective(built: build.Built) -> Tensor:
    """The training loss of a batch of eight examples, in training mode, from a fixed seed."""
    built.model.train()
    torch.manual_seed(5)
    return built.objective(built.model, collate(ragged_examples(8), 8)[0])


def scalars(line: dict[str, Any]) -> dict[str, float]:
    """What regularizers put into a line of the log."""
    return {key: value for key, value in line.items() if "/" in key and not key.startswith("penalty_share/")}


@every("zero")
def test_zero_strength_is_bitwise_the_run_without_it(runs: Runs, name: str, method: str) -> None:
    """Without it: a run whose objective is the plain loss, and that has no penalty, no noise and no hook."""
    without = runs(METHODS[method](), None)
    zero = runs(METHODS[method](), regularizer(name, 0.0, runs.folder))
    assert_same_weights(zero, without)
    assert zero["losses"] == without["losses"]
    assert scalars(zero["lines"][-1]) == {}


@every("acts")
def test_a_positive_strength_trains_something_else(runs: Runs, name: str, method: str) -> None:
    row = REGULARIZERS[name]
    without = runs(METHODS[method](), row.without())
    some = runs(METHODS[method](), of(name, runs.folder))
    assert any(not torch.equal(some["weights"][key], tensor) for key, tensor in without["weights"].items())
    assert scalars(some["lines"][-1]).keys() == set(row.logs.split())


@every("resume")
def test_killed_and_resumed_it_ends_where_it_would_have_ended(
    tmp_path: Path, runs: Runs, name: str, method: str
) -> None:
    config = of(name, runs.folder)
    whole = runs(METHODS[method](), config)
    for kill_after in (2, 5):
        folder = tmp_path / f"killed-{kill_after}"
        train(folder, METHODS[method](), config, kill_after=kill_after)
        later = train(folder, METHODS[method](), config, resume=True)
        assert_same_weights(later, whole)
        assert later["losses"] == {step: whole["losses"][step] for step in later["losses"]}
        rest = whole["lines"][-len(later["lines"]) :]
        assert [scalars(line) for line in later["lines"]] == [scalars(line) for line in rest]


@every("evaluation")
def test_evaluation_does_not_know_of_it(tmp_path: Path, name: str, method: str) -> None:
    def measured(regularizer: RegularizerConfig) -> tuple[Tensor, Tensor]:
        config, built = made(METHODS[method](), regularizer)
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

    (loss, rng), (expected, untouched) = measured(of(name, tmp_path)), measured(RegularizerConfig())
    assert torch.equal(loss, expected)
    assert torch.equal(rng, untouched)


@every("recomputed")
def test_recomputed_activations_are_the_first_ones_again(tmp_path: Path, name: str, method: str) -> None:
    def step(checkpointing: bool) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
        noted: dict[str, Tensor] = {}
        _, built = made(METHODS[method](), of(name, tmp_path), checkpointing=checkpointing)
        with torch.no_grad():
            for key, parameter in built.model.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(generator=torch.Generator().manual_seed(1))
        with collecting(noted):  # of both passes: what is computed again must not be noted again
            objective(built).backward()
        return gradients(built.model), torch.get_rng_state(), noted

    (plain, rng, noted), (again, rng_again, noted_again) = step(False), step(True)
    assert noted == noted_again
    assert plain.keys() == again.keys()
    assert all(torch.equal(again[key], gradient) for key, gradient in plain.items())
    assert torch.equal(rng, rng_again)


@every("gradients")
def test_every_tensor_that_trains_gets_a_gradient(tmp_path: Path, name: str, method: str) -> None:
    _, built = made(METHODS[method](), of(name, tmp_path))
    objective(built).backward()
    expected = {key for key, parameter in built.model.named_parameters() if parameter.requires_grad}
    assert gradients(built.model).keys() == expected


def on_a_rank(ranks: Ranks, folder: Path) -> None:
    own = folder / str(ranks.rank)
    own.mkdir()
    for number, (name, method) in enumerate(cases("ranks")):
        run = train(own / str(number), STILL[method](), of(name, own), ranks=ranks)
        save_for_ranks(own, f"{name}-{method}", run)
        torch.save(scalars(run["lines"][-1]), own / f"{name}-{method}-scalars.pt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights and scalars of every run on two ranks, from one pair of processes."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(on_a_rank, folder, folder, timeout_seconds=300)
    return folder


@every("ranks")
def test_two_ranks_end_where_one_does(runs: Runs, two_ranks: Path, name: str, method: str) -> None:
    alone = runs(STILL[method](), of(name, runs.folder))
    assert_two_ranks(two_ranks, f"{name}-{method}", alone)
    for rank in (0, 1):
        logged = torch.load(two_ranks / str(rank) / f"{name}-{method}-scalars.pt", weights_only=True)
        assert logged == pytest.approx(scalars(alone["lines"][-1]), rel=1e-2, abs=1e-4)


@every("held")
def test_a_strength_of_1e9_holds_protected_weights(tmp_path: Path, name: str, method: str) -> None:
    """A pull in the step undoes all but the last step. One in the loss has its minimum where it pulls to.

    That is told by gradient descent at a rate fit for the penalty (decreasing for L1, whose pull does not), from 0.01
    away. Adam divides any pull by its size, so there a coupled one only turns each step round, of whatever strength.
    """
    strong, start = regularizer(name, 1e9, tmp_path), {key: p.detach() for key, p in tiny_llama().named_parameters()}
    if name == "l2_sp: decoupled":
        rate, run = 1e-3, train(tmp_path / "run", METHODS[method](), strong)  # lr 1e-2 times the schedule's 0.1
        moved = {key: float((weight - start[key]).abs().max()) for key, weight in run["weights"].items()}
        assert 0 < max(moved.values()) < 1.2 * rate
        return
    config, built = made(STILL[method](), strong)
    assert len(built.penalties) == 1
    loss, batch = build.loss_sum_of(config), one_batch("llama")
    rate_of = (lambda step: 0.03e-9 * 0.9**step) if name == "l1_sp" else None
    state = pulled_back(built, lambda: loss(built.model, batch), 150, rate_of)
    held = {key for key, p in start.items() if p.ndim == 2} if name == "ewc" else start.keys()
    assert max(float((state[key] - start[key]).abs().max()) for key in held) < 1e-6


def test_all_of_them_act_together(tmp_path: Path) -> None:
    everything = RegularizerConfig()
    for name in REGULARIZERS:
        if name.startswith("l2_sp:"):
            continue
        one = of(name, tmp_path)
        changed = {key: value for key, value in vars(one).items() if value != getattr(RegularizerConfig(), key)}
        if "dropout" in changed:
            drops = {key: p for key, p in vars(changed["dropout"]).items() if p > 0}
            changed["dropout"] = replace(everything.dropout, **drops)
        everything = replace(everything, **changed)
    whole = train(tmp_path / "whole", FullConfig(), everything)
    train(tmp_path / "killed", FullConfig(), everything, kill_after=3)
    assert_same_weights(train(tmp_path / "killed", FullConfig(), everything, resume=True), whole)
