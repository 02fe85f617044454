"""TrainState: everything that must survive a restart, in one object.

The order in which weights are settled at start: pretrained (or random) weights, then the method's own initialisation,
then the checkpoint of an interrupted run, which overrides both.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from ftlab.errors import FtlabError
from ftlab.training.precision import Precision

__all__ = ["Counters", "TrainState", "capture_rng", "changed_inputs", "restore_rng", "seed_rng"]


# What the penalties remember is made of; those of `regularizer.extra` know it themselves.
_HELD_TO = {
    "l2_sp": "the weights that training begins with",
    "l1_sp": "the weights that training begins with",
    "ewc": "fisher.safetensors in a run of regularizer.ewc.source",
}


@dataclass
class Counters:
    """The plain numbers of a run. Nothing here is a float that depends on the clock."""

    step: int = 0  # batches consumed
    skipped: int = 0  # of those, without an update because a gradient was not finite
    bad_in_a_row: int = 0
    epoch: int = 0  # the cursor: the next batch is number `index` of epoch `epoch`
    index: int = 0
    tokens: int = 0
    supervised: int = 0
    window_nats: float = 0.0  # summed since the last logged line
    window_supervised: int = 0
    window_noted: dict[str, float] = field(default_factory=dict)
    validated_step: int = -1
    best_step: int = -1
    best_value: float | None = None
    worse_in_a_row: int = 0
    stage: int = 0  # of a method that lets more and more train
    stalled: int = 0  # validations in a row without a better one, since that stage began
    data_digest: str = ""  # a hash chained over the ids of all examples consumed, in order

    @property
    def updates(self) -> int:
        """Optimizer steps taken: where the schedule stands."""
        return self.step - self.skipped

    def consume(self, example_ids: Iterable[str]) -> None:
        """Chain the ids of one global batch into the digest."""
        digest = hashlib.sha256(self.data_digest.encode())
        for example_id in example_ids:
            digest.update(example_id.encode() + b"\0")
        self.data_digest = digest.hexdigest()[:16]


def capture_rng() -> dict[str, Any]:
    """The state of every generator of this process, in types that ``torch.load(weights_only=True)`` reads."""
    version, internal, gauss = random.getstate()
    name, keys, pos, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), int(pos), int(has_gauss), cached],
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
    }


def seed_rng(*parts: object) -> None:
    """Seed every generator of this process from a hash of `parts`, the same on every machine."""
    seed = int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def changed_inputs(then: dict[str, str], now: dict[str, str]) -> list[str]:
    """Names of the inputs (model, data, ...) whose content is another one."""
    return sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))


def restore_rng(state: dict[str, Any]) -> None:
    """Put every generator of this process back to a captured state."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, pos, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), pos, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0].cpu())


@dataclass
class TrainState:
    """Model, optimizer, scaler, counters, generators, what hooks remember, and the identity of the penalties' anchors.

    What trains is settled when this is made: parameters whose turn comes later belong to it too.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    precision: Precision
    config_hash: str
    inputs: dict[str, str] = field(default_factory=dict)  # what the run reads, by name: hashes of contents
    penalty_fingerprints: dict[str, str] = field(default_factory=dict)
    counters: Counters = field(default_factory=Counters)
    memory: dict[str, Any] = field(default_factory=dict)  # plain containers of tensors, numbers and strings, by hook

    def __post_init__(self) -> None:
        self._trained = frozenset(name for name, p in self.model.named_parameters() if p.requires_grad)

    def trainable(self) -> dict[str, torch.Tensor]:
        """The tensors that train, now or later, by name, detached and sharing memory with the model."""
        return {name: p.detach() for name, p in self.model.named_parameters() if name in self._trained}

    def state_dict(self, rng_by_rank: list[dict[str, Any]]) -> dict[str, Any]:
        """All of it as plain containers of tensors, numbers and strings."""
        return {
            "format": 1,
            "config_hash": self.config_hash,
            "world": len(rng_by_rank),
            "counters": asdict(self.counters),
            "memory": self.memory,
            "weights": self.trainable(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            "precision": self.precision.dtypes,
            "rng": rng_by_rank,
            "inputs": self.inputs,
            "penalties": self.penalty_fingerprints,
        }

    def load_state_dict(self, saved: dict[str, Any], rank: int, world: int) -> list[str]:
        """Take over a saved state. Returns lines worth telling the user.

        Raises:
            FtlabError: the state belongs to another configuration, or its tensors do not fit.
        """
        if saved["config_hash"] != self.config_hash:
            raise FtlabError(
                f"the checkpoint was made by another configuration ({saved['config_hash']}, this one is "
                f"{self.config_hash}); give the same settings, or start anew with resume=never"
            )
        if changed := changed_inputs(saved["inputs"], self.inputs):
            raise FtlabError(
                f"the {' and the '.join(changed)} changed since the checkpoint was made; restore what it was, or start "
                "anew with resume=never"
            )
        for name in changed_inputs(saved["penalties"], self.penalty_fingerprints):
            then, now = saved["penalties"].get(name), self.penalty_fingerprints.get(name)
            raise FtlabError(
                f"the penalty {name} holds to something else than in the interrupted run ({then} then, {now} now): "
                f"{_HELD_TO.get(name, 'what it is made of')} changed; restore what it was, or start anew with "
                "resume=never"
            )
        self.load_weights(saved["weights"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"]:
            self.precision.scaler.load_state_dict(saved["scaler"])
        self.counters = Counters(**saved["counters"])
        self.memory = saved["memory"]
        told = []
        if (before := saved.get("precision", self.precision.dtypes)) != self.precision.dtypes:
            told.append(
                f"so far products and frozen weights were {' and '.join(before)}, from here on they are "
                f"{' and '.join(self.precision.dtypes)}: another processor, or FTLAB_BF16"
            )
        if world == saved["world"]:
            restore_rng(saved["rng"][rank])
            return told
        seed_rng(self.counters.step, rank, world, self.counters.data_digest)
        return [
            *told,
            f"resumed with {world} rank(s) a run that had {saved['world']}: the data go on in the same order, but "
            "dropout masks cannot be the same",
        ]

    def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Copy saved trainable tensors into the model; names and shapes must match exactly."""
        own = self.trainable()
        missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
        misshapen = sorted(n for n in own.keys() & weights.keys() if own[n].shape != weights[n].shape)
        if missing or unexpected or misshapen:
            raise FtlabError(
                f"the saved weights do not fit the model: missing {missing[:3]}, unexpected {unexpected[:3]}, "
                f"of another shape {misshapen[:3]} (first three of each); start anew with resume=never"
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(weights[name])
