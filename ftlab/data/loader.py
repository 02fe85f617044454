"""Examples to batches: order, rows, micro-batches, and their shares for each rank.

Shapes: B rows, T positions of a row (or of all rows laid end to end).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftlab.config import DataConfig
from ftlab.data.packing import pack
from ftlab.data.tokenization import Example
from ftlab.errors import ConfigError, FtlabError
from ftlab.models.attention import Documents

__all__ = ["IGNORE", "Batch", "Replay", "RowLoader", "collate_rows", "eval_batches", "permutation", "split_rows"]

_REPLAYED = 1  # the stream of random numbers that draws what is replayed
LEAST_PREFIX = 4  # shorter ones are not worth a document of their own
IGNORE = -100  # label of a position that predicts nothing


@dataclass(frozen=True)
class Batch:
    """What goes through the model at once.

    input_ids: int64 [B, T].
    labels: int64 [B, T]; labels[b, t] is the token to predict at t, that is the one after it in the same document, or
        -100 if that one is not learnt or does not exist.
    position_ids: int64 [B, T]; from 0 in each document, or on from the shared prefix.
    documents: where each lies in the flattened batch; padding is a document of its own at the end of a row.
    example_ids: the examples in order.
    num_tokens: tokens of the examples, without padding; a shared prefix counts once for each.
    num_supervised: labels that are not -100.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    documents: Documents
    example_ids: tuple[str, ...]
    num_tokens: int
    num_supervised: int

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        values: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        movable: dict[str, Any] = {
            name: value for name, value in values.items() if isinstance(value, Tensor | Documents)
        }
        return replace(self, **{name: value.to(device) for name, value in movable.items()})

    def unsupervised(self) -> Batch:
        """The same tokens with nothing supervised: a loss of exactly zero that reaches every parameter."""
        return replace(self, labels=torch.full_like(self.labels, IGNORE), num_supervised=0, num_tokens=0)


def collate_rows(
    rows: Sequence[Sequence[Example]],
    pad_id: int,
    row_length: int | None = None,
    multiple: int = 1,
    prefix: int = 0,
) -> Batch:
    """Lay rows out: as [B, row_length] with a padding document in each short row, or end to end as [1, N].

    N is filled up to a multiple of `multiple` by one padding document at the end. Matrix kernels are prepared per
    shape (on a CPU compiled, which takes longer than the product and is kept in memory), so few shapes are better.

    prefix: so many tokens that all examples begin with, and that none learns (`common_prefix`), stand once at the front
    of [1, N]; what follows them in each example is a document that goes on from there.
    """
    if not rows or not all(rows):
        raise ValueError("a batch needs at least one row, and a row at least one example")
    if prefix and row_length is not None:
        raise ValueError("rows of a fixed length have no place for a shared prefix")
    ids: list[int] = []
    labels: list[int] = []
    lengths: list[int] = []
    examples = [example for row in rows for example in row]
    if prefix:
        ids += examples[0].token_ids[:prefix]
        labels += [IGNORE] * prefix
        lengths.append(prefix)
    for row in rows:
        for example in row:
            ids += example.token_ids[prefix:]
            targets = zip(example.token_ids[prefix + 1 :], example.supervised[prefix + 1 :], strict=True)
            labels += [id if learnt else IGNORE for id, learnt in targets]
            labels.append(IGNORE)  # nothing follows a document's last token
            lengths.append(len(example.token_ids) - prefix)
        padding = 0 if row_length is None else row_length - sum(len(example.token_ids) for example in row)
        if padding < 0:
            raise ValueError(f"a row is {-padding} tokens longer than {row_length}")
        if padding:
            ids += [pad_id] * padding
            labels += [IGNORE] * padding
            lengths.append(padding)
    if row_length is None and (padding := -len(ids) % multiple):
        ids += [pad_id] * padding
        labels += [IGNORE] * padding
        lengths.append(padding)
    height = 1 if row_length is None else len(rows)
    lengths_D = np.asarray(lengths)
    starts_D = np.cumsum(lengths_D) - lengths_D
    positions = np.arange(len(ids)) - np.repeat(starts_D, lengths_D)
    positions[prefix:] += prefix
    return Batch(
        input_ids=torch.tensor(ids, dtype=torch.int64).view(height, -1),
        labels=torch.tensor(labels, dtype=torch.int64).view(height, -1),
        position_ids=torch.from_numpy(positions.astype(np.int64)).view(height, -1),
        documents=Documents.from_lengths(lengths, shared_prefix=prefix > 0),
        example_ids=tuple(example.id for example in examples),
        num_tokens=sum(len(example.token_ids) for example in examples),
        num_supervised=sum(label != IGNORE for label in labels),
    )


