"""What a process does while it starts."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

__all__ = ["without_collector"]


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
