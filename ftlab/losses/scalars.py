"""What a regularizer adds to the log: sums noted inside the objective, collected by the step around it.

A forward pass notes a sum over its supervised positions. The step adds up those of its micro-batches and ranks, and the
log divides by the supervised tokens of its window, as it does with the loss. Only forward passes are collected, so what
activation checkpointing computes again in the backward pass does not count twice. Elsewhere, as in evaluation, a note
goes nowhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from torch import Tensor

__all__ = ["collecting", "note"]

_SUMS: ContextVar[dict[str, Tensor] | None] = ContextVar("sums", default=None)


@contextlib.contextmanager
def collecting(sums: dict[str, Tensor]) -> Iterator[None]:
    """Add what is noted meanwhile to `sums`, in fp64."""
    token = _SUMS.set(sums)
    try:
        yield
    finally:
        _SUMS.reset(token)


def note(name: str, value: Tensor) -> None:
    """Add `value` to the sum called `name`.

    Every rank must note the same names in each step, also of a batch without a label, where the value is 0.
    """
    sums = _SUMS.get()
    if sums is not None:
        found = value.detach().double()
        sums[name] = sums[name] + found if name in sums else found
