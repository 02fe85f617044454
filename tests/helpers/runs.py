"""A tiny run of any method with any regularizer, killed and resumed if asked, on one rank or several.

`model` is "llama", which learns ragged examples, or "bert", a classifier of short texts with a new head; the head of
"bert: read" counts as read.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ftlab import build
from ftlab.config import (
    AdamWConfig,
    CheckpointConfig,
    Config,
    LabelledDataConfig,
    MethodConfig,
    PrecisionConfig,
    RegularizerConfig,
    TrainingConfig,
)
from ftlab.data.labelled import LabelledLoader
from ftlab.data.loader import Batch, Replay, RowLoader
from ftlab.methods import make_method
from ftlab.methods.lora import lora_leaves
from ftlab.models.heads import BertClassifier
from ftlab.models.llama import LlamaForCausalLM
from ftlab.operators import select
from ftlab.optim.adamw import build_optimizer
from ftlab.training.averaging import Averaging
from ftlab.training.checkpoint import Checkpoints
from ftlab.training.loop import Fit, Limits, StepResult, fit
from ftlab.training.parallel import Ranks, Replica
from ftlab.training.precision import Precision
from ftlab.training.signals import StopSignal
from ftlab.training.state import TrainState
from tests.helpers.classifiers import LABELS, batch_of, texts, tiny_bert_classifier
from tests.helpers.training import SilentProgress, SilentTracker, collate, data_config, ragged_examples, tiny_llama

STEPS = 6


class Killed(Exception):  # noqa: N818 - stands for a signal, not for a mistake
    pass


def base_model(model: str) -> LlamaForCausalLM | BertClassifier:
    if model == "llama":
        return tiny_llama()
    classifier = tiny_bert_classifier()
    classifier.new_head = model == "bert"
    return classifier


def one_batch(model: str) -> Batch:
    """Eight examples."""
    return collate(ragged_examples(8), 8)[0] if model == "llama" else batch_of(texts(count=8))


def made(
    method: MethodConfig, regularizer: RegularizerConfig | None, *, model: str = "llama", checkpointing: bool = False
) -> tuple[Config, build.Built]:
    """What a run is made of; without a regularizer, what it is made of where there are none at all."""
    plain = {"packing": False, "batch_size": 4, "micro_batch_size": 2}
    config = Config(
        method=method,
        data=data_config(packing=True) if model == "llama" else LabelledDataConfig(train="texts", **plain),
        regularizer=regularizer or RegularizerConfig(),
        optimizer=AdamWConfig(lr=1e-2),
        training=TrainingConfig(max_steps=STEPS, activation_checkpointing=checkpointing),
    )
    precision = Precision(PrecisionConfig(), torch.device("cpu"))
    base, how = base_model(model), make_method(config.method, seed=0)
    if regularizer is not None:
        return config, build.build_training(config, base, how, precision)
    table = how.apply(base)
    base.use(select(config.kernels, precision.device)[0])
    optimizer = build_optimizer(config.optimizer, base, table)
    return config, build.Built(base, how, [], precision, [], optimizer, None, build.loss_sum_of(config), None, "")


def loader_of(config: Config) -> RowLoader:
    if isinstance(config.data, LabelledDataConfig):
        return LabelledLoader(texts(count=16), config.data, 0, 0, LABELS)
    share = config.regularizer.replay.share
    replay = Replay(ragged_examples(9, seed=8), share) if share > 0 else None
    return RowLoader(ragged_examples(16), config.data, seed=0, pad_id=1, replay=replay)


def train(
    folder: Path,
    method: MethodConfig,
    regularizer: RegularizerConfig | None,
    *,
    model: str = "llama",
    kill_after: int = 0,
    resume: bool = False,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """A run of `STEPS` steps: what it was made of, its losses, weights, log lines and the random state it ends with."""
    ranks = ranks or Ranks()
    config, built = made(method, regularizer, model=model)
    trace: dict[str, Any] = {"built": built, "losses": {}, "grad_norms": {}}

    def on_step(step: int, result: StepResult, ids: tuple[str, ...]) -> None:
        trace["losses"][step] = (result.nats, result.penalties)
        trace["grad_norms"][step] = result.grad_norm
        if step + 1 == kill_after:
            raise Killed

    torch.manual_seed(3)
    built.model.train()
    progress: Any = SilentProgress()
    tracker: Any = SilentTracker()
    state = TrainState(built.model, built.optimizer, built.precision, "hash")
    run = Fit(
        replica=Replica(built.model, built.objective, ranks),
        loader=loader_of(config),
        schedule=lambda step: 0.1,
        penalties=built.penalties,
        limits=Limits(STEPS, frozenset({2, STEPS}), 1, 5, 1.0),
        checkpoint=CheckpointConfig(every_steps=1, every_minutes=None),
        checkpoints=Checkpoints(folder, 2, progress.message, main=ranks.is_main),
        tracker=tracker,
        progress=progress,
        stop=StopSignal(),
        validate=lambda step: {"loss": 1.0 / step},
        micro_batch_size=config.data.micro_batch_size,
        on_step=on_step,
        climb=built.climb,
        hooks=build.build_hooks(config, built, STEPS),
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


class Runs:
    """Whole runs that several tests look at, each made once. Whoever changes the model of one takes a copy."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: dict[str, dict[str, Any]] = {}

    def __call__(
        self, method: MethodConfig, regularizer: RegularizerConfig | None, model: str = "llama"
    ) -> dict[str, Any]:
        key = repr((method, regularizer, model))
        if key not in self._made:
            folder = self.folder / str(len(self._made))
            self._made[key] = train(folder, method, regularizer, model=model)
        return self._made[key]


