"""What a process does while it starts."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

__all__ = ["FIRST_CALLS", "settle_math", "without_collector"]

FIRST_CALLS = (
    *("acos", "asin", "atan", "ceil", "cos", "cosh", "erf", "erfc", "erfinv", "exp", "expm1", "floor", "lgamma", "log"),
    *(
        "log10",
        "log1p",
        "log2",
        "reciprocal",
        "round",
        "rsqrt",
        "sigmoid",
        "sin",
        "sinh",
        "sqrt",
        "tan",
        "tanh",
        "trunc",
    ),
)


def settle_math() -> None:
    """Call each elementwise function of a CPU once, on one thread, before two threads can make its first call.

    oneMKL, which torch calls them from, chooses the code of a function at its first call. If two threads make that call
    at once, one of them may compute its part of that one call with an error of 1.5e-4 instead of 1e-7
    (https://github.com/pytorch/pytorch/issues/188792): the angles of the first forward pass, once in some hundred runs.
    """
    import torch

    for dtype in (torch.float32, torch.float64):
        one = torch.full((1,), 0.5, dtype=dtype)
        for name in FIRST_CALLS:
            getattr(torch, name)(one)


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Do not look for cyclic garbage meanwhile; also a decorator.

    Loading modules and data makes millions of objects that all stay, and the collector would look at them again and
    again: a tenth of the time until the first step.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
