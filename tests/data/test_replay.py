"""Replay: how many, which ones, in which order, on how many ranks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from ftlab.data.loader import Replay, RowLoader, permutation, split_rows
from tests.helpers.training import data_config, ragged_examples

NEW, POOL = ragged_examples(12), ragged_examples(7, seed=5)


def loader(share: float = 0.25, seed: int = 0, **changes: Any) -> RowLoader:
    return RowLoader(NEW, data_config(packing=True, **changes), seed, 1, Replay(POOL, share))


def replayed(of: RowLoader, epoch: int) -> list[int]:
    """Indices into the pool of an epoch, sorted."""
    return sorted(index - len(NEW) for row in of.rows(epoch) for index in row if index >= len(NEW))


@pytest.mark.parametrize(("share", "count"), [(0.25, 4), (0.5, 12), (0.9, 108), (0.001, 1)])
def test_an_epoch_has_every_new_example_once_and_the_share_of_old_ones(share: float, count: int) -> None:
    rows = loader(share)
    for epoch in range(3):
        new = sorted(index for row in rows.rows(epoch) for index in row if index < len(NEW))
        assert new == list(range(len(NEW)))
        assert len(replayed(rows, epoch)) == rows.replay.count(rows.new) == count  # type: ignore[union-attr]
    if share >= 0.25:
        assert count / (count + len(NEW)) == pytest.approx(share)


def test_the_pool_is_used_up_before_any_of_it_comes_again() -> None:
    rows = loader()
    stream = Counter[int]()
    for epoch in range(7):  # 28 draws: the pool of 7 four times
        stream.update(rows.replay.drawn(len(NEW), 0, epoch))  # type: ignore[union-attr]
        assert max(stream.values()) - min(stream[index] for index in range(7)) <= 1
    assert set(stream.values()) == {4}
    once = Replay(POOL, 0.8).drawn(4, seed=0, epoch=0)  # 16 of 7: twice all of them, and two more
    assert sorted(once[:7]) == sorted(once[7:14]) == list(range(7))


def test_what_is_drawn_is_fixed_by_seed_and_epoch() -> None:
    assert loader().rows(3) == loader().rows(3)
    assert [replayed(loader(), epoch) for epoch in (0, 1)] == [[3, 4, 5, 6], [0, 1, 2, 2]]  # pinned, as the order is
    assert replayed(loader(seed=1), 0) != replayed(loader(), 0)
    fresh = loader()
    assert fresh.rows(5) == loader().rows(5), "no epoch before is needed"
    assert permutation(50, 0, 0, 1) != permutation(50, 0, 0)


def test_without_a_shuffle_they_are_spread_evenly() -> None:
    unpacked = RowLoader(NEW, data_config(shuffle=False), 0, 1, Replay(POOL, 0.25))
    places = [place for place, (index,) in enumerate(unpacked.rows(0)) if index >= len(NEW)]
    assert places == [2, 6, 10, 14]
    assert [index for (index,) in unpacked.rows(0) if index < len(NEW)] == list(range(len(NEW)))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_out_the_same_rows(world: int) -> None:
    rows = loader(batch_size=4)
    for index in range(rows.steps_in_epoch(0)):
        whole = rows.global_batch(0, index)
        parts = [row for rank in range(world) for micro in split_rows(whole, rank, world, 2) for row in micro]
        assert parts == whole


def test_the_largest_batch_may_be_one_of_old_examples() -> None:
    short = [example for example in NEW if len(example.token_ids) < 20]
    rows = RowLoader(short, data_config(micro_batch_size=1), 0, 1, Replay(POOL, 0.5))
    assert rows.largest_batch().num_tokens == max(len(example.token_ids) for example in POOL) == 27
