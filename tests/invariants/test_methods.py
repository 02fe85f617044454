"""What every method promises: a table of methods times properties.

A row for each option of conf/method, some in several forms ("full: own rates"); a column for each of PROPERTIES. A cell
is tested, or `Row.apart` says why it does not apply. A model is a decoder of text, or ("bert") a classifier with a new
head, or ("bert: read") one that goes on from a classifier. What belongs to regularizers is in test_regularizers.py.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from ftlab import build
from ftlab.config import L2SPConfig, MethodConfig, RegularizerConfig
from ftlab.errors import FtlabError
from ftlab.methods import Method, make_method
from ftlab.methods.nf4 import NF4Weight
from ftlab.methods.trainable import trainable_parameters, trainable_state_dict
from ftlab.models.heads import AnyModel, fresh_parameters, head_layers, head_parameters
from ftlab.schema import GROUPS
from ftlab.training.parallel import Ranks
from tests.helpers.models import random_ids
from tests.helpers.runs import (
    Runs,
    assert_same_weights,
    assert_two_ranks,
    base_model,
    made,
    one_batch,
    pulled_back,
    save_for_ranks,
    train,
)
from tests.helpers.training import run_ranks

CONF = Path(__file__).parents[2] / "conf" / "method"
PROPERTIES = {
    "identity": "at the start the model is the pretrained one",
    "frozen": "what trains moves, what is frozen stays bit for bit",
    "gradients": "what is declared to train gets a gradient, and nothing else does",
    "merge": "merged equals unmerged, and unmerging gives every bit back",
    "disabled": "switched off it is the pretrained model, or it says that it cannot be",
    "saved": "saved and loaded it is the same bit for bit",
    "resume": "killed and resumed, a run ends bit for bit where the one that was not ends",
    "ranks": "two ranks end where one does",
    "zero": "L2-SP of strength zero is bitwise the run without it",
    "held": "L2-SP of strength 1e9 holds the weights",
}
ELSEWHERE = "the row l2_sp of test_regularizers.py has it with this method"


def option(name: str, **changes: Any) -> MethodConfig:
    """An option of conf/method with some values changed."""
    content = yaml.safe_load((CONF / f"{name}.yaml").read_text("utf-8"))
    base, _ = content.pop("defaults")
    config: MethodConfig = replace(GROUPS["method"][base.removeprefix("base_")](**content), **changes)
    return config


@dataclass(frozen=True)
class Row:
    """A method by what is changed in its option; `apart`: why a property does not apply.

    rounded: starting and switched off it is the pretrained model up to the rounding of its frozen weights.
    """

    changes: dict[str, Any] = field(default_factory=dict)
    model: str = "llama"
    apart: dict[str, str] = field(default_factory=dict)
    rounded: bool = False


SMALL = {"rank": 4, "alpha": 8.0}
METHODS: dict[str, Row] = {
    "full": Row(apart={"zero": ELSEWHERE, "held": ELSEWHERE}),
    "full: no embeddings": Row({"train_embeddings": False}),
    "full: own rates": Row({"layer_decay": 0.8, "rates": ["q_proj:0.5"]}),
    "freeze": Row(),
    "gradual_unfreeze": Row(),
    "bitfit": Row(model="bert"),
    "bitfit: norms": Row({"train_norms": True}),
    "linear_probe": Row(model="bert", apart={"held": "a new head has no pretrained weights to be held at"}),
    "linear_probe: of a head that was read": Row(model="bert: read"),
    "lora": Row(SMALL, apart={"held": ELSEWHERE}),
    "lora: dropout": Row(
        SMALL | {"dropout": 0.2},
        apart={
            "ranks": "each rank draws masks of its own",
            "zero": ELSEWHERE,
            "held": "dropout does not reach the penalty, so it is the row lora",
        },
    ),
    "lora: rslora": Row(SMALL | {"rslora": True}),
    "lora: attention": Row({"rank": 2, "alpha": 2.0, "targets": ["[qkvo]_proj"]}),
    "lora: ranks": Row(SMALL | {"ranks": ["layers.1.*:2", "mlp.*:6"], "alphas": ["layers.1.*:4", "mlp.*:12"]}),
    "lora_bert": Row(SMALL, model="bert"),
    "lora_bert: beside a head that was read": Row(SMALL, model="bert: read"),
    "lora_plus": Row(SMALL),
    "dora": Row(SMALL),
    "qlora": Row(SMALL, rounded=True),
    "pissa": Row(SMALL, rounded=True),
}


def config_of(name: str) -> MethodConfig:
    return option(name.partition(":")[0], **METHODS[name].changes)


def cases(column: str) -> list[str]:
    """Rows that a property applies to."""
    return [name for name, row in METHODS.items() if column not in row.apart]


COLUMNS: list[str] = []  # of each test below, the one it goes through


def every(column: str) -> pytest.MarkDecorator:
    COLUMNS.append(column)
    return pytest.mark.parametrize("name", cases(column))


def test_the_rows_are_the_options_and_each_cell_is_tested_or_says_why_not() -> None:
    assert {name.partition(":")[0] for name in METHODS} == {path.stem for path in CONF.glob("*.yaml")}
    for name, row in METHODS.items():
        assert row.apart.keys() <= PROPERTIES.keys(), name
        assert all(len(why) > 10 for why in row.apart.values()), name
    assert sorted(COLUMNS) == sorted(PROPERTIES)


def applied(name: str, seed: int) -> tuple[AnyModel, Method]:
    model, method = base_model(METHODS[name].model), make_method(config_of(name), seed=seed)
    method.apply(model)
    return model, method


def whole_run(runs: Runs, name: str) -> dict[str, Any]:
    return runs(config_of(name), RegularizerConfig(), METHODS[name].model)


def trained(runs: Runs, name: str) -> tuple[AnyModel, Method]:
    """A model of one's own after a run, in evaluation mode."""
    built = whole_run(runs, name)["built"]
    return copy.deepcopy(built.model).eval(), built.method


