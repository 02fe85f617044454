"""What a process does while it starts."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ftlab.config import ParallelConfig
from ftlab.startup import FIRST_CALLS, without_collector
from ftlab.training.parallel import start_ranks


def test_the_collector_rests_inside_and_is_as_before_afterwards() -> None:
    assert gc.isenabled()
    with without_collector():
        assert not gc.isenabled()
        with without_collector():
            pass
        assert not gc.isenabled(), "the inner one must not wake it"
    assert gc.isenabled()


def test_an_error_wakes_the_collector_too() -> None:
    with pytest.raises(KeyError), without_collector():
        raise KeyError
    assert gc.isenabled()


def test_it_decorates() -> None:
    @without_collector()
    def asleep() -> bool:
        return not gc.isenabled()

    assert asleep()
    assert asleep()
    assert gc.isenabled()


class Called(TorchDispatchMode):
    """(function, dtype) of every call, none of which is large enough for two threads."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, torch.dtype]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        assert result.numel() == 1
        self.seen.add((func.overloadpacket.__name__, result.dtype))
        return result


def test_no_elementwise_function_is_called_first_by_two_threads_at_once() -> None:
    """That such a call may lose accuracy cannot be provoked at will; that it is not the first one can be seen."""
    with Called() as called, start_ranks(ParallelConfig("cpu", 1)):
        pass
    wanted = {(name, dtype) for name in FIRST_CALLS for dtype in (torch.float32, torch.float64)}
    assert wanted <= called.seen
    assert {"cos", "sin", "exp", "log", "tanh", "erf", "sqrt"} <= set(FIRST_CALLS)