def curvature(model: nn.Module) -> float:
    """A bound of that of 1e9 ||W - W0||^2: 2e9 for a weight, times s^2 (||A A^T|| + ||B^T B||) for A and B."""
    factors = [(leaf.scale, (leaf.lora_A.detach(), leaf.lora_B.detach())) for leaf in lora_leaves(model).values()]
    norms = [s**2 * sum(float(torch.linalg.matrix_norm(x, 2)) ** 2 for x in pair) for s, pair in factors]
    return 2e9 * max([1.0, *norms])


def pulled_back(
    built: build.Built, data_loss: Callable[[], Tensor], steps: int, rate: Callable[[int], float] | None = None
) -> dict[str, Tensor]:
    """The merged weights after gradient descent from about 0.01 away, at a rate fit for penalties of strength 1e9."""
    model, generator = built.model.eval(), torch.Generator().manual_seed(2)
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for key, parameter in trained.items():
            if not key.endswith("lora_A"):  # B = 0 is where the pretrained weights are
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    optimizer = torch.optim.SGD(trained.values(), lr=1 / curvature(model))
    for step in range(steps):
        if rate is not None:
            optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.zero_grad()
        sum((penalty.value(model) for penalty in built.penalties), data_loss()).backward()
        optimizer.step()
    built.method.merge(model)
    return built.method.merged(model).state_dict()


def assert_same_weights(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert all(torch.equal(ours["weights"][key], tensor) for key, tensor in theirs["weights"].items())
    assert torch.equal(ours["rng"], theirs["rng"])


def save_for_ranks(folder: Path, name: str, run: dict[str, Any]) -> None:
    """What `assert_two_ranks` reads, of one rank's run."""
    torch.save({"weights": run["weights"], "grad_norms": run["grad_norms"]}, folder / f"{name}.pt")


def assert_two_ranks(folder: Path, name: str, alone: dict[str, Any]) -> None:
    """What ranks saved in `folder`/RANK/`name`.pt is what one rank has, up to rounding.

    The gradient's norm too: AdamW moves weights the same whatever factor a gradient is wrong by.
    """
    for rank in (0, 1):
        found = torch.load(folder / str(rank) / f"{name}.pt", weights_only=True)
        assert found["grad_norms"] == pytest.approx(alone["grad_norms"], rel=2e-3)
        assert found["weights"].keys() == alone["weights"].keys()
        for key, weight in alone["weights"].items():
            torch.testing.assert_close(found["weights"][key], weight, rtol=1e-3, atol=1e-4, msg=key)
