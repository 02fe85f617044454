"""What a process does while it starts."""

from __future__ import annotations

import gc

import pytest

from ftlab.startup import without_collector


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
