"""A training setting small enough to run in milliseconds: two layers, ragged examples, every rank in one call."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from ftlab.config import AdamWConfig, CheckpointConfig, DataConfig, LoRAConfig, PrecisionConfig
from ftlab.data.loader import Batch, RowLoader
from ftlab.data.tokenization import Example
from ftlab.losses.cross_entropy import supervised_cross_entropy
from ftlab.methods import make_method
from ftlab.models.llama import LlamaConfig, LlamaForCausalLM
from ftlab.models.loading import random_llama
from ftlab.optim.adamw import build_optimizer
from ftlab.training.checkpoint import Checkpoints
from ftlab.training.loop import Fit, Limits, train_step
from ftlab.training.parallel import Ranks, Replica
from ftlab.training.precision import Precision
from ftlab.training.signals import StopSignal
from ftlab.training.state import TrainState

VOCAB = 61


def tiny_llama(seed: int = 0, *, blocks: int = 2) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    return random_llama(config, seed=seed)


def ragged_examples(count: int = 8, seed: int = 0) -> list[Example]:
    """Examples of 3 to 30 tokens; the second one has a single supervised token, the others about half of theirs."""
    numbers = random.Random(seed)
    examples = []
    for index in range(count):
        length = numbers.randint(3, 30)
        first = length - 1 if index == 1 else numbers.randint(1, length - 1)
        ids = [numbers.randrange(2, VOCAB) for _ in range(length)]
        examples.append(Example(f"example-{index}", ids, [i >= first for i in range(length)]))
    return examples


def data_config(**changes: Any) -> DataConfig:
    settings: dict[str, Any] = {"packing": False, "batch_size": 4, "micro_batch_size": 2, "row_length": 64}
    return DataConfig(**{**settings, **changes})


def collate(examples: list[Example], micro: int) -> list[Batch]:
    """Micro-batches of `micro` examples each, in order."""
    loader = RowLoader(examples, data_config(), seed=0, pad_id=1)
    rows = [[index] for index in range(len(examples))]
    return [loader.collate(rows[start : start + micro]) for start in range(0, len(rows), micro)]


loss_sum = functools.partial(supervised_cross_entropy, chunk=16)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class KeepGradients(torch.optim.SGD):
    """An optimizer that moves nothing and remembers the gradients it was handed."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__([p for p in model.parameters() if p.requires_grad], lr=0.0)
        self.model = model
        self.seen: dict[str, torch.Tensor] = {}

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.seen = gradients(self.model)


class SilentTracker:
    """Collects what the loop logs."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def log(self, step: int, split: str, values: dict[str, Any]) -> None:
        self.lines.append({"step": step, "split": split, **values})

    def sync(self) -> None:
        self.lines.append({"split": "sync"})


class SilentProgress:
    """Collects messages."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def update(self, step: int, values: dict[str, Any]) -> None:
        pass

    def message(self, text: str) -> None:
        self.messages.append(text)


@dataclass
class Setting:
    """What a test may change about `lora_fit`."""

    total_steps: int = 12
    ranks: Ranks = field(default_factory=Ranks)
    dropout: float = 0.3
    examples: list[Example] = field(default_factory=lambda: ragged_examples(16))
    validate: Callable[[int], dict[str, float]] = lambda step: {"loss": 1.0 / step}
    validate_at: frozenset[int] = frozenset()
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(every_steps=3, every_minutes=None))
    on_step: Callable[..., None] | None = None
    max_bad_steps: int = 5
    data: DataConfig = field(default_factory=lambda: data_config(packing=True))


def lora_fit(folder: Path, **changes: Any) -> tuple[TrainState, Fit]:
    """A LoRA run with dropout, shuffling and packing on the tiny model; `changes` are fields of `Setting`."""
    setting = Setting(**changes)
    ranks, data = setting.ranks, setting.data
    model = tiny_llama()
    method = make_method(LoRAConfig(rank=4, alpha=8.0, dropout=setting.dropout), seed=0)
    table = method.apply(model)
    precision = Precision(PrecisionConfig(), ranks.device)
    precision.store(model)
    optimizer = build_optimizer(AdamWConfig(lr=1e-2, weight_decay=0.1), model, table)
    torch.manual_seed(ranks.rank)
    model.train()
    loader = RowLoader(setting.examples, data, seed=0, pad_id=1)
    progress: Any = SilentProgress()
    tracker: Any = SilentTracker()
    run = Fit(
        replica=Replica(model, loss_sum, ranks),
        loader=loader,
        schedule=lambda step: 1.0 / (1 + step),
        penalties=[],
        limits=Limits(setting.total_steps, setting.validate_at, 1, setting.max_bad_steps, 1.0),
        checkpoint=setting.checkpoint,
        checkpoints=Checkpoints(folder, 2, progress.message, main=ranks.is_main),
        tracker=tracker,
        progress=progress,
        stop=StopSignal(),
        validate=setting.validate if setting.validate_at else None,
        micro_batch_size=data.micro_batch_size,
        on_step=setting.on_step,
    )
    return TrainState(model, optimizer, precision, "hash"), run


def _rank_main(
    rank: int, world: int, port_file: str, seconds: float, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    import datetime

    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{port_file}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=seconds),
    )
    try:
        function(Ranks(rank, world, torch.device("cpu")), *arguments)
    finally:
        dist.destroy_process_group()


def run_ranks(
    function: Callable[..., Any], folder: Path, *arguments: Any, world: int = 2, timeout_seconds: float = 60
) -> None:
    """Call ``function(ranks, *arguments)`` in `world` processes; an exception in one is raised here.

    A collective that waits longer than `timeout_seconds` fails.
    """
    place = str(folder / "rendezvous")
    mp.spawn(_rank_main, (world, place, timeout_seconds, function, arguments), nprocs=world, join=True)


def gradients_of_a_step(
    model: torch.nn.Module, objective: Callable[..., torch.Tensor], ranks: Ranks, batches: list[Any]
) -> dict[str, torch.Tensor]:
    """What the optimizer is given by a step in fp32 over this rank's micro-batches, by parameter."""
    optimizer = KeepGradients(model)
    precision = Precision(PrecisionConfig(), torch.device("cpu"))
    train_step(Replica(model, objective, ranks), optimizer, batches, precision=precision)
    return optimizer.seen


def compare_with_one_rank(ranks: Ranks, step: Callable[[Ranks], dict[str, torch.Tensor]]) -> None:
    """For `run_ranks`: assert that a step on these ranks has the gradients of one rank."""
    seen, alone = step(ranks), step(Ranks())
    for name, gradient in alone.items():
        torch.testing.assert_close(seen[name], gradient, rtol=1e-4, atol=1e-5)
