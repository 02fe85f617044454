from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlab.config import DataConfig
from ftlab.data.loader import IGNORE, Batch, RowLoader, eval_batches, permutation, split_rows
from ftlab.data.tokenization import Example
from ftlab.errors import ConfigError, FtlabError

PAD = 9


def examples(lengths: list[int]) -> list[Example]:
    """Example k holds 100 k + position; the second half is learnt."""
    return [
        Example(f"e{k}", [100 * k + i for i in range(n)], [i >= n // 2 for i in range(n)])
        for k, n in enumerate(lengths)
    ]


def loader(lengths: list[int], seed: int = 0, **changes: Any) -> RowLoader:
    settings: dict[str, Any] = {"row_length": 16, "batch_size": 3, "micro_batch_size": 2, "pad_to_multiple": 1}
    return RowLoader(examples(lengths), DataConfig(**{**settings, **changes}), seed, PAD)


LENGTHS = [random.Random(1).randint(2, 12) for _ in range(25)]


def test_labels_are_shifted_and_never_cross_a_document() -> None:
    batch = loader([3, 4, 2]).collate([[0, 1], [2]])
    assert batch.input_ids.tolist() == [[0, 1, 2, 100, 101, 102, 103, 200, 201]]
    assert batch.labels.tolist() == [[1, 2, IGNORE, IGNORE, 102, 103, IGNORE, 201, IGNORE]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0, 1]]
    assert batch.documents.lengths == (3, 4, 2)
    assert batch.example_ids == ("e0", "e1", "e2")
    assert (batch.num_tokens, batch.num_supervised) == (9, 5)
    assert batch.input_ids.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64


def test_padding_is_a_document_that_nothing_supervises() -> None:
    batch = loader([3, 4, 2], pad_rows=True, row_length=8).collate([[0, 1], [2]])
    assert batch.input_ids.tolist() == [[0, 1, 2, 100, 101, 102, 103, PAD], [200, 201, *[PAD] * 6]]
    assert batch.labels.tolist() == [
        [1, 2, IGNORE, IGNORE, 102, 103, IGNORE, IGNORE],
        [201, *[IGNORE] * 7],
    ]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 0, 1, 2, 3, 4, 5]]
    assert batch.documents.lengths == (3, 4, 1, 2, 6)
    assert (batch.num_tokens, batch.num_supervised) == (9, 5)


@pytest.mark.parametrize("multiple, padding", [(1, 0), (3, 0), (8, 7), (64, 55)])
def test_a_batch_is_filled_to_a_multiple_by_one_document(multiple: int, padding: int) -> None:
    batch = loader([3, 4, 2], pad_to_multiple=multiple).collate([[0, 1], [2]])
    assert batch.input_ids.shape == (1, 9 + padding)
    assert batch.documents.lengths == (3, 4, 2, *([padding] if padding else []))
    assert batch.input_ids[0, 9:].tolist() == [PAD] * padding
    assert batch.labels[0, 9:].tolist() == [IGNORE] * padding
    assert (batch.num_tokens, batch.num_supervised) == (9, 5)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=30), st.booleans(), st.booleans(), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_an_epoch_holds_every_example_once(lengths: list[int], packing: bool, pad_rows: bool, epoch: int) -> None:
    rows = loader(lengths, packing=packing, pad_rows=pad_rows)
    seen: list[str] = []
    tokens = supervised = 0
    for index in range(rows.steps_in_epoch(epoch)):
        batch = rows.collate(rows.global_batch(epoch, index))
        seen += batch.example_ids
        tokens += batch.num_tokens
        supervised += batch.num_supervised
        check_layout(batch)
    assert sorted(seen) == sorted(example.id for example in rows.examples)
    assert tokens == sum(lengths)
    assert supervised == sum(sum(example.supervised[1:]) for example in rows.examples)
    with pytest.raises(IndexError):
        rows.global_batch(epoch, rows.steps_in_epoch(epoch))


def check_layout(batch: Batch) -> None:
    """Every label is the next token of its own document."""
    flat, labels, positions = (
        tensor.flatten().tolist() for tensor in (batch.input_ids, batch.labels, batch.position_ids)
    )
    start = 0
    for length in batch.documents.lengths:
        for place in range(start, start + length):
            assert positions[place] == place - start
            if labels[place] != IGNORE:
                assert place + 1 < start + length
                assert labels[place] == flat[place + 1]
        start += length
    assert start == batch.input_ids.numel()