def pretrained(name: str) -> AnyModel:
    """What the method starts from; for qlora the dequantised weights."""
    model = base_model(METHODS[name].model).eval()
    if name == "qlora":
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.data = NF4Weight(layer.weight).dequantise()
    return model


def answers(model: AnyModel) -> Tensor:
    with torch.no_grad():
        if head_layers(model):
            return model(one_batch("bert"))
        return model(random_ids(2, 12, seed=11, vocab_size=61))


def assert_pretrained(name: str, model: AnyModel) -> None:
    """`model` computes what the pretrained one computes, bit for bit where the row is not a rounded one."""
    base = pretrained(name)
    base.use(model.operators)
    base.load_state_dict(head_parameters(model), strict=False)  # of a head, which trains whole, nothing else is claimed
    ours, theirs = answers(model), answers(base)
    if METHODS[name].rounded:
        assert float((ours - theirs).norm() / theirs.norm()) < 2e-6
    else:
        assert torch.equal(ours, theirs)


@every("identity")
def test_identity_at_the_start(name: str) -> None:
    model, _ = applied(name, seed=5)
    for mode in (True, False):
        assert_pretrained(name, model.train(mode))


@every("frozen")
def test_what_trains_moves_and_what_is_frozen_stays(runs: Runs, name: str) -> None:
    _, start = made(config_of(name), RegularizerConfig(), model=METHODS[name].model)
    before = dict(start.model.named_parameters())
    model, _ = trained(runs, name)
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, before[key]) != before[key].requires_grad, key
    buffers = dict(start.model.named_buffers())
    assert all(torch.equal(buffer, buffers[key]) for key, buffer in model.named_buffers())
    assert float((answers(model) - answers(start.model.eval())).abs().max()) > 1e-3


@every("gradients")
def test_gradients_on_what_is_declared_and_nowhere_else(name: str) -> None:
    model = base_model(METHODS[name].model)
    table = make_method(config_of(name)).apply(model)
    config, _ = made(config_of(name), None, model=METHODS[name].model)
    build.loss_sum_of(config)(model, one_batch(METHODS[name].model)).backward()
    declared = table.lr_scales(model).keys()
    assert {key for key, p in model.named_parameters() if p.grad is not None} == declared
    assert declared == trainable_parameters(model).keys() == trainable_state_dict(model).keys()
    assert all(p.dtype == torch.float32 for p in trainable_parameters(model).values())


