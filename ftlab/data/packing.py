"""Several examples in one row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ftlab.errors import FtlabError

__all__ = ["OPEN_ROWS", "pack"]

OPEN_ROWS = 64  # more fills rows a little better and costs time in proportion


def pack(lengths: Sequence[int], order: Iterable[int], row_length: int) -> list[list[int]]:
    """First fit over a bounded number of open rows.

    Each index in turn goes to the oldest open row with room for it, else opens a new one; when more than `OPEN_ROWS`
    are open, the oldest is closed. So an example moves by a bounded distance, and what it is packed with depends on
    the order alone.

    Args:
        lengths: tokens of each example.
        order: the indices to pack.
        row_length: most tokens in a row.

    Returns:
        Rows of indices, in the order in which they were opened; inside a row the indices keep the order's order.

    Raises:
        FtlabError: an example is longer than a row.
    """
    rows: list[list[int]] = []
    open_rows: list[int] = []
    rooms: list[int] = []
    for index in order:
        length = lengths[index]
        if length > row_length:
            raise FtlabError(f"example {index} has {length} tokens, over data.row_length={row_length}: raise it")
        for place, room in enumerate(rooms):
            if room >= length:
                rows[open_rows[place]].append(index)
                rooms[place] = room - length
                if room == length:
                    del open_rows[place], rooms[place]
                break
        else:
            rows.append([index])
            if length < row_length:
                open_rows.append(len(rows) - 1)
                rooms.append(row_length - length)
            if len(open_rows) > OPEN_ROWS:
                del open_rows[0], rooms[0]
    return rows
