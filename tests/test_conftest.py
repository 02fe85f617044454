"""The guards that every other test relies on."""

from __future__ import annotations

import socket

import pytest
import torch


def test_a_connection_to_another_machine_fails_the_test() -> None:
    with pytest.raises(pytest.fail.Exception, match="not marked network"):
        socket.create_connection(("192.0.2.1", 80), timeout=0.1)
    with pytest.raises(pytest.fail.Exception, match="not marked network"):
        socket.getaddrinfo("example.org", 80)


def test_a_connection_to_this_machine_is_allowed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), timeout=5):
        pass


def test_each_test_starts_from_seed_zero() -> None:
    assert torch.initial_seed() == 0
    assert torch.get_num_threads() == 1