def common_prefix(examples: Sequence[Example]) -> int:
    """How many tokens all examples begin with; 0 if that is too few to share or there is one example.

    A position is shared only if it predicts nothing that is learnt, and each example keeps a token of its own.
    """
    if len(examples) < 2:
        return 0
    length = 0
    for column in zip(*(example.token_ids for example in examples), strict=False):
        if len(set(column)) > 1:
            break
        length += 1
    for example in examples:
        learnt = next((t for t, flag in enumerate(example.supervised) if flag and t > 0), len(example.token_ids))
        length = min(length, learnt - 1, len(example.token_ids) - 1)
    return length if length >= LEAST_PREFIX else 0


def permutation(count: int, seed: int, epoch: int, stream: int = 0) -> list[int]:
    """A random order of `count` indices, fixed by (seed, epoch) on every machine and NumPy version.

    The raw output of the PCG64 generator is sorted, because NumPy promises that stream and not that of `permutation`.
    stream: another one than 0 gives orders that have nothing to do with those.
    """
    entropy = [seed, epoch, stream] if stream else [seed, epoch]
    keys = np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(count)
    return [int(index) for index in np.argsort(np.atleast_1d(keys), kind="stable")]


@dataclass(frozen=True)
class Replay:
    """Examples of earlier tasks among the new ones (Chaudhry et al. 2019, arXiv 1902.10486).

    Each epoch has all N new examples and R of the pool, so that R / (N + R) is `share`, at least one. They are drawn
    without replacement, over epochs too: the pool is shuffled, and once all of it was used it is shuffled anew.
    """

    pool: Sequence[Example]
    share: float

    def count(self, new: int) -> int:
        """How many are replayed in an epoch of so many new examples."""
        return max(1, round(self.share * new / (1 - self.share)))

    def drawn(self, new: int, seed: int, epoch: int) -> list[int]:
        """Indices into the pool, of one epoch; a pure function of the arguments."""
        count, size = self.count(new), len(self.pool)
        first = epoch * count
        rounds = range(first // size, (first + count - 1) // size + 1)
        shuffled = [index for number in rounds for index in permutation(size, seed, number, _REPLAYED)]
        skip = first - rounds.start * size
        return shuffled[skip : skip + count]


class RowLoader:
    """The training rows of every epoch, as a pure function of (examples, configuration, seed, epoch).

    A row is a list of example indices laid end to end: packed up to `row_length`, or one example without packing. It
    holds no cursor: (epoch, index) is all that a restart needs. With `replay` its pool stands behind the examples.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        data_config: DataConfig,
        seed: int,
        pad_id: int,
        replay: Replay | None = None,
    ) -> None:
        if not examples:
            raise FtlabError(f"data {data_config.name}: there is no training example")
        self.new = len(examples)
        self.replay = replay
        self.examples = [*examples, *(() if replay is None else replay.pool)]
        self.config = data_config
        self.seed = seed
        self.pad_id = pad_id
        self.lengths = [len(example.token_ids) for example in self.examples]
        longest = max(range(len(self.lengths)), key=self.lengths.__getitem__)
        if (data_config.packing or data_config.pad_rows) and self.lengths[longest] > data_config.row_length:
            raise ConfigError(
                f"data.row_length={data_config.row_length} is shorter than {self.examples[longest].id} "
                f"({self.lengths[longest]} tokens): raise it, or lower data.max_length"
            )
        self.rows = functools.lru_cache(maxsize=2)(self._rows)

    def _rows(self, epoch: int) -> list[list[int]]:
        """The rows of an epoch, in order."""
        chosen = self._chosen(epoch)
        order = [chosen[i] for i in permutation(len(chosen), self.seed, epoch)] if self.config.shuffle else chosen
        if not self.config.packing:
            return [[index] for index in order]
        return pack(self.lengths, order, self.config.row_length)

    def _chosen(self, epoch: int) -> list[int]:
        """The examples of an epoch before any shuffle: all new ones, and spread evenly among them the replayed ones."""
        new = list(range(self.new))
        if self.replay is None:
            return new
        old = [self.new + index for index in self.replay.drawn(self.new, self.seed, epoch)]
        placed = [((place + 0.5) / len(side), index) for side in (new, old) for place, index in enumerate(side)]
        return [index for _, index in sorted(placed)]

    def steps_in_epoch(self, epoch: int) -> int:
        """Optimizer steps; the last one may have fewer rows."""
        return -(-len(self.rows(epoch)) // self.config.batch_size)

    def total_steps(self, epochs: float) -> int:
        """Optimizer steps of a number of epochs that need not be whole."""
        whole = math.floor(epochs + 1e-9)
        part = max(0.0, epochs - whole)
        steps = sum(self.steps_in_epoch(epoch) for epoch in range(whole))
        if part > 1e-9:
            steps += math.ceil(part * self.steps_in_epoch(whole) - 1e-9)
        return steps

    def global_batch(self, epoch: int, index: int) -> list[list[int]]:
        """The rows of one optimizer step, over all ranks."""
        if not 0 <= index < self.steps_in_epoch(epoch):
            raise IndexError(f"epoch {epoch} has {self.steps_in_epoch(epoch)} steps, there is no step {index}")
        start = index * self.config.batch_size
        return self.rows(epoch)[start : start + self.config.batch_size]

    def collate(self, rows: Sequence[Sequence[int]], most_shared: int | None = None) -> Batch:
        """A micro-batch of rows: [len(rows), row_length] with pad_rows, else [1, N] (see `collate_rows`).

        most_shared: the longest prefix that may be shared; as long as these rows' own if None.
        """
        chosen = [[self.examples[index] for index in row] for row in rows]
        config = self.config
        if config.pad_rows:
            return collate_rows(chosen, self.pad_id, config.row_length)
        prefix = common_prefix([example for row in chosen for example in row]) if config.share_prefix else 0
        prefix = prefix if most_shared is None else min(prefix, most_shared)
        return collate_rows(chosen, self.pad_id, None, config.pad_to_multiple, prefix)

    def largest_batch(self) -> Batch:
        """A micro-batch as large as any can be: the fullest rows, of the longest examples.

        Without packing it is exact. With packing the longest examples are packed first, which fills rows best. Of a
        prefix only what all examples begin with is shared: that much is in any micro-batch, these may have more.
        """
        by_length = sorted(range(len(self.lengths)), key=lambda index: (-self.lengths[index], index))
        if self.config.packing:
            rows = pack(self.lengths, by_length, self.config.row_length)
        else:
            rows = [[index] for index in by_length]
        rows.sort(key=lambda row: -sum(self.lengths[index] for index in row))  # stable
        most_shared = common_prefix(self.examples) if self.config.share_prefix else None
        return self.collate(rows[: min(self.config.micro_batch_size, self.config.batch_size)], most_shared)


def split_rows(rows: Sequence[list[int]], rank: int, world: int, micro: int) -> list[list[list[int]]]:
    """The micro-batches of one rank.

    The rows are cut into `world` contiguous parts whose sizes differ by at most one (a part may be empty), and each
    part into micro-batches of `micro` rows, the last one perhaps shorter.
    """
    if not 0 <= rank < world or micro < 1:
        raise ValueError(f"rank {rank} of {world} with micro-batches of {micro} rows")
    begin, end = len(rows) * rank // world, len(rows) * (rank + 1) // world
    return [list(rows[start : min(start + micro, end)]) for start in range(begin, end, micro)]


def eval_batches(
    examples: Sequence[Example], batch_size: int, rank: int = 0, world: int = 1, *, pad_id: int, multiple: int = 1
) -> Iterator[Batch]:
    """Batches of one rank, as `collate_rows` makes them. Over all ranks every example comes exactly once.

    Rank r takes examples r, r + world, ...; a rank may get none.
    """
    mine = list(examples[rank::world])
    for start in range(0, len(mine), batch_size):
        yield collate_rows([[example] for example in mine[start : start + batch_size]], pad_id, multiple=multiple)
