"""Options, isolation and determinism shared by all tests."""

from __future__ import annotations

import os
import random
import socket
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; the tests' tensors are tiny
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

LOCAL_HOSTS = ("127.0.0.1", "::1", "localhost", "")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ftlab")
    group.addoption("--long", action="store_true", help="run the tests marked slow too (minutes)")
    group.addoption(
        "--no-network",
        action="store_true",
        help="leave out the tests marked network. They need the package registry or a warm cache ($FTLAB_CACHE, or its "
        "default) and fail, never skip, where they find neither",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [name for name, option in (("slow", not config.getoption("--long")),) if option]
    if config.getoption("--no-network"):
        left_out.append("network")
    dropped = [item for item in items if any(item.get_closest_marker(name) for name in left_out)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in set(dropped)]


def is_local(family: int, address: object) -> bool:
    """Whether a socket address stays on this machine."""
    if family == getattr(socket, "AF_UNIX", None):
        return True
    return isinstance(address, tuple) and str(address[0]) in LOCAL_HOSTS


@pytest.fixture(autouse=True)
def no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that is not marked network fails when it opens a connection to another machine."""
    if request.node.get_closest_marker("network"):
        return
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def check(family: int, address: object) -> None:
        if not is_local(family, address):
            pytest.fail(f"connection to {address!r} from a test that is not marked network")

    def guarded_connect(self: socket.socket, address: object) -> None:
        check(self.family, address)
        connect(self, address)  # type: ignore[arg-type]

    def guarded_connect_ex(self: socket.socket, address: object) -> int:
        check(self.family, address)
        return connect_ex(self, address)  # type: ignore[arg-type]

    def guarded_getaddrinfo(host: object, *arguments: object, **named: object) -> object:
        name = host.decode() if isinstance(host, bytes) else host
        if name is not None and name != socket.gethostname():
            check(socket.AF_INET, (name, 0))
        return getaddrinfo(host, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)


def pytest_configure() -> None:
    """Give each process of pytest-xdist cores of its own.

    A run takes all cores that it may use, and so do the commands that tests start. OpenMP programs that share cores
    wait for one another several times as long as they compute.
    """
    worker, count = os.environ.get("PYTEST_XDIST_WORKER", ""), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[int(worker.removeprefix("gw")) :: count] or cores)


@pytest.fixture(autouse=True)
def deterministic() -> None:
    """Every test starts from seed 0 and one thread, whatever ran before it."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.manual_seed(0)
        if torch.get_num_threads() != 1:
            torch.set_num_threads(1)