def test_the_order_is_fixed_by_seed_and_epoch() -> None:
    assert permutation(8, 0, 0) == [3, 2, 1, 6, 0, 7, 4, 5]  # pinned: runs must stay comparable over versions
    assert permutation(0, 0, 0) == []
    first = loader(LENGTHS)
    assert first.rows(0) == loader(LENGTHS).rows(0)
    assert first.rows(0) != first.rows(1)
    assert first.rows(0) != loader(LENGTHS, seed=1).rows(0)
    assert loader(LENGTHS, packing=False, shuffle=False).rows(3) == [[index] for index in range(len(LENGTHS))]


def test_a_restart_needs_epoch_and_index_only() -> None:
    whole = loader(LENGTHS)
    walked = [whole.global_batch(epoch, index) for epoch in range(3) for index in range(whole.steps_in_epoch(epoch))]
    fresh = loader(LENGTHS)
    last = fresh.steps_in_epoch(2) - 1
    assert fresh.global_batch(2, last) == walked[-1]


def test_steps() -> None:
    rows = loader([4] * 10, packing=False, batch_size=3)
    assert rows.steps_in_epoch(0) == 4
    assert [len(rows.global_batch(0, index)) for index in range(4)] == [3, 3, 3, 1]
    assert [rows.total_steps(epochs) for epochs in (0.01, 0.25, 0.5, 1, 1.5, 2, 3.0)] == [1, 1, 2, 4, 6, 8, 12]
    tenth = loader([4] * 90, packing=False, batch_size=3)
    assert [tenth.total_steps(epochs) for epochs in (0.1, 0.7, 1.1)] == [3, 21, 33]  # not 4, 22, 34 by rounding error


@pytest.mark.parametrize("packing", [True, False])
def test_no_batch_is_larger_than_the_largest(packing: bool) -> None:
    rows = loader(LENGTHS, packing=packing)
    largest = rows.largest_batch()
    for epoch in range(20):
        for index in range(rows.steps_in_epoch(epoch)):
            for part in split_rows(rows.global_batch(epoch, index), 0, 1, rows.config.micro_batch_size):
                assert rows.collate(part).num_tokens <= largest.num_tokens
    assert max(largest.documents.lengths) == max(LENGTHS)


@given(st.integers(0, 30), st.integers(1, 5), st.integers(1, 7))
def test_rows_are_shared_out_evenly_and_in_order(count: int, world: int, micro: int) -> None:
    rows = [[index] for index in range(count)]
    shares = [split_rows(rows, rank, world, micro) for rank in range(world)]
    assert [row for share in shares for part in share for row in part] == rows
    sizes = [sum(map(len, share)) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert all(1 <= len(part) <= micro for share in shares for part in share)
    with pytest.raises(ValueError, match="rank"):
        split_rows(rows, world, world, micro)


@pytest.mark.parametrize("world", [1, 2, 5])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_evaluation_takes_every_example_once_over_the_ranks(batch_size: int, world: int) -> None:
    everything = examples(LENGTHS[:7])
    seen: list[str] = []
    for rank in range(world):
        for batch in eval_batches(everything, batch_size, rank, world, pad_id=PAD):
            assert len(batch.example_ids) <= batch_size
            assert batch.input_ids.numel() == batch.num_tokens
            seen += batch.example_ids
    assert sorted(seen) == [f"e{index}" for index in range(7)]
    assert list(eval_batches(everything[:1], batch_size, 1, 2, pad_id=PAD)) == []


def test_impossible_settings() -> None:
    with pytest.raises(FtlabError, match="there is no training example"):
        loader([])
    for changes in ({}, {"packing": False, "pad_rows": True}):
        with pytest.raises(ConfigError, match=r"data\.row_length=16 is shorter than e1 \(17 tokens\)"):
            loader([3, 17], **changes)
    assert loader([3, 17], packing=False).largest_batch().num_tokens == 20


def test_batches_move() -> None:
    batch = loader([3, 4]).collate([[0, 1]])
    moved = batch.to("meta")
    assert moved.input_ids.device.type == moved.labels.device.type == moved.position_ids.device.type == "meta"
    assert (moved.example_ids, moved.num_supervised) == (batch.example_ids, batch.num_supervised)
    assert batch.to("cpu").input_ids.equal(batch.input_ids)