@every("merge")
def test_merged_equals_unmerged(runs: Runs, name: str) -> None:
    model, method = trained(runs, name)
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    before = answers(model)
    method.merge(model)
    merged = answers(model)
    assert float((merged - before).norm() / before.norm()) < 1e-4
    method.unmerge(model)
    assert all(torch.equal(weights[key], tensor) for key, tensor in model.state_dict().items())
    assert torch.equal(answers(model), before)
    method.merge(model)
    assert torch.equal(answers(method.merged(model)), merged)


@every("disabled")
def test_disabled_equals_the_base(runs: Runs, name: str) -> None:
    model, method = trained(runs, name)
    after = answers(model)
    if method.keeps_base:
        with method.disabled(model):
            assert_pretrained(name, model)
        assert torch.equal(answers(model), after)
    else:
        with pytest.raises(FtlabError, match="overwrites the pretrained weights"), method.disabled(model):
            pass


@every("saved")
def test_save_and_load_are_bit_equal(tmp_path: Path, runs: Runs, name: str) -> None:
    model, method = trained(runs, name)
    method.save(model, tmp_path / "saved", "file:base")
    again, other = applied(name, seed=99)
    again.use(model.operators)
    other.load(again, tmp_path / "saved")
    assert model.state_dict().keys() == again.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    assert torch.equal(answers(again.eval()), answers(model))


@every("resume")
def test_killed_and_resumed_it_ends_where_it_would_have_ended(tmp_path: Path, runs: Runs, name: str) -> None:
    whole, model = whole_run(runs, name), METHODS[name].model
    train(tmp_path, config_of(name), RegularizerConfig(), model=model, kill_after=3)
    later = train(tmp_path, config_of(name), RegularizerConfig(), model=model, resume=True)
    assert_same_weights(later, whole)
    assert later["losses"] == {step: whole["losses"][step] for step in later["losses"]}


def on_a_rank(ranks: Ranks, folder: Path) -> None:
    own = folder / str(ranks.rank)
    own.mkdir()
    for name in cases("ranks"):
        run = train(own / f"run-{name}", config_of(name), RegularizerConfig(), model=METHODS[name].model, ranks=ranks)
        save_for_ranks(own, name, run)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of every run on two ranks, from one pair of processes."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(on_a_rank, folder, folder, timeout_seconds=300)
    return folder


@every("ranks")
def test_two_ranks_end_where_one_does(runs: Runs, two_ranks: Path, name: str) -> None:
    assert_two_ranks(two_ranks, name, whole_run(runs, name))


def l2_sp(strength: float) -> RegularizerConfig:
    return RegularizerConfig(l2_sp=L2SPConfig(strength=strength))


@every("zero")
def test_l2_sp_of_strength_zero_is_bitwise_the_run_without_it(runs: Runs, name: str) -> None:
    """Without it: a run whose objective is the plain loss, and that has no penalty and no noise."""
    model = METHODS[name].model
    without, zero = runs(config_of(name), None, model), runs(config_of(name), l2_sp(0.0), model)
    assert_same_weights(zero, without)
    assert zero["losses"] == without["losses"]


@every("held")
@pytest.mark.parametrize("strength", [0.0, 1e9])
def test_l2_sp_of_strength_1e9_holds_the_weights(name: str, strength: float) -> None:
    """From about 0.01 away, gradient descent at a rate fit for the penalty ends within 1e-6 of the pretrained weights.

    Without the penalty the same steps leave the weights where they were put.
    """
    model = METHODS[name].model
    config, built = made(config_of(name), l2_sp(strength), model=model)
    assert len(built.penalties) == (strength > 0)
    loss, batch = build.loss_sum_of(config), one_batch(model)
    head = fresh_parameters(built.model).keys()  # one that was read is held
    state = pulled_back(built, lambda: loss(built.model, batch), 60)
    start = {key: tensor for key, tensor in pretrained(name).state_dict().items() if key not in head}
    distance = max(float((state[key] - start[key]).abs().max()) for key in start)
    assert distance < 1e-6 if strength else distance > 1e-3
