"""Ranks, collectives and data-parallel replicas.

Everything here also works with one process, where a collective is the identity, so the loop has one shape.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from ftlab.config import ParallelConfig
from ftlab.data.loader import Batch
from ftlab.errors import ConfigError
from ftlab.startup import settle_math

__all__ = ["LossSum", "Ranks", "Replica", "start_ranks"]


class LossSum(Protocol):
    """The objective: the loss of a batch summed over its supervised positions, an fp32 scalar."""

    def __call__(self, model: nn.Module, batch: Batch, /) -> Tensor:
        """The sum, with its graph."""


@dataclass(frozen=True)
class Ranks:
    """This process among its peers."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and logs."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum of `values` over the ranks, in place, on every rank."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def sums(self, values: Sequence[float]) -> list[float]:
        """Sums over the ranks of a few plain numbers (exact for integers below 2**53)."""
        if self.world == 1:
            return list(values)
        totals: list[float] = self.sum(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()
        return totals

    def gather(self, value: Any) -> list[Any]:
        """The picklable `value` of every rank, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def agree(self, value: Any) -> Any:
        """Rank 0's picklable `value`, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite `tensors` with rank 0's."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world > 1:
            dist.barrier()


def _pick_device(wanted: str, local_rank: int) -> torch.device:
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("parallel.device=cuda, but torch sees no GPU here; use parallel.device=cpu or auto")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} are visible; "
            "lower torchrun's --nproc-per-node or use parallel.device=cpu"
        )
    return torch.device("cuda", local_rank)


_STORES: list[Store] = []
_GROUPS = itertools.count()


def _own_store(rank: int, world: int, timeout: datetime.timedelta) -> Store:
    """The launcher's key-value store under a name of this group's own.

    A sweep joins and leaves a group once a run; under one name the second would find the addresses of the first and
    wait for them.
    """
    if not _STORES:
        _STORES.append(next(iter(rendezvous("env://", rank, world, timeout=timeout)))[0])
    return PrefixStore(f"ftlab-{next(_GROUPS)}", _STORES[0])


@contextlib.contextmanager
def start_ranks(config: ParallelConfig) -> Iterator[Ranks]:
    """Join the process group that torchrun describes in the environment, if any, and leave it at the end."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", str(world)))
    device = _pick_device(config.device, local_rank)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(config.threads or max(1, cores // local_world))
    settle_math()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world == 1:
        yield Ranks(0, 1, device)
        return
    timeout = datetime.timedelta(seconds=config.timeout_seconds)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=_own_store(rank, world, timeout),
        rank=rank,
        world_size=world,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield Ranks(rank, world, device)
    finally:
        dist.destroy_process_group()


class _Objective(nn.Module):
    """Gives DistributedDataParallel a forward to hook: batch in, summed loss out."""

    def __init__(self, model: nn.Module, loss_sum: LossSum) -> None:
        super().__init__()
        self.model = model
        self._loss_sum = loss_sum

    def forward(self, batch: Batch) -> Tensor:
        """Summed loss of one batch."""
        return self._loss_sum(self.model, batch)


class Replica:
    """A model, its objective, and the gradient averaging over ranks around them.

    Calling it gives the summed loss of a batch. Gradients are averaged over ranks during the backward of a call made
    under ``sync(True)``, and only accumulated locally under ``sync(False)``.
    """

    def __init__(self, model: nn.Module, loss_sum: LossSum, ranks: Ranks) -> None:
        self.model = model
        self.ranks = ranks
        self._plain = _Objective(model, loss_sum)
        self._objective: nn.Module = self._plain
        self.wrap()

    def wrap(self) -> None:
        """Average the gradients of what trains now; to be called again, on every rank, when that changes."""
        if self.ranks.world > 1:
            # Buffers hold frozen weights: they are made equal once, at the start, and never change.
            self._objective = DistributedDataParallel(self._plain, broadcast_buffers=False)

    def __call__(self, batch: Batch) -> Tensor:
        """Summed loss of one batch, with its graph."""
        loss: Tensor = self._objective(batch)
        return loss

    def sync(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """The context of one micro-batch; gradients travel only in the `last` one."""
        if last or not isinstance(self._objective, DistributedDataParallel):
            return contextlib.nullcontext()
        context: contextlib.AbstractContextManager[None] = self._objective.no_sync()
        return context
