from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlab.data import packing
from ftlab.data.packing import pack
from ftlab.errors import FtlabError


@given(
    st.lists(st.integers(1, 40), max_size=60), st.integers(40, 90), st.randoms(use_true_random=False), st.integers(1, 5)
)
@settings(max_examples=150, deadline=None)
def test_every_index_once_in_order_and_no_row_too_long(
    lengths: list[int], row_length: int, numbers: object, open_rows: int
) -> None:
    order = list(range(len(lengths)))
    numbers.shuffle(order)  # type: ignore[attr-defined]
    place = {index: position for position, index in enumerate(order)}
    limit = packing.OPEN_ROWS
    packing.OPEN_ROWS = open_rows
    try:
        rows = pack(lengths, order, row_length)
    finally:
        packing.OPEN_ROWS = limit
    assert sorted(index for row in rows for index in row) == sorted(order)
    assert all(sum(lengths[index] for index in row) <= row_length for row in rows)
    assert all([place[index] for index in row] == sorted(place[index] for index in row) for row in rows)
    assert [place[row[0]] for row in rows] == sorted(place[row[0]] for row in rows)
    # First fit: two rows open at the same time never both stay under half full.
    if open_rows > len(rows):
        assert sum(2 * sum(lengths[index] for index in row) <= row_length for row in rows) <= 1


def test_first_fit_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pack([6, 5, 4, 3, 2, 10], [0, 1, 2, 3, 4, 5], 10) == [[0, 2], [1, 3, 4], [5]]
    assert pack([6, 5, 4], [2, 1, 0], 10) == [[2, 1], [0]]
    monkeypatch.setattr(packing, "OPEN_ROWS", 1)
    assert pack([6, 5, 4], [0, 1, 2], 10) == [[0], [1, 2]]  # the first row was closed when the second opened


def test_an_example_longer_than_a_row() -> None:
    with pytest.raises(FtlabError, match=r"11 tokens, over data\.row_length=10"):
        pack([3, 11], [0, 1], 10)
